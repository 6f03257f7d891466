"""Triton kernels against their reference implementations, run by Triton's interpreter: no GPU, no speed measured."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import geoaccel.plan as plan_module
import geoaccel.similarity as similarity_module
from geoaccel.kernels import choice, fp8, fp8_reference
from geoaccel.plan import MergePlan
from geoaccel.quantization import W4A16
from geoaccel.quantization.formats import w4
from geoaccel.similarity import unit

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from geoaccel.kernels import fp8_flash, rounding

# Triton decides for its interpreter when it is imported, which torch may have done before.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1] or "2 skipped" in done.stdout.splitlines()[-1]


@pytest.fixture
def match() -> ModuleType:
    return importlib.import_module("geoaccel.kernels.match")


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@interpreted
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 8), (64, 64, 32), (65, 130, 40), (7, 200, 1), (130, 3, 150)])
def test_matches_are_those_of_torch(match: ModuleType, n: int, m: int, dim: int) -> None:
    source, target = unit(tokens(2, n, dim)), unit(tokens(2, m, dim, seed=1))
    score, where = match.best_match(source, target)
    expected, index = similarity_module.best_match(source, target)
    assert torch.equal(where, index)
    assert torch.allclose(score, expected, atol=1e-6)


@interpreted
def test_of_equal_targets_the_first_wins(match: ModuleType) -> None:
    """Within a tile and across tiles."""
    source = torch.eye(5, 16)[None]
    target = source.repeat(1, 40, 1)
    assert match.best_match(source, target)[1].tolist() == [[0, 1, 2, 3, 4]]
    assert match.best_match(-source, source[:, :1].repeat(1, 150, 1))[1].unique().tolist() == [0]


@interpreted
def test_negative_similarities_are_no_padding(match: ModuleType) -> None:
    source = torch.ones(1, 3, 4) / 2
    score, where = match.best_match(source, -source[:, :1])
    assert score.tolist() == [[-1.0] * 3]
    assert where.tolist() == [[0] * 3]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_are_those_of_torch(match: ModuleType, dtype: torch.dtype) -> None:
    """Groups of all sizes, empty ones, more channels than a tile, rows of different numbers of groups."""
    group_of = torch.tensor([[0, 0, 3, 0, 1, 2, 3, 0, 0], [0, 1, 1, 0, 1, 0, 1, 1, 0]])
    plan, tolerance = MergePlan(group_of, 5), 1e-5 if dtype == torch.float32 else 2**-10
    x = tokens(2, 9, 300).to(dtype)
    flat = x.reshape(-1, 300)
    mean = match.segment_mean(flat, plan._members, plan._starts, plan.counts.flatten()).view(2, 5, 300)
    for row in range(2):
        for group in range(5):
            members = x[row, group_of[row] == group].float()
            expected = members.mean(0) if len(members) else torch.zeros(300)
            assert torch.allclose(mean[row, group].float(), expected, atol=1e-6, rtol=tolerance)
    assert mean.dtype == dtype
    assert torch.allclose(mean, plan.merge(x), atol=1e-6, rtol=tolerance)


@interpreted
def test_plans_and_matching_go_through_them_where_they_are_chosen(
    match: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def spy(name: str) -> None:
        whole = getattr(match, name)
        monkeypatch.setattr(match, name, lambda *inputs: (called.append(name), whole(*inputs))[1])

    spy("best_match"), spy("segment_mean")
    x, target = tokens(2, 3, 20, 8), tokens(2, 3, 9, 8, seed=1)
    plan = MergePlan(torch.arange(20).expand(2, 3, -1) % 6, 6)
    expected = similarity_module.best_match(x, target), plan.merge(x)
    assert not called
    for module in (similarity_module, plan_module):
        monkeypatch.setattr(module, "use_compiled", lambda x: True)
    score, where = similarity_module.best_match(x, target)
    assert torch.allclose(score, expected[0][0], atol=1e-6)
    assert torch.equal(where, expected[0][1])
    assert torch.allclose(plan.merge(x), expected[1], atol=1e-6)
    assert called == ["best_match", "segment_mean"]


@interpreted
def test_the_check_passes_and_notices_kernels_that_are_wrong(
    match: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    # The interpreter multiplies the bits of bfloat16, not the numbers.
    assert choice._disagreement(cpu, torch.float16) is None
    with monkeypatch.context() as patch:
        patch.setattr(
            match, "best_match", lambda a, b: (torch.zeros(a.shape[:2]), torch.zeros(a.shape[:2], dtype=torch.long))
        )
        assert "best match differs" in str(choice._disagreement(cpu, torch.float16))
    right = match.segment_mean
    with monkeypatch.context() as patch:
        patch.setattr(match, "segment_mean", lambda *inputs: right(*inputs) + 0.1)
        assert "means differ" in str(choice._disagreement(cpu, torch.float16))
    nibbles = importlib.import_module("geoaccel.kernels.nibbles")
    decode = nibbles.decode_groups
    monkeypatch.setattr(nibbles, "decode_groups", lambda *inputs: 1.1 * decode(*inputs))
    assert "decoded weights differ" in str(choice._disagreement(cpu, torch.float16))


@interpreted
@pytest.mark.parametrize(("outputs", "inputs", "group_size"), [(5, 256, 128), (17, 300, 32), (1, 7, 8), (9, 1025, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decoded_weights_are_those_of_torch(
    outputs: int, inputs: int, group_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit; odd inputs and a short last group too, and in the layer where the kernel is chosen."""
    layer = W4A16(group_size=group_size).layer(inputs, outputs, bias=False)
    weight = tokens(outputs, inputs)
    for name, stored in layer.method.encode(weight).items():
        layer.get_buffer(name).copy_(stored)
    expected = layer.dequantize(dtype)
    monkeypatch.setattr(w4, "use_compiled", lambda x: True)
    decode = importlib.import_module("geoaccel.kernels.nibbles").decode_groups
    called: list[int] = []
    monkeypatch.setattr("geoaccel.kernels.nibbles.decode_groups", lambda *given: (called.append(1), decode(*given))[1])
    assert torch.equal(layer.dequantize(dtype), expected)
    assert called == [1]
    assert float((expected - weight).abs().max()) < 0.5


