"""Quantization of linear layers: few bits on disk and in memory, FP8 products where the hardware has them.

Methods are attributes of the package under their class name: ``from geoaccel.quantization import W4A16``.
"""

from geoaccel.quantization.calibrate.allocation import Allocation
from geoaccel.quantization.calibrate.compensation import add_token, mean_camera_token
from geoaccel.quantization.calibrate.rounding import quantize_compensated
from geoaccel.quantization.calibrate.search import TaskSearch, scale_activations
from geoaccel.quantization.calibrate.task import TaskWeights, task_terms
from geoaccel.quantization.formats.fp8 import FP8
from geoaccel.quantization.formats.w4 import W4A16
from geoaccel.quantization.guard import assert_outputs_differ, assert_quantized
from geoaccel.quantization.method import QUANTIZATION, Quantization, register, scope_of
from geoaccel.quantization.swap import QuantizedPart, quantize, quantized_parts, restore_linears

__all__ = [
    "FP8",
    "QUANTIZATION",
    "W4A16",
    "Allocation",
    "Quantization",
    "QuantizedPart",
    "TaskSearch",
    "TaskWeights",
    "add_token",
    "assert_outputs_differ",
    "assert_quantized",
    "mean_camera_token",
    "quantize",
    "quantize_compensated",
    "quantized_parts",
    "register",
    "restore_linears",
    "scale_activations",
    "scope_of",
    "task_terms",
]
