"""One quantized layer: its numbers, its buffers, its life as a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantized_layers import SHAPES, buffers, layer, linear, method, tokens  # noqa: F401 (fixtures)
from references import relative_error
from torch import Tensor

from geoaccel.linears import QuantizedLinear
from geoaccel.quantization import FP8, W4A16, Quantization
from geoaccel.quantization.formats import fp8, reference

# ------------------------------------------------------------------------------------------------- numbers


def test_every_e4m3_code_is_decoded_as_torch_does() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    scale = torch.tensor([[1.0], [0.37]])
    finite = codes.float().isfinite()
    assert int((~finite).sum()) == 2
    decoded = fp8.decode(codes, scale, torch.float32)
    assert torch.equal(decoded[finite], (codes.float() * scale)[finite])


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_weights_are_those_of_the_reference(method: Quantization, inputs: int, outputs: int) -> None:
    float_layer = linear(inputs, outputs)
    layer: Any = method.quantize(float_layer)
    if isinstance(method, W4A16):
        codes = reference.unpack_nibbles(layer.weight_q, inputs)
        expected = reference.quantize_groups(float_layer.weight.detach(), method.group_size)
        assert all(
            torch.equal(a, b) for a, b in zip((codes, layer.weight_scale, layer.weight_zero), expected, strict=True)
        )
        weight = reference.dequantize_groups(*expected, method.group_size)
    else:
        weight = reference.dequantize_rows(*reference.quantize_rows(float_layer.weight.detach()))
    assert torch.equal(layer.dequantize(), weight)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.dequantize(torch.bfloat16), weight.bfloat16())
    assert torch.equal(layer.bias, float_layer.bias)


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_pass_the_rounding_of_activations(gelu: bool) -> None:
    float_layer = linear()
    layer: Any = FP8().quantize(float_layer)
    x = torch.randn(8, float_layer.in_features, generator=torch.Generator().manual_seed(0))

    def gradient(run: Any) -> Tensor:
        given = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(run(given).square().sum(), given)
        return found

    with torch.no_grad():
        same = layer(x, gelu)
    assert torch.equal(layer(x.clone().requires_grad_(), gelu), same)
    expected = gradient(lambda given: float_layer(F.gelu(given) if gelu else given))
    found = gradient(lambda given: layer(given, gelu))
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_to_narrow_types_once(method: Quantization, dtype: torch.dtype) -> None:
    """Also where the scales by themselves are too small for float16."""
    quiet = linear()
    quiet.weight.data *= 1e-4
    layer = method.quantize(quiet)
    assert layer.weight_scale.half().float().ne(layer.weight_scale.float()).any()
    assert torch.equal(layer.dequantize(dtype), layer.dequantize().to(dtype))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,), (2, 0, 4)])
def test_products(method: Quantization, inputs: int, outputs: int, bias: bool, lead: tuple[int, ...]) -> None:
    layer = method.quantize(linear(inputs, outputs, bias=bias))
    x = tokens(*lead, inputs)
    y = layer(x)
    assert y.shape == (*lead, outputs)
    seen = x.reshape(-1, inputs)
    if getattr(method, "activations", False):
        seen = reference.dequantize_rows(*reference.quantize_rows(seen)) if len(seen) else seen
    expected = F.linear(seen.double(), layer.dequantize().double(), None if layer.bias is None else layer.bias.double())
    assert torch.allclose(y.double(), expected.view(y.shape), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        (FP8(), 0.03, 0.045),
        (FP8(activations=False), 0.02, 0.03),
        (W4A16(), 0.09, 0.11),
        (W4A16(group_size=32), 0.07, 0.085),
    ],
    ids=str,
)
def test_error_against_the_float_layer(method: Quantization, low: float, high: float) -> None:
    float_layer = linear(1024, 256, bias=False)
    x = tokens(64, 1024)
    x[:4] *= 3000  # special tokens have far larger norms than patches
    error = relative_error(method.quantize(float_layer)(x)[4:], float_layer(x)[4:])
    assert low < error < high


def scaled_mm(x: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
    codes, scale = reference.quantize_rows(x)
    scales = {"scale_a": scale, "scale_b": layer.weight_scale[None]}
    try:
        return torch._scaled_mm(codes, layer.weight_q.t(), **scales, out_dtype=dtype)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"no row-wise product on this CPU: {error}")


# Sums of 256 terms, in another order: 0.2 x 2^-23 x sqrt(256), twice. In bfloat16 the last bit: a rounding each.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-6), (torch.bfloat16, 2**-7)])
def test_emulation_is_the_row_wise_product(dtype: torch.dtype, bound: float) -> None:
    layer = FP8().quantize(linear(256, 64, bias=False))
    x = tokens(33, 256).to(dtype)
    assert relative_error(layer(x), scaled_mm(x, layer, dtype)) < bound


@pytest.fixture
def product_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let the layers use the CPU's row-wise product as they would a GPU's; gives the rows of each call."""
    scaled_mm(tokens(2, 16), FP8().quantize(linear(16, 16)), torch.bfloat16)
    calls: list[int] = []
    real = torch._scaled_mm

    def counted(a: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(len(a))
        return real(a, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    monkeypatch.setattr(fp8, "PRODUCT_DEVICES", ("cuda", "cpu"))
    fp8._try_product.cache_clear()
    fp8.missing_bias("cpu", None)  # tried before calls are counted
    calls.clear()
    yield calls
    fp8._try_product.cache_clear()


@pytest.mark.parametrize("bias", [True, False])
def test_the_hardware_product_gives_the_same(product_on_cpu: list[int], bias: bool) -> None:
    layer = FP8().quantize(linear(256, 64, bias=bias)).to(torch.bfloat16)
    assert "row-wise FP8 product" in layer.runs_as
    product_on_cpu.clear()
    x = tokens(3, 11, 256).bfloat16()
    y = layer(x)
    assert product_on_cpu == [33]
    assert (y.shape, y.dtype) == ((3, 11, 64), torch.bfloat16)
    expected = reference.fp8_linear(x.flatten(0, 1), layer.weight_q, layer.weight_scale[:, None], layer.bias)
    assert relative_error(y.flatten(0, 1), expected) < 6e-3


def test_where_the_hardware_product_does_not_fit_the_layer_is_decoded(product_on_cpu: list[int]) -> None:
    layer = FP8().quantize(linear(256, 64))
    odd = FP8().quantize(linear(192, 40))
    narrow = FP8().quantize(linear(40, 192))
    FP8().quantize(linear(16, 16)).runs_as  # noqa: B018  the probe
    product_on_cpu.clear()
    layer(tokens(3, 256))  # float32
    layer(tokens(0, 256).bfloat16())
    odd(tokens(3, 192).bfloat16())
    narrow(tokens(3, 40).bfloat16())
    FP8(activations=False).quantize(linear(256, 64))(tokens(3, 256).bfloat16())
    assert product_on_cpu == []
    assert "192 -> 40 is no multiple of 16" in odd.runs_as
    assert "40 -> 192 is no multiple of 16" in narrow.runs_as


def test_the_hardware_product_runs_under_autocast(product_on_cpu: list[int]) -> None:
    layer = FP8().quantize(linear(256, 64))
    assert "row-wise" in layer.runs_as
    product_on_cpu.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(tokens(3, 256)).dtype == torch.bfloat16
    assert product_on_cpu == [3]


def test_a_cpu_never_runs_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_scaled_mm")
    layer = FP8().quantize(linear(256, 64)).bfloat16()
    assert "no FP8 product on cpu" in layer.runs_as
    assert layer(tokens(3, 256).bfloat16()).isfinite().all()


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_device_without_fp8(product_on_cpu: list[int], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    layer = FP8().quantize(linear(256, 64)).to(torch.bfloat16)
    x = tokens(3, 256).bfloat16()
    expected = layer.float()(x)
    layer.to(torch.bfloat16)

    def product(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, **scales: Tensor) -> Tensor:
        if fault == "raises":
            raise RuntimeError("torch._scaled_mm is only supported from compute capability 9.0 on\nmore")
        return torch.zeros(len(a), b.shape[1], dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    fp8._try_product.cache_clear()
    assert relative_error(layer(x), expected) < 6e-3
    reason = "does not run on cpu: torch._scaled_mm is only supported" if fault == "raises" else "is off by 100%"
    assert reason in layer.runs_as
    assert "\n" not in layer.runs_as


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_activations_that_are_not_finite(method: Quantization, layer: QuantizedLinear, value: float) -> None:
    x = tokens(2, 3, 192)
    x[1, 1, 7] = value
    if getattr(method, "activations", False):
        says = "token 4 of the 6 that enter a 192 -> 48 layer is NaN or infinite"
        with pytest.raises(ValueError, match=says) as caught:
            layer(x)
        assert "\n" not in str(caught.value)
    else:  # as a float layer: the row concerned, and no other
        good = layer(x).isfinite().all(-1).flatten()
        assert good.tolist() == [True, True, True, True, False, True]


def test_rows_of_zeros_stay_zero(method: Quantization) -> None:
    layer = method.quantize(linear(bias=False))
    x = tokens(3, 192)
    x[1] = 0
    assert torch.equal(layer(x)[1], torch.zeros(48))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite(method: Quantization, value: float) -> None:
    float_layer = linear()
    with torch.no_grad():
        float_layer.weight[3, 4] = value
    with pytest.raises(ValueError, match=f"{method.name}: the weights of blocks.0.fc1 contain NaN or infinite"):
        method.quantize(float_layer, "blocks.0.fc1")


@pytest.mark.parametrize("size", [0, -128, 12, 4, 128.0, "128", True])
def test_group_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match=r"w4a16: group_size=.* must be a (positive multiple of 8|whole number)"):
        W4A16(group_size=size)


def test_flags_are_true_or_false() -> None:
    with pytest.raises(ValueError, match="fp8: activations='no' must be true or false"):
        FP8(activations="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("knob", ["include", "exclude"])
def test_names_are_lists_of_text(knob: str) -> None:
    assert getattr(FP8(**{knob: "a.*"}), knob) == getattr(FP8(**{knob: ["a.*"]}), knob) == ("a.*",)
    with pytest.raises(ValueError, match=f"fp8: {knob}="):
        FP8(**{knob: [3]})


@pytest.mark.slow
def test_compiled(method: Quantization, layer: QuantizedLinear, this_processor: None) -> None:
    x = tokens(7, 192)
    compiled = torch.compile(layer, fullgraph=True)
    assert relative_error(compiled(x), layer(x)) < 1e-3
    assert relative_error(compiled(tokens(9, 192)), layer(tokens(9, 192))) < 1e-3


@pytest.mark.slow
def test_compiled_with_the_hardware_product(product_on_cpu: list[int], this_processor: None) -> None:
    layer = FP8().quantize(linear(256, 64)).to(torch.bfloat16)
    x = tokens(7, 256).bfloat16()
    assert relative_error(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)) < 6e-3
