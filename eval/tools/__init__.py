"""Programs behind the commands: eval, demo, quantize, and studies of quantization."""
