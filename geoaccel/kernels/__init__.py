"""Compiled kernels, each with its reference implementation in torch.

Only :mod:`geoaccel.kernels.choice` decides which one runs, but for attention in FP8: that is asked for by name, and
:mod:`geoaccel.kernels.fp8` says where it cannot run.

Modules with kernels import triton and are imported where a kernel is about to run, never before.
"""
