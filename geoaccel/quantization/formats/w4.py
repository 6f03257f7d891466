"""W4A16: weights in 4 bits, asymmetric, with a scale and a zero for every group of 128; activations unquantized.

The codes are decoded layer by layer for a dense product, which is the fastest way for the thousands of tokens of a
reconstruction. The method saves memory, not time. On a GPU a Triton kernel decodes in one pass
(:mod:`geoaccel.kernels.nibbles`).

The format is that of QVGGT (CVPR 2026, arXiv 2605.31124) and AWQ (arXiv 2306.00978).
Differs from the papers in: weights are rounded to nearest or, if the second moments of a layer's inputs are known, by
:mod:`geoaccel.quantization.formats.gptq`; the zero is a weight and not a code, so that a group need not contain 0;
scales and zeros are bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.kernels.choice import launching_on, use_compiled
from geoaccel.linears import QuantizedLinear, compute_dtype
from geoaccel.quantization.formats.gptq import compensated_groups
from geoaccel.quantization.formats.reference import GROUP_DTYPE, pack_nibbles, quantize_groups
from geoaccel.quantization.method import Quantization, register


class W4Linear(QuantizedLinear):
    """Buffers: ``weight_q`` [out, ceil(in / 2)] uint8, the even input in the low half of a byte; ``weight_scale`` and
    ``weight_zero`` [out, ceil(in / group)] bfloat16; ``bias`` [out] in the network's dtype.
    """

    stored = ("weight_q", "weight_scale", "weight_zero")
    weight_q: Tensor
    weight_scale: Tensor
    weight_zero: Tensor

    def buffer_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        outputs, packed = self.out_features, -(-self.in_features // 2)
        groups = -(-self.in_features // self.method.group_size)
        return [((outputs, packed), torch.uint8), *(2 * [((outputs, groups), GROUP_DTYPE)])]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [out, in]
        # A compiled forward fuses the passes below by itself.
        if not torch.compiler.is_compiling() and use_compiled(self.weight_q):
            from geoaccel.kernels.nibbles import decode_groups

            stored, size = (self.weight_q, self.weight_scale, self.weight_zero), self.method.group_size
            with launching_on(self.weight_q.device):
                return decode_groups(*stored, self.in_features, size, dtype)
        # In float32 whatever is asked for: in 16 bits a scale times a code loses what the codes were chosen by.
        codes = torch.stack([self.weight_q & 15, self.weight_q >> 4], dim=2).flatten(1).float()
        size, groups = self.method.group_size, self.weight_scale.shape[1]
        if codes.shape[1] != groups * size:
            codes = F.pad(codes, (0, groups * size - codes.shape[1]))
        scale, zero = self.weight_scale.float()[..., None], self.weight_zero.float()[..., None]
        weight = torch.addcmul(zero, codes.unflatten(1, (groups, size)), scale)
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    @property
    def runs_as(self) -> str:
        rest = self.in_features % self.method.group_size
        return "decoded for a dense product" + (f", the last group of a row has {rest} inputs" if rest else "")

    def forward(
        self,
        x: Tensor,  # [..., in]
    ) -> Tensor:  # [..., out]
        dtype = compute_dtype(x)
        return F.linear(x.to(dtype), self.dequantize(dtype), None if self.bias is None else self.bias.to(dtype))


@register
@dataclass(frozen=True, kw_only=True)
class W4A16(Quantization):
    """Weights in 4 bits, two per byte.

    Every linear shape works: if the group size does not divide the inputs, the last group of a row is shorter, with its
    own scale and zero.

    Args:
        include, exclude: See :class:`Quantization`.
        group_size: Consecutive inputs that share a scale. Smaller groups are more accurate and larger: 4 + 32 /
            group_size bits per weight.
    """

    name: ClassVar[str] = "w4a16"
    layer_type: ClassVar[type[QuantizedLinear]] = W4Linear
    uses_gram: ClassVar[bool] = True
    group_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.group_size
        if not isinstance(size, int) or size < 8 or size % 8:
            raise UserError(f"{self.name}: group_size={size!r} must be a positive multiple of 8, usually 32, 64 or 128")

    def encode(
        self,
        weight: Tensor,  # [out, in] float32
        gram: Tensor | None = None,  # [in, in]
    ) -> dict[str, Tensor]:
        if gram is None:
            codes, scale, zero = quantize_groups(weight, self.group_size)
        else:
            codes, scale, zero = compensated_groups(weight, gram, self.group_size)
        return {"weight_q": pack_nibbles(codes), "weight_scale": scale, "weight_zero": zero}
