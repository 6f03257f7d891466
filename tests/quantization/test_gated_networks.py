"""Calibration of networks whose MLPs are gated, as those of Depth Anything 3's giant are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, Stop
from references import relative_error
from torch import Tensor, nn

from geoaccel.linears import quantized_linears
from geoaccel.models import BACKBONES, build
from geoaccel.quantization import W4A16, TaskSearch, quantize, quantize_compensated, scale_activations
from geoaccel.quantization.calibrate.awq import apply_scale, find_folds
from geoaccel.quantization.calibrate.blocks import find_blocks, running_order
from geoaccel.quantization.calibrate.calibration import Calibration, calibrate
from geoaccel.quantization.calibrate.clip import Clip
from geoaccel.quantization.calibrate.progress import Progress

METHOD = W4A16(group_size=16)
TRUNK = "backbone.pretrained.blocks"
PARTS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gated() -> Iterator[Any]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = build("da3", **{**BACKBONES["da3"].tiny.to_dict(), "swiglu": 1, "layer_scale": 0.5}).eval()
        for parameter in network.parameters():  # biases of zero would hide a scale that is forgotten
            parameter += 0.02 * torch.randn_like(parameter)
        yield network


@pytest.fixture
def batches() -> list[Any]:
    images = [sample(1, 2, 3, 28, 28, seed=seed).sigmoid() for seed in (1, 2)]
    return [lambda image=image: image for image in images]


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def test_every_block_is_found_and_runs_in_its_place(gated: nn.Module, batches: list[Any]) -> None:
    trunk, behind = running_order(gated, batches[0]())
    assert trunk == [f"{TRUNK}.{index}" for index in range(len(gated.get_submodule(TRUNK)))]  # type: ignore[arg-type]
    assert behind == []
    assert [name for name, mlp in find_blocks(gated).items() if "mlp.w12" in mlp] == trunk
    taken = [fold.linear for fold in find_folds(gated) if fold.linear.startswith(TRUNK)]
    assert taken == [f"{name}.{part}" for name in trunk for part in PARTS]


def test_folding_is_exact_through_the_gate(gated: nn.Module, batches: list[Any]) -> None:
    """Powers of two scale without rounding."""
    before = run(gated, batches[0]())
    for number, fold in enumerate(find_folds(gated)):
        scale = sample(gated.get_submodule(fold.linear).in_features, seed=number).exp()  # type: ignore[arg-type]
        apply_scale(gated, fold, scale.log2().round().exp2())
    for key, value in run(gated, batches[0]()).items():
        assert torch.equal(value, before[key]), key


def test_the_last_layer_takes_its_scale_from_the_values(gated: nn.Module) -> None:
    fold = next(fold for fold in find_folds(gated) if fold.linear.endswith("w3"))
    linear, source = (copy.deepcopy(gated.get_submodule(name)) for name in (fold.linear, fold.source))
    scale = sample(linear.in_features).exp()  # type: ignore[arg-type]
    apply_scale(gated, fold, scale)
    now: Any = gated.get_submodule(fold.source)
    gates = len(scale)
    assert fold.source.endswith("w12")
    assert len(now.weight) == 2 * gates
    assert torch.equal(now.weight[:gates], source.weight[:gates])  # type: ignore[index]
    assert torch.equal(now.bias[:gates], source.bias[:gates])  # type: ignore[index]
    torch.testing.assert_close(now.weight[gates:], source.weight[gates:] / scale[:, None])  # type: ignore[index]
    torch.testing.assert_close(now.bias[gates:], source.bias[gates:] / scale)  # type: ignore[index]


@pytest.mark.parametrize("task", [None, TaskSearch(shortlist=1)])
def test_a_search_takes_every_layer_and_changes_nothing_in_float(
    gated: nn.Module, batches: list[Any], task: TaskSearch | None
) -> None:
    before = run(gated, batches[0]())
    method = W4A16(group_size=16, include=(f"{TRUNK}.1.*", f"{TRUNK}.4.*"))
    found = scale_activations(gated, method, batches, task=task)
    assert [scaling.fold.linear for scaling in found.scalings] == [
        f"{TRUNK}.{i}.{part}" for i in (1, 4) for part in PARTS
    ]
    assert all(scaling.error <= 1 for scaling in found.scalings if task is None)
    assert {scaling.exponent > 0 for scaling in found.scalings if scaling.fold.linear.endswith("w3")} == {True}
    for key, value in run(gated, batches[0]()).items():
        assert relative_error(value, before[key]) < 1e-4, key


@pytest.mark.parametrize("scales", [True, False])
def test_calibrated_outputs_are_closer_than_rounded_ones(gated: nn.Module, batches: list[Any], scales: bool) -> None:
    dense, nearest = copy.deepcopy(gated), quantize(copy.deepcopy(gated), METHOD)
    clips = [Clip(str(number), load) for number, load in enumerate(batches)]
    said = calibrate(gated, [METHOD], Calibration(scales=scales), clips, scenes={})["calibration"]
    layers = len(gated.get_submodule(TRUNK)) * len(PARTS)  # type: ignore[arg-type]
    assert len(quantized_linears(gated)) == layers
    assert said["scaled_layers"] == (layers if scales else 0)
    assert said["mean_error_over_nearest"] < 0.8
    wanted = run(dense, batches[0]())["depth"]
    errors = [relative_error(run(model, batches[0]())["depth"], wanted) for model in (gated, nearest)]
    assert errors[0] < errors[1]


def test_an_interrupted_pass_goes_on(gated: nn.Module, batches: list[Any], tmp_path: Path) -> None:
    whole = copy.deepcopy(gated)
    gains = quantize_compensated(whole, METHOD, batches)
    with pytest.raises(Stop):
        quantize_compensated(
            copy.deepcopy(gated), METHOD, batches, progress=Progress(tmp_path, {}), track=Interrupted(3)
        )
    assert 0 < len(list(tmp_path.glob("rounded-*"))) < len(gains)
    assert quantize_compensated(gated, METHOD, batches, progress=Progress(tmp_path, {})) == gains
    ours, theirs = quantized_linears(gated), quantized_linears(whole)
    assert all(torch.equal(layer.dequantize(), theirs[name].dequantize()) for name, layer in ours.items())
