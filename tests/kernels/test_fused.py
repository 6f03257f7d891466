"""Kernels that stand for several operations: against their twins by Triton's interpreter, and where they are chosen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.attention_kernels import _with_log_sum, attend
from geoaccel.kernels import fused as choice
from geoaccel.kernels import twins
from geoaccel.kernels.e4m3 import E4M3
from geoaccel.layout import TokenLayout
from geoaccel.merging import headwise
from geoaccel.merging.temporal import Places, Split
from geoaccel.models.layers import compiled
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.rope import apply_rope, rope_tables
from geoaccel.quantization import FP8
from geoaccel.quantization.formats import fp8

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_under_the_interpreter")
CPU = torch.device("cpu")


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="this is that process, or triton is not installed")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreter_", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kernel(name: str) -> Callable[..., Any]:
    """As the interpreter runs it: it does not round to eight-bit floats."""
    return partial(choice.load(name), native=False) if name == "quantize_rows" else choice.load(name)


# ---------------------------------------------------------------------------------------------- under the interpreter


@interpreted
@pytest.mark.parametrize("name", choice.NAMES)
def test_interpreter_agrees_with_the_twin_and_the_check_notices_what_is_wrong(name: str) -> None:
    # The interpreter multiplies the bits of bfloat16, not the numbers.
    assert choice.disagreement(name, kernel(name), CPU, torch.float16) is None

    def wrong(*inputs: Any) -> Any:
        out = kernel(name)(*inputs)
        if name == "match_blocks":
            return (out + 1) % inputs[2].shape[1]
        if name == "join":
            return inputs[0].mul_(1.03)
        return tuple(1.03 * part for part in out) if isinstance(out, tuple) else 1.03 * out

    assert "from torch in torch.float32" in str(choice.disagreement(name, wrong, CPU, torch.float16))


@interpreted
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (2, 1025)])
@pytest.mark.parametrize("gelu", [False, True])
def test_interpreter_rounds_rows_as_torch_does(rows: int, width: int, gelu: bool) -> None:
    x = numbers(rows, width) * torch.logspace(-6, 4, rows)[:, None]
    found, scale = kernel("quantize_rows")(x, gelu)
    codes, expected = twins.quantize_rows(x, gelu)
    assert torch.allclose(scale, expected, rtol=1e-6)
    # Where GELU's last bit differs a number at the edge of two codes may fall to the other one.
    assert float((found != codes.float()).float().mean()) <= (0.01 if gelu else 0)


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_interpreter_makes_nan_of_a_row_that_is_not_finite(bad: float) -> None:
    x = numbers(3, 20)
    x[1, 4] = bad
    codes, scale = kernel("quantize_rows")(x)
    numbers_behind = codes * scale
    assert numbers_behind[1].isnan().all()
    assert numbers_behind[[0, 2]].isfinite().all()


@interpreted
def test_interpreter_matches_sources_in_blocks_of_any_size() -> None:
    """Short rows, more than a tile of both, targets of no length, heads side by side in memory."""
    x = numbers(2, 400, 2, 24).transpose(1, 2)
    x[:, :, 7] = 0
    for sources, targets in ((1, 1), (129, 65), (40, 200)):
        generator = torch.Generator().manual_seed(sources)
        own, others = (
            torch.stack([torch.randperm(400, generator=generator)[:many] for _ in range(3)])
            for many in (sources, targets)
        )
        others[0, 0] = 7
        found = kernel("match_blocks")(x, own, others, 1e-6)
        assert torch.equal(found, twins.match_blocks(x, own, others, 1e-6))
    same = torch.ones(1, 1, 80, 16)
    assert kernel("match_blocks")(same, torch.arange(3)[None], torch.arange(75)[None], 1e-6).tolist() == [[[[0] * 3]]]


@interpreted
@pytest.mark.parametrize("dim", [8, 48, 64])
@pytest.mark.parametrize("frames", [1, 3])
def test_interpreter_norms_and_rotates_as_the_layers_do(dim: int, frames: int) -> None:
    layout = TokenLayout(1, frames, (3, 4), 2)
    rope = rope_tables(layout.positions(), dim, 100.0, torch.float32)
    qkv = numbers(2, layout.tokens_per_scene, 3, 5, dim)
    norms = [nn.LayerNorm(dim) for _ in range(2)]
    for seed, norm in enumerate(norms):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(seed + 2))
    given = [(norm.weight.detach(), norm.bias.detach()) for norm in norms]
    found = kernel("rotate_heads")(qkv, *given, 1e-5, rope)
    whole = tuple(table.repeat(frames, 1, 1) for table in rope)
    for part, norm, of in zip(found, norms, qkv.unbind(2)[:2], strict=True):
        expected = apply_rope(norm(of), whole).transpose(1, 2)
        assert part.is_contiguous()
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("queries", "dim"), [(1, 8), (65, 64), (130, 24)])
def test_interpreter_joins_attentions_to_different_keys(queries: int, dim: int) -> None:
    """Heads one after the other or beside each other, as flash attention leaves them; and keys of no weight."""
    q, k, v = (numbers(2, 3, n, dim, seed=i) for i, n in enumerate((queries, 9, 9)))
    halves = [_with_log_sum(q, k[:, :, part], v[:, :, part]) for part in (slice(4), slice(4, None))]
    (first, first_sum), (second, second_sum) = halves
    beside = second.transpose(1, 2).contiguous().transpose(1, 2)
    bias = torch.tensor([0.0] * 4 + [0.7] * 5)
    expected = attend(q, k, v, key_bias=bias)
    logits = q @ k.transpose(-1, -2) * dim**-0.5 + bias
    for one in (second.contiguous(), beside):
        found, total = first.clone(), first_sum.clone()
        kernel("join")(found, total, one, second_sum, 0.7)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(total, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    found, total = first.clone(), torch.full_like(first_sum, -torch.inf)
    kernel("join")(found, total, second, second_sum, 0.0)
    torch.testing.assert_close((found, total), (second, second_sum))


@interpreted
@pytest.mark.parametrize(("chosen", "dim"), [(1, 8), (65, 64), (130, 24)])
@pytest.mark.parametrize("own", [1, 3])
def test_interpreter_picks_keys_and_values(chosen: int, dim: int, own: int) -> None:
    """Heads one after the other or beside each other, channels far from each other, tokens more than once."""
    k, v = numbers(2, 3, 90, dim), numbers(2, 90, 3, dim, seed=1).transpose(1, 2)
    index = torch.randint(90, (own, chosen), generator=torch.Generator().manual_seed(2))
    for given in ((k, v), (v, k), (k.transpose(-1, -2).contiguous().transpose(-1, -2), v)):
        found = kernel("pick")(*given, index)
        assert all(map(torch.equal, found, twins.pick(*given, index)))
        assert all(part.is_contiguous() for part in found)


@interpreted
def test_interpreter_runs_a_block_and_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers hand over what the kernels take, and get the same tokens."""
    block = Block(64, 4, qk_norm=True).eval()
    x, rope = numbers(2, 14, 64), rope_tables(TokenLayout(1, 1, (3, 4), 2).positions(), 16, 100.0, torch.float32)
    ran: list[str] = []

    def chosen(name: str, x: Tensor) -> Callable[..., Any]:
        return lambda *inputs: (ran.append(name), kernel(name)(*inputs))[1]

    with torch.no_grad():
        expected = block(x, AttentionContext("frame", rope=rope))
        monkeypatch.setattr(compiled, "fused", chosen)
        torch.testing.assert_close(block(x, AttentionContext("frame", rope=rope)), expected, rtol=1e-5, atol=1e-5)
    assert ran == ["rotate_heads", "add_norm"]


