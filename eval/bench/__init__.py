"""Time and memory: latency of a model and its methods over frame counts."""
