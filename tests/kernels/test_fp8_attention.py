"""Attention in FP8: how far it is from the dense one, and the rules of its scales."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from references import relative_error
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import geoaccel
from geoaccel.attention_kernels import KERNELS, attend
from geoaccel.info import _probe
from geoaccel.kernels import fp8, fp8_reference
from geoaccel.quantization.formats import reference

# e4m3 keeps 3 bits behind the leading one: an error is even within half a step, 2^-4 / m of a number m 2^e, and its
# root mean square over mantissas m that are spread as those of ratios are, 1 / m, is this.
ROUNDING = 2**-4 / math.sqrt(3) * math.sqrt(3 / 8 / math.log(2))

# Four such errors that have nothing to do with each other make 2; those of logits are larger where weights are.
EXPECTED = 2.1


def qkv(queries: int, keys: int, dim: int = 32, *, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 2, tokens, dim, generator=generator) for tokens in (queries, keys, keys))
    return q, k, v


def run(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
    return attend(q, k, v, key_bias=key_bias, kernel="fp8")


def dense(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | float = 0.0) -> Tensor:
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5 + key_bias
    return logits.softmax(dim=-1) @ v.double()


def row_by_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The definition for one head in float64, one query at a time; all [N, D], bias [M]."""
    outputs = []
    k = reference.dequantize_rows(*reference.quantize_rows(k)).double()
    v = reference.dequantize_rows(*reference.quantize_rows(v.T)).double().T
    for query in reference.dequantize_rows(*reference.quantize_rows(q)).double():
        top, total, output = -math.inf, 0.0, torch.zeros(q.shape[1], dtype=torch.float64)
        for start in range(0, len(k), 64):
            tile = slice(start, start + 64)
            logits = k[tile] @ query / q.shape[1] ** 0.5 + bias[tile].double()
            higher = max(top, float(logits.max()))
            weights = (256 * (logits - higher).exp()).float().to(torch.float8_e4m3fn).double()
            shrink = math.exp(top - higher)
            output, total, top = output * shrink + weights @ v[tile], total * shrink + float(weights.sum()), higher
        outputs.append(output / total)
    return torch.stack(outputs)


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("keys", [64, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_four_roundings(dim: int, keys: int, dtype: torch.dtype) -> None:
    """Values and weights err by one rounding each, logits of normal tokens by those of queries and keys."""
    q, k, v = (t.to(dtype) for t in qkv(130, keys, dim))
    output = run(q, k, v)
    assert output.dtype == dtype
    assert 1.5 * ROUNDING < relative_error(output, dense(q, k, v)) < EXPECTED * ROUNDING


def same_up_to_the_order_of_sums(actual: Tensor, expected: Tensor) -> None:
    """Equal outputs of nearly all queries; those of a few may be off by one step of one weight.

    A logit is exact to about 1e-6. That moves a weight over the edge between two codes, which are a sixteenth of it or
    more apart, about once in 30,000; with up to 260 keys, for one query in a hundred.
    """
    error = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert error.flatten().quantile(0.9) < 1e-5
    assert error.max() < 1 / 16


@pytest.mark.parametrize(("keys", "spread"), [(40, 1.0), (64, 4.0), (150, 1.0), (259, 3.0)])
def test_it_is_its_definition(keys: int, spread: float) -> None:
    q, k, v = qkv(30, keys)
    q = q * spread
    bias = torch.rand(keys, generator=torch.Generator().manual_seed(1))
    output = run(q, k, v, bias)
    for head in range(2):
        expected = row_by_row(q[0, head], k[0, head], v[0, head], bias)
        same_up_to_the_order_of_sums(output[0, head], expected)


def test_codes_and_scales_are_those_of_fp8_layers() -> None:
    q, k, v = qkv(5, 7)
    x = fp8_reference.round_operands(q, k, v, None)
    codes, scale = reference.quantize_rows(q[0, 1])
    assert torch.equal(x.q[0, 1].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(x.q_scale[0, 1], scale[:, 0])
    codes, scale = reference.quantize_rows(v[0, 1].T)
    assert torch.equal(x.v[0, 1, :, :7].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(x.v_scale[0, 1], scale[:, 0])
    assert x.v.shape[3] == 16
    assert not x.v[..., 7:].float().any()


def test_every_code_is_decoded() -> None:
    codes = torch.arange(256).to(torch.uint8)
    codes = codes[(codes & 127) != 127].view(torch.float8_e4m3fn)  # the two left out are NaN
    assert torch.equal(fp8_reference.values(codes), codes.float())


def test_outputs_are_means_of_values() -> None:
    """Rounded weights sum to one: values that are all the same come back."""
    q, k, v = qkv(20, 300)
    same = torch.linspace(-5, 5, 32).expand_as(v)
    assert torch.allclose(run(3 * q, k, same), same[:, :, :20], atol=1e-5)


def test_scales_take_any_magnitude_of_a_token_or_channel() -> None:
    q, k, v = qkv(6, 80)
    output = run(q, k, v)
    huge = torch.ones(6, 1)
    huge[2] = 2.0**40
    others = torch.arange(6) != 2
    assert torch.equal(run(q * huge, k, v)[:, :, others], output[:, :, others])
    assert torch.equal(run(q * 2.0**30, k * 2.0**-30, v), output)
    channels = 2.0 ** torch.linspace(-30, 30, 32).round()
    assert torch.equal(run(q, k, v * channels), output * channels)
    tiny = torch.ones(80, 1)
    tiny[3] = 2.0**-40  # a logit of about 0, whatever the other keys are
    small = run(q, k * tiny, v)
    assert 1.5 * ROUNDING < relative_error(small, dense(q, k * tiny, v)) < EXPECTED * ROUNDING


def test_zeros_are_a_mean_of_all_values() -> None:
    _, _, v = qkv(1, 70)
    nothing = torch.zeros_like(v)
    assert relative_error(run(nothing, nothing, v), v.mean(2, keepdim=True).expand_as(v)) < 0.06
    assert not run(nothing, nothing, nothing).any()
    x = fp8_reference.round_operands(nothing, nothing, nothing, None)
    assert not any(codes.view(torch.uint8).any() for codes in (x.q, x.k, x.v))


@pytest.mark.parametrize("gone", [slice(0, 70), slice(3, 9), slice(64, 150)])
def test_keys_of_no_weight_do_not_count(gone: slice) -> None:
    """Also where they fill a tile, and the first one."""
    q, k, v = qkv(9, 150)
    bias = torch.zeros(150)
    bias[gone] = -math.inf
    kept = bias == 0
    output = run(q, k, v, bias)
    assert torch.equal(run(q, k.masked_fill(~kept[:, None], 1e6), v, bias), output)
    assert relative_error(output, dense(q, k, v, bias)) < EXPECTED * ROUNDING
    assert run(q, k, v, torch.full((150,), -math.inf)).isnan().all()


@pytest.mark.parametrize("lengths", [(70, 70, 70), (1, 139, 70)])
def test_segments_have_their_own_scales_and_biases(lengths: tuple[int, ...]) -> None:
    q, k, v = qkv(210, 210)
    bias = torch.rand(210, generator=torch.Generator().manual_seed(2)) * 3
    together = attend(q, k, v, lengths=lengths, key_bias=bias, kernel="fp8")
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), bias.split(lengths), strict=True)
    alone = [run(*part) for part in parts]
    same_up_to_the_order_of_sums(together, torch.cat(alone, dim=2))


def test_queries_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(30, 100, n=2)
    whole = run(q, k, v)
    monkeypatch.setattr(fp8_reference, "QUERIES", 7)
    same_up_to_the_order_of_sums(run(q, k, v), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tokens_that_are_not_finite_are_refused_on_a_cpu_and_nan_elsewhere(which: int, bad: float) -> None:
    q, k, v = inputs = qkv(5, 70, n=2)
    assert not run(q, k, v).isnan().any()
    inputs[which][1, 0, 3, 4] = bad
    what = ("query", "key", "value")[which]
    with pytest.raises(ValueError, match=f"attention='fp8': a {what} of head 0 in sequence 1 is NaN") as caught:
        run(q, k, v)
    assert "\n" not in str(caught.value)
    nan = fp8_reference.emulate(fp8_reference.round_operands(q, k, v, None)).isnan()
    concerned = torch.zeros(2, 2, 5, 32, dtype=torch.bool)
    place = (3,) if which == 0 else () if which == 1 else (slice(None), 4)
    concerned[(1, 0, *place)] = True
    assert torch.equal(nan, concerned)


def test_gradients_are_refused() -> None:
    q, k, v = qkv(4, 4)
    with pytest.raises(ValueError, match=r"no gradients; call the model under torch\.no_grad"):
        run(q, k, v.requires_grad_())
    with torch.no_grad():
        run(q, k, v)


@pytest.mark.parametrize("shape", [(1, 2, 1, 6), (1, 1, 4, 6)])
def test_a_bias_of_heads_or_queries_is_refused(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(4, 6)
    with pytest.raises(ValueError, match="the same for all heads and queries"):
        fp8.fp8(q, k, v, torch.ones(shape).expand(1, -1, 4, 6))


def test_hardware_without_fp8_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fp8._try_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    line = (
        r"attention='fp8' does not run on cuda:0: FP8 products need compute capability 8.9 or higher, this is 8.0; "
        "choose 'sdpa'$"
    )
    with FakeTensorMode():
        x = torch.empty(1, 2, 4, 32, device="cuda:0")
        with pytest.raises(NotImplementedError, match=line):
            run(x, x, x)
    monkeypatch.setattr(torch.version, "hip", "6")
    fp8._try_kernel.cache_clear()
    assert fp8.missing_kernel(0) == "FP8 products in Triton are for NVIDIA"
    fp8._try_kernel.cache_clear()


def test_a_kernel_that_fails_or_is_wrong_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def broken(device: torch.device) -> str | None:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(fp8, "_disagreement", broken)
    fp8._try_kernel.cache_clear()
    assert fp8.missing_kernel(0) == "the Triton kernel fails with RuntimeError: no compiler"
    monkeypatch.setattr(fp8, "_disagreement", lambda device: None)
    fp8._try_kernel.cache_clear()
    assert fp8.missing_kernel(0) is None
    fp8._try_kernel.cache_clear()


def test_networks_run_with_it_and_survive_copies(tiny: nn.Module) -> None:
    images = torch.rand(1, 3, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    fast = geoaccel.accelerate(copy.deepcopy(tiny), attention="fp8")
    with torch.inference_mode():
        plain = tiny(images)
        output = fast(images)
        copies = [again(images) for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))]
    for name in ("depth", "world_points") if "depth" in plain else ("points", "camera_poses"):
        assert 0 < relative_error(output[name], plain[name]) < 0.1
        assert all(torch.equal(again[name], output[name]) for again in copies)


def test_it_compiles_into_one_graph(this_processor: None) -> None:
    q, k, v = qkv(10, 130)
    bias = torch.linspace(0, 3, 130)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v, bias), run(q, k, v, bias))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what runs on the GPU")
def test_info_says_that_it_is_slow_here() -> None:
    assert _probe(fp8.fp8) == "works on cpu in float32, bfloat16 (emulated in float32, slower than sdpa)"
    assert _probe(KERNELS["sdpa"]) == "works on cpu in float32, bfloat16"


@pytest.mark.slow
def test_the_kernel_compiles_to_products_of_codes() -> None:
    """For devices that are not here: Triton's compiler needs none."""
    pytest.importorskip("triton")
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from geoaccel.kernels.fp8_flash import _flash_kernel as kernel

tiles = dict(BIASED=True, NATIVE=True, WEIGHT_BITS=8, TILE_N=128, TILE_M=64, TILE_D=64)
codes, floats = dict.fromkeys("qkv", "*fp8e4nv"), ("q_scale", "k_scale", "v_scale", "bias")
types = {name: "i32" for name in kernel.arg_names} | codes | dict.fromkeys(floats, "*fp32") | {"out": "*bf16"}
for capability in (89, 90):
    source = ASTSource(kernel, types | dict.fromkeys(tiles, "constexpr"), tiles)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["ptx"]
    print(capability, sum("mma" in line and "e4m3" in line for line in ptx.splitlines()) > 1)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["89", "True", "90", "True"], done.stderr[-3000:]


@pytest.mark.gpu
def test_the_kernel_agrees_with_its_emulation_on_the_gpu() -> None:
    assert fp8.missing_kernel(0) is None
    q, k, v = (t.cuda() for t in qkv(1000, 1500, 64, n=2))
    assert 1.5 * ROUNDING < relative_error(run(q, k, v), dense(q, k, v)) < EXPECTED * ROUNDING