@interpreted
def test_interpreter_runs_the_matching_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TokenLayout(2, 5, (4, 6), 5)
    split = Split.of(Places.dense(layout, CPU), (12, 2), 0.3, anchor=True)
    x = numbers(2, 3, layout.tokens_per_scene, 8)
    plan = headwise.match(x, split)
    merged = plan.merge(x)
    distance = headwise.deviation(x, plan, merged)
    monkeypatch.setattr(headwise, "fused", lambda name, x: kernel(name))
    assert torch.equal(headwise.match(x, split).group_of, plan.group_of)
    torch.testing.assert_close(headwise.deviation(x, plan, merged), distance, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ what chooses, without Triton


def test_nothing_is_chosen_on_a_cpu_and_a_failure_takes_no_other_kernel_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert all(choice.fused(name, torch.ones(2, 2)) is None for name in choice.NAMES)

    def load(name: str) -> Callable[..., Any]:
        if name == "deviation":
            raise RuntimeError("no compiler\nfound")
        return getattr(twins, name) if name != "add_norm" else lambda x, *rest: (x, x)

    monkeypatch.setattr(choice, "load", load)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    choice._try.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"deviation is not used on cpu: RuntimeError: no compiler"):
        assert choice.why_not("deviation", CPU) == "RuntimeError: no compiler"
    with pytest.warns(RuntimeWarning, match="add_norm is not used on cpu: off by"):
        assert "from torch in torch.float32" in str(choice.why_not("add_norm", CPU))
    assert [choice.why_not(name, CPU) for name in ("rotate_heads", "quantize_rows", "match_blocks")] == [None] * 3
    choice._try.cache_clear()


