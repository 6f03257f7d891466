"""Implementation of the commands eval, demo, quantize, and of quantization studies."""
