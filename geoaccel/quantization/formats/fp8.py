"""FP8: weights and activations in e4m3, with a scale for every output row and for every token.

Scales of activations are dynamic, so no calibration is needed and no call depends on an earlier one. On a device with a
row-wise FP8 product (NVIDIA from compute capability 8.9 on) and in bfloat16 the product runs on the codes. Everywhere
else weights and activations are rounded to the same codes, decoded, and multiplied densely: the same numbers up to the
order of sums, but no faster than without the method.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.kernels.choice import alone
from geoaccel.kernels.e4m3 import E4M3, UNIT, in_units
from geoaccel.kernels.fused import fused
from geoaccel.linears import QuantizedLinear, compute_dtype
from geoaccel.quantization.formats.reference import fp8_linear, quantize_rows
from geoaccel.quantization.method import Quantization, register

# A CPU has the operator too, for correctness only: it is no faster than decoding.
PRODUCT_DEVICES = ("cuda",)
PRODUCT_MULTIPLE = 16


class StraightThrough(torch.autograd.Function):
    """Rounded activations, with the gradient of those that were rounded: rounding itself has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class FP8Linear(QuantizedLinear):
    """Buffers: ``weight_q`` [out, in] e4m3, ``weight_scale`` [out] float32, ``bias`` [out] in the network's dtype."""

    stored = ("weight_q", "weight_scale")
    weight_q: Tensor
    weight_scale: Tensor

    def buffer_shapes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((self.out_features, self.in_features), E4M3), ((self.out_features,), torch.float32)]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # [out, in]
        return decode(self.weight_q, self.weight_scale[:, None], dtype)

    @property
    def runs_as(self) -> str:
        if not self.method.activations:
            return "decoded for a dense product"
        why = self._why_decoded()
        return "row-wise FP8 product in bfloat16" if why is None else f"decoded for a dense product ({why})"

    def forward(
        self,
        x: Tensor,  # [..., in]
        gelu: bool = False,
    ) -> Tensor:  # [..., out]
        """The product of rounded weights and activations, or GELU of them.

        Gradients pass the rounding of activations as if it were not there (straight-through estimate).

        Raises:
            ValueError: If an activation is NaN or infinite; on a CPU only, as the check would synchronise with a GPU.
                There the affected rows are NaN.
        """
        dtype = compute_dtype(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not self.method.activations:
            return F.linear((F.gelu(x) if gelu else x).to(dtype), self.dequantize(dtype), bias)
        rows = x.reshape(-1, self.in_features)
        learns = torch.is_grad_enabled() and rows.requires_grad
        with torch.no_grad():
            codes, scale = (fused("quantize_rows", rows) or quantize_rows)(rows, gelu)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not scale.isfinite().all():
            raise UserError(
                f"fp8: token {int((~scale[:, 0].isfinite()).nonzero()[0])} of the {len(rows)} that enter a "
                f"{self.in_features} -> {self.out_features} layer is NaN or infinite; check the images for such "
                "values, then for an overflow in float16"
            )
        if not learns and dtype == torch.bfloat16 and len(rows) and self._why_decoded() is None:
            y = product(codes, scale, self.weight_q, self.weight_scale, bias)
        else:
            rounded = decode(codes, scale, dtype)
            if learns:
                rounded = StraightThrough.apply(F.gelu(rows) if gelu else rows, rounded)
            y = F.linear(rounded, self.dequantize(dtype), bias)
        return y.view(*x.shape[:-1], self.out_features)

    def takes_gelu(self, x: Tensor) -> bool:
        listened = self._forward_hooks or self._forward_pre_hooks
        return self.method.activations and not listened and fused("quantize_rows", x) is not None

    def __getstate__(self) -> dict[str, Any]:
        # Pickle knows no tensors of eight-bit floats.
        state = dict(self.__dict__)
        state["_buffers"] = {**self._buffers, "weight_q": self.weight_q.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight_q = self.weight_q.view(E4M3)

    def _why_decoded(self) -> str | None:
        """Why the hardware product does not run; None if it does."""
        if self.in_features % PRODUCT_MULTIPLE or self.out_features % PRODUCT_MULTIPLE:
            return f"{self.in_features} -> {self.out_features} is no multiple of {PRODUCT_MULTIPLE}"
        device = self.weight_q.device
        if device.type not in PRODUCT_DEVICES:
            return f"no FP8 product on {device.type}"
        return missing_product(device.type, device.index)


@register
@dataclass(frozen=True, kw_only=True)
class FP8(Quantization):
    """FP8 weights and, by default, FP8 activations.

    Every shape works. If a side is not a multiple of 16 the hardware product cannot run, and the layer is decoded.

    Args:
        include, exclude: See :class:`Quantization`.
        activations: False leaves the activations unquantized: smaller files, but no faster product.
    """

    name: ClassVar[str] = "fp8"
    layer_type: ClassVar[type[QuantizedLinear]] = FP8Linear
    activations: bool = True

    def encode(
        self,
        weight: Tensor,  # [out, in] float32
        gram: Tensor | None = None,
    ) -> dict[str, Tensor]:
        codes, scale = quantize_rows(weight)
        return {"weight_q": codes, "weight_scale": scale[:, 0]}


def decode(
    codes: Tensor,  # [R, K] e4m3
    scale: Tensor,  # [R, 1] float32
    dtype: torch.dtype,
) -> Tensor:  # [R, K]
    """``codes * scale``, over ten times as fast as torch's own cast from e4m3 on a CPU.

    Elsewhere torch's cast, which keeps NaN: activations have not been checked for it there.
    """
    if codes.is_cuda:
        return (codes.float() * scale).to(dtype)
    return (in_units(codes) * (scale * UNIT)).to(dtype)


def product(
    codes: Tensor,  # [R, K] e4m3
    scale: Tensor,  # [R, 1] float32
    weight: Tensor,  # [N, K] e4m3
    weight_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N] bfloat16
) -> Tensor:  # [R, N] bfloat16
    """The row-wise product on the codes, if :func:`missing_product` finds it available."""
    behind = None if bias is None or missing_bias(codes.device.type, codes.device.index) is None else bias
    y = torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale[None],
        bias=bias if behind is None else None,
        out_dtype=torch.bfloat16,
    )
    return y if behind is None else y.add_(behind)