def test_a_kernel_is_tried_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        choice,
        "load",
        lambda name: lambda *inputs: (seen.append(torch.is_autocast_enabled("cpu")), twins.deviation(*inputs))[1],
    )
    choice._try.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert choice.why_not("deviation", CPU) is None
    choice._try.cache_clear()
    assert seen == [False, False]


def test_layers_that_somebody_listens_to_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So do norms of another kind."""
    chosen: list[str] = []
    monkeypatch.setattr(compiled, "fused", lambda name, x: chosen.append(name))
    x, scale = numbers(2, 5, 16), nn.Identity()
    norm = nn.LayerNorm(16)
    norm.register_forward_hook(lambda *given: None)
    for other in (norm, nn.LayerNorm(16, bias=False), nn.Identity()):
        _, normed = compiled.add_norm(x, x, scale, other)
        assert torch.equal(normed, other(2 * x))
        qkv = numbers(1, 4, 3, 2, 16)
        q, k = compiled.queries_and_keys(qkv, other, nn.LayerNorm(16), None)
        assert torch.equal(q, other(qkv[:, :, 0]))
        assert k.shape == q.shape
    assert chosen == []
    compiled.add_norm(x, x, scale, nn.LayerNorm(16))
    compiled.queries_and_keys(qkv, nn.LayerNorm(16), nn.LayerNorm(16), None)
    assert chosen == ["add_norm", "rotate_heads"]


@pytest.mark.parametrize("listened", [False, True])
def test_gelu_goes_into_the_rounding_of_a_linear_layer(listened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FP8().layer(64, 48, bias=True)
    for name, stored in layer.method.encode(numbers(48, 64, seed=1)).items():
        layer.get_buffer(name).copy_(stored)
    nn.init.zeros_(layer.bias)
    x = numbers(7, 64)
    expected = layer(F.gelu(x))
    assert not layer.takes_gelu(x)
    asked: list[bool] = []
    monkeypatch.setattr(
        fp8, "fused", lambda name, x: lambda rows, gelu: (asked.append(gelu), twins.quantize_rows(rows, gelu))[1]
    )
    if listened:
        layer.register_forward_pre_hook(lambda module, given: None)
    assert torch.equal(compiled.gelu_linear(x, layer), expected)
    assert asked == [not listened]


def test_the_bias_is_added_behind_a_product_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = twins.quantize_rows(numbers(5, 32))
    weight, weight_scale = twins.quantize_rows(numbers(16, 32, seed=1))
    bias, calls = numbers(16, seed=2).bfloat16(), []

    def scaled_mm(
        a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: Any, bias: Any = None
    ) -> Tensor:
        calls.append(bias is not None)
        y = (a.float() * scale_a) @ (b.float() * scale_b)
        return (y if bias is None else y + bias).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    exact = (codes.float() * scale) @ (weight.float() * weight_scale).T + bias
    for missing in (None, "no bias"):
        monkeypatch.setattr(fp8, "missing_bias", lambda kind, index, missing=missing: missing)
        found = fp8.product(codes, scale, weight, weight_scale[:, 0], bias)
        torch.testing.assert_close(found.float(), exact, rtol=2e-2, atol=2e-2)
    assert calls == [True, False]
    assert codes.dtype == E4M3
