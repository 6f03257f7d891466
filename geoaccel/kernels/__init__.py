"""Compiled kernels, each beside its slow torch twin. Only :mod:`geoaccel.kernels.choice` decides which one runs.

Modules with kernels import triton and are imported where a kernel is about to run, never before.
"""