def missing_product(kind: str, index: int | None) -> str | None:
    """Why the row-wise product of a device cannot be used; None if it can. Tested once per device."""
    return _try_product(kind, index)


# What torch.compiler.assume_constant_result does; calling it would import the compiler with the package.
missing_product._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing_bias(kind: str, index: int | None) -> str | None:
    """Why the product of a device cannot add a bias itself; None if it can. Tested once per device."""
    return _try_product(kind, index, biased=True)


missing_bias._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _try_product(kind: str, index: int | None, *, biased: bool = False) -> str | None:
    """Run a small product and compare it with the reference."""
    device = torch.device(kind if index is None else f"{kind}:{index}")
    try:
        with alone(device):
            error = _product_error(device, biased)
    except (RuntimeError, ValueError, NotImplementedError) as problem:
        return f"the FP8 product does not run on {device}: {str(problem).strip().splitlines()[0]}"
    return None if error < 0.01 else f"the FP8 product on {device} is off by {error:.0%}"


def _product_error(device: torch.device, biased: bool) -> float:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).to(device) for rows in (19, 48))
    bias = torch.randn(48, generator=generator).to(device, torch.bfloat16) if biased else None
    (rounded, token_scale), (codes, scale) = quantize_rows(x), quantize_rows(weight)
    y = torch._scaled_mm(
        rounded, codes.t(), scale_a=token_scale, scale_b=scale.t(), bias=bias, out_dtype=torch.bfloat16
    )
    expected = fp8_linear(x, codes, scale, bias)
    return float((y.double() - expected).norm() / expected.norm())