@triton.jit
def _round_kernel(x, out, n, TILE: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, rounding.to_e4m3(tl.load(x + at, mask=at < n, other=0.0)), mask=at < n)


@interpreted
def test_rounding_by_arithmetic_is_that_of_torch() -> None:
    """Every number of e4m3, the ties between two of them, and what is just beside a tie."""
    numbers = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 448.0)]
    x = torch.cat([numbers, ties, *beside])
    out = torch.empty_like(x)
    _round_kernel[(triton.cdiv(len(x), 256),)](x, out, len(x), 256)
    assert torch.equal(out, x.to(torch.float8_e4m3fn).float())


@interpreted
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "biases"),
    [(1, 1, 32, None), (128, 64, 64, None), (130, 200, 64, 2), (70, 65, 32, 1), (20, 130, 40, 2), (3, 63, 8, 1)],
)
def test_attention_in_fp8_is_its_emulation(queries: int, keys: int, dim: int, biases: int | None) -> None:
    """Tiles that are full and not, one bias for all sequences and one each, keys of no weight, zeros."""
    q, k, v = (3 * tokens(2, 3, n, dim, seed=seed) for seed, n in enumerate((queries, keys, keys)))
    k[:, 1, -1] = 0
    bias = None if biases is None else tokens(biases, keys, seed=3)
    if bias is not None and keys > 64:
        bias[0, :64] = float("-inf")
    x = fp8_reference.round_operands(q, k, v, bias)
    output = fp8_flash.flash(x, torch.float32, native=False)
    expected = fp8_reference.emulate(x)
    assert float((output - expected).norm() / expected.norm()) < 1e-6


@interpreted
def test_attention_in_fp8_gives_nan_for_nan() -> None:
    q, k, v = (tokens(1, 2, 70, 32, seed=seed) for seed in range(3))
    q[0, 0, 3, 5], v[0, 1, 4, 6] = float("nan"), float("inf")
    x = fp8_reference.round_operands(q, k, v, None)
    output = fp8_flash.flash(x, torch.float16, native=False)
    assert output.dtype == torch.float16
    assert torch.equal(output.isnan(), fp8_reference.emulate(x).isnan())
    assert output.isnan().sum() == 32 + 70


@interpreted
def test_no_query_is_no_work_for_attention_in_fp8() -> None:
    x = fp8_reference.round_operands(tokens(1, 2, 0, 32), tokens(1, 2, 5, 32), tokens(1, 2, 5, 32), None)
    assert fp8_flash.flash(x, torch.float32).shape == (1, 2, 0, 32)


@interpreted
def test_the_check_of_attention_in_fp8_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert fp8._disagreement(cpu, native=False) is None
    right = fp8_flash.flash
    monkeypatch.setattr(fp8_flash, "flash", lambda *inputs, native: 1.05 * right(*inputs, native=native))
    assert fp8._disagreement(cpu, native=False) == "the Triton kernel is off by 5%"


def test_where_they_cannot_run_torch_does_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.why_not(torch.device("cpu")) == "they need a CUDA device"
    assert not choice.use_compiled(torch.ones(1))

    def broken(device: torch.device) -> str | None:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(choice, "_disagreement", broken)
    choice.why_not.cache_clear()
    with pytest.warns(RuntimeWarning, match="not used on cuda:7: RuntimeError: no compiler"):
        assert choice.why_not(torch.device("cuda:7")) == "RuntimeError: no compiler"
    choice.why_not.cache_clear()


@pytest.mark.gpu
def test_compiled_kernels_agree_on_the_gpu() -> None:
    assert choice.why_not(torch.device("cuda:0")) is None
