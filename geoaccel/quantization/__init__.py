"""Quantization of linear layers: few bits on disk and in memory, FP8 products where the hardware has them.

Methods are attributes of the package by the name of their class: ``from geoaccel.quantization import W4A16``.
"""

from geoaccel.quantization.awq import scale_activations
from geoaccel.quantization.fp8 import FP8
from geoaccel.quantization.guard import assert_outputs_differ, assert_quantized
from geoaccel.quantization.method import QUANTIZATION, SCOPE, Quantization, register
from geoaccel.quantization.swap import QuantizedPart, quantize, quantized_parts, restore_linears
from geoaccel.quantization.w4 import W4A16

__all__ = [
    "FP8",
    "QUANTIZATION",
    "SCOPE",
    "W4A16",
    "Quantization",
    "QuantizedPart",
    "assert_outputs_differ",
    "assert_quantized",
    "quantize",
    "quantized_parts",
    "register",
    "restore_linears",
    "scale_activations",
]
