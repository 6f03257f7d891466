"""Calibration: statistics, scales (AWQ), rounding (GPTQ) and allocation of precisions, from images without labels."""
