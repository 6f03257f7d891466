"""Rounding that makes up for its own error: its codes, the pass front to back, going on after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, Stop
from torch import Tensor, nn

from geoaccel.linears import quantized_linears
from geoaccel.quantization import FP8, W4A16, quantize, quantize_compensated
from geoaccel.quantization.calibrate.progress import Progress
from geoaccel.quantization.calibrate.rounding import _gain
from geoaccel.quantization.calibrate.statistics import InputStatistics
from geoaccel.quantization.formats.gptq import compensated_groups, inverse_factor
from geoaccel.quantization.formats.reference import dequantize_groups, quantize_groups


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, inputs: int) -> Tensor:  # [T, K]
    """Inputs that lie near a subspace, as activations do."""
    return sample(tokens, 4, seed=1) @ sample(4, inputs, seed=2) + 0.1 * sample(tokens, inputs, seed=3)


def answer_error(weight: Tensor, x: Tensor, found: tuple[Tensor, Tensor, Tensor], group: int) -> float:
    return float(((dequantize_groups(*found, group) - weight) @ x.T).square().sum())


# ---------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(("inputs", "group"), [(32, 32), (40, 16), (64, 8)])
def test_outputs_are_closer_than_those_of_the_nearest_codes(inputs: int, group: int) -> None:
    weight, x = sample(24, inputs), correlated(200, inputs)
    found = compensated_groups(weight, x.T @ x, group)
    nearest = quantize_groups(weight, group)
    assert [t.shape for t in found] == [t.shape for t in nearest]
    assert [t.dtype for t in found] == [t.dtype for t in nearest]
    assert int(found[0].max()) <= 15
    assert answer_error(weight, x, found, group) < 0.35 * answer_error(weight, x, nearest, group)


def test_inputs_that_know_nothing_of_each_other_give_the_nearest_codes() -> None:
    weight = sample(5, 24)
    for gram in (torch.eye(24), torch.zeros(24, 24), torch.diag(torch.arange(24.0))):
        found = compensated_groups(weight, gram, 8)
        assert all(torch.equal(a, b) for a, b in zip(found, quantize_groups(weight, 8), strict=True))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = correlated(50, 12).double()
    gram = x.T @ x
    factor = inverse_factor(gram)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(12, dtype=torch.float64), atol=1e-8)
    assert torch.equal(factor, factor.triu())


def test_each_column_is_the_nearest_to_what_the_ones_before_have_left() -> None:
    """Against the definition: after each column the others are the least-squares solution for its error."""
    weight, x = sample(3, 6), correlated(40, 6)
    gram = (x.T @ x).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(6)
    codes, scale, zero = compensated_groups(weight, gram, 8)
    left = weight.double().clone()
    for column in range(6):
        rounded = codes[:, column].double() * scale[:, 0].double() + zero[:, 0].double()
        nearest = ((left[:, column] - zero[:, 0].double()) / scale[:, 0].double()).round().clamp(0, 15)
        assert torch.equal(nearest, codes[:, column].double()), column
        off = rounded - left[:, column]
        rest = damped[column + 1 :, column + 1 :]
        if len(rest):
            left[:, column + 1 :] -= torch.linalg.solve(rest, damped[column + 1 :, column])[None] * off[:, None]
        left[:, column] = rounded


def test_an_overflow_in_calibration_is_refused() -> None:
    with pytest.raises(ValueError, match="overflowed during calibration"):
        compensated_groups(sample(2, 8), torch.full((8, 8), torch.inf), 8)


def test_only_methods_with_groups_use_the_inputs() -> None:
    linear, x = nn.Linear(32, 8), correlated(100, 32)
    gram = x.T @ x
    assert not torch.equal(W4A16().quantize(linear, gram=gram).weight_q, W4A16().quantize(linear).weight_q)
    a, b = FP8().quantize(linear, gram=gram), FP8().quantize(linear)
    assert torch.equal(a.weight_q.view(torch.uint8), b.weight_q.view(torch.uint8))


@torch.no_grad()
def test_the_gain_is_over_rounding_to_nearest() -> None:
    linear, x = nn.Linear(32, 8), correlated(100, 32)
    statistics = InputStatistics.empty(32, x.device)
    statistics.add(x)
    assert _gain(linear, W4A16().quantize(linear), statistics) == pytest.approx(1)
    compensated = W4A16().quantize(linear, gram=statistics.gram)
    nearest, found = (x @ (twin.dequantize() - linear.weight).T for twin in (W4A16().quantize(linear), compensated))
    wanted = float(found.square().sum() / nearest.square().sum())
    assert _gain(linear, compensated, statistics) == pytest.approx(wanted, rel=1e-3)


# ------------------------------------------------------------------------------------------- front to back


@pytest.fixture
def batches() -> list[Any]:
    images = [sample(1, 2, 3, 28, 28, seed=seed).sigmoid() for seed in (1, 2)]
    return [lambda image=image: image for image in images]


METHOD = W4A16(group_size=16)

PLACES = {
    "vggt": ("aggregator.global_blocks.1.*", "aggregator.frame_blocks.0.*"),
    "pi3": ("decoder.5.*", "decoder.0.*"),
    "pi3x": ("decoder.5.*", "decoder.0.*"),
    "da3": ("backbone.pretrained.blocks.9.*", "backbone.pretrained.blocks.2.*"),
}
"""By backbone, a late block and an early one behind the encoder."""


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = quantized_linears(a), quantized_linears(b)
    assert set(ours) == set(theirs)
    return all(torch.equal(layer.dequantize(), theirs[name].dequantize()) for name, layer in ours.items())


@torch.no_grad()
def mean_output_error(model: nn.Module, dense: nn.Module, batches: list[Any]) -> float:
    key = "local_points" if "point_decoder" in dict(model.named_children()) else "depth"
    errors = [(model(load())[key] - dense(load())[key]).norm() / dense(load())[key].norm() for load in batches]
    return float(sum(errors)) / len(errors)


def test_all_layers_are_taken_and_outputs_are_closer(tiny: nn.Module, batches: list[Any]) -> None:
    dense, nearest = copy.deepcopy(tiny), quantize(copy.deepcopy(tiny), METHOD)
    gains = quantize_compensated(tiny, METHOD, batches)
    assert set(quantized_linears(tiny)) == set(quantized_linears(nearest)) == set(gains)
    assert sum(gains.values()) / len(gains) < 0.8
    assert mean_output_error(tiny, dense, batches) < mean_output_error(nearest, dense, batches)


def test_later_layers_see_the_outputs_of_quantized_ones(tiny: nn.Module, batches: list[Any]) -> None:
    """Only the last block of the trunk, alone and behind a quantized front: its inputs are not the same."""
    place = PLACES[tiny.backbone.name][0]  # type: ignore[union-attr, index]
    alone, behind = copy.deepcopy(tiny), copy.deepcopy(tiny)
    quantize_compensated(alone, W4A16(group_size=16, include=(place,)), batches)
    quantize_compensated(behind, METHOD, batches)
    name = place.replace("*", "attn.qkv")
    one, other = (model.get_submodule(name).dequantize() for model in (alone, behind))  # type: ignore[operator, union-attr]
    assert not torch.equal(one, other)


def test_methods_side_by_side_and_special_tokens(tiny: nn.Module, batches: list[Any]) -> None:
    protected = PLACES[tiny.backbone.name][1]  # type: ignore[union-attr, index]
    methods = [W4A16(group_size=16, exclude=(protected,)), FP8(include=(protected,), activations=False)]
    mixed, everything = copy.deepcopy(tiny), copy.deepcopy(tiny)
    gains = quantize_compensated(mixed, methods, batches)
    kinds = {layer.method.name for layer in quantized_linears(mixed).values()}
    assert kinds == {"w4a16", "fp8"}
    assert not any(name.startswith(protected[:-1]) for name in gains)
    patches = copy.deepcopy(tiny)
    quantize_compensated(patches, METHOD, batches)
    quantize_compensated(everything, METHOD, batches, patches_only=False)
    assert not same_weights(patches, everything)


def test_no_images(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match="the calibration set is empty"):
        quantize_compensated(tiny, METHOD, [])


def test_an_interrupted_pass_goes_on(tiny: nn.Module, batches: list[Any], tmp_path: Path) -> None:
    whole = copy.deepcopy(tiny)
    gains = quantize_compensated(whole, METHOD, batches)

    with pytest.raises(Stop):
        quantize_compensated(
            copy.deepcopy(tiny), METHOD, batches, progress=Progress(tmp_path, {}), track=Interrupted(3)
        )
    kept = sorted(path.name for path in tmp_path.glob("rounded-*"))
    assert 0 < len(kept) < len(gains)
    stamps = [(tmp_path / name).stat().st_mtime_ns for name in kept]
    assert quantize_compensated(tiny, METHOD, batches, progress=Progress(tmp_path, {})) == gains
    assert [(tmp_path / name).stat().st_mtime_ns for name in kept] == stamps
    assert same_weights(tiny, whole)
