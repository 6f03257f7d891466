"""A backbone that no file of the package knows does all that the shipped ones do: one file with its descriptor."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from references import IDLE_KNOBS, NEEDED_KNOBS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import geoaccel
from geoaccel.linears import quantized_linears
from geoaccel.merging import MERGING
from geoaccel.mllm.geometry import geometry_features
from geoaccel.models import BACKBONES, build
from geoaccel.models.weights import load_model, save_model
from geoaccel.precision import cast
from geoaccel.quantization import FP8, W4A16, assert_outputs_differ
from geoaccel.testing import check_merging_method, tiny_network

SIZE = (64, 96)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Known while these tests run: others run over all backbones that the package has."""
    importlib.import_module("third_backbone")
    yield
    BACKBONES._entries.pop("third")
    sys.modules.pop("third_backbone")


@pytest.fixture
def model() -> nn.Module:
    return tiny_network("third")


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(1, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return model(images)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", sorted(MERGING))
def test_every_merging_method_holds_every_rule(name: str) -> None:
    check_merging_method(MERGING[name], ["third"], knobs=NEEDED_KNOBS.get(name), nothing=IDLE_KNOBS.get(name))


@pytest.mark.parametrize("method", [FP8(), W4A16(group_size=16)], ids=str)
@pytest.mark.parametrize("name", [None, *sorted(MERGING)])
def test_both_quantizations_with_every_merging_method(
    model: nn.Module, images: Tensor, tmp_path: Path, method: Any, name: str | None
) -> None:
    merging = None if name is None else MERGING[name](**{"bypass": False, **NEEDED_KNOBS.get(name, {})})  # type: ignore[arg-type]
    merged = run(geoaccel.accelerate(copy.deepcopy(model), merging=merging), images)
    geoaccel.accelerate(model, quantization=method)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == {"pose", "surface.proj"}
    assert len(quantized_linears(model)) == 4 * (2 + 2 * 3)
    save_model(model, tmp_path / "a.safetensors", dtype=torch.float32)
    found = run(geoaccel.accelerate(model, merging=merging), images)
    assert_outputs_differ(found, merged)
    assert all(torch.allclose(found[key], merged[key], rtol=0.5, atol=0.5) for key in found)
    loaded = geoaccel.accelerate(load_model(tmp_path / "a.safetensors"), merging=merging)
    assert same(run(loaded, images), found)


def test_a_file_says_whose_it_is(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a.safetensors", dtype=torch.float32)
    loaded = load_model(tmp_path / "a.safetensors")
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert same(run(loaded, images), run(model, images))
    # And without metadata, by the names of its tensors.
    torch.save(model.state_dict(), tmp_path / "b.pt")
    assert same(run(load_model(tmp_path / "b.pt"), images), run(model, images))
    narrow = load_model(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    kept = {name.partition(".")[0] for name, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert kept == {"pose", "surface"}


def test_a_file_of_a_backbone_that_is_gone_is_one_line(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "a.safetensors", dtype=torch.float32)
    monkeypatch.delitem(BACKBONES._entries, "third")
    with pytest.raises(ValueError, match=r"is a checkpoint of an unknown backbone 'third'; known: .*pi3, ") as caught:
        load_model(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_an_object_of_its_authors_is_adopted(model: nn.Module, images: Tensor) -> None:
    theirs = copy.deepcopy(model)
    theirs.__class__ = type("ThirdNet", (type(model),), {"backbone": None})
    ours = geoaccel.accelerate(theirs, attention="matmul")
    assert type(ours) is type(model)
    assert dict(ours.named_parameters())["eye"] is dict(theirs.named_parameters())["eye"]
    assert same(run(geoaccel.restore(ours), images), run(model, images))


def test_it_reconstructs(model: nn.Module, images: Tensor) -> None:
    scene = geoaccel.reconstruct(images[0], model=geoaccel.accelerate(model, merging="fastvggt", quantization="fp8"))
    assert scene.depth.shape == (3, *SIZE)
    assert scene.points_world.isfinite().all()


def test_hosts_read_its_features(model: nn.Module, images: Tensor) -> None:
    tokens = geometry_features(model, images, points=True, saliency=True)
    assert tokens.grid == (2, 3)
    with torch.no_grad():
        patches = model.layers(images)[-1][0, :, 1:].unflatten(1, (4, 6))  # type: ignore[operator]
    torch.testing.assert_close(tokens.features[0], patches[0, :2, :2].mean((0, 1)))
    torch.testing.assert_close(tokens.features[-1], patches[-1, 2:, 4:].mean((0, 1)))
    assert tokens.xyz is not None
    assert tokens.xyz.isfinite().all()
    assert tokens.scores is not None
    assert tokens.scores.shape == (3 * 2 * 3,)
    first = geometry_features(model, images, layer=0)
    assert not torch.equal(first.features, tokens.features)
    with pytest.raises(ValueError, match="layer=3 does not exist: 3 layers"):
        geometry_features(model, images, layer=3)


def test_it_costs_what_is_counted(model: nn.Module, images: Tensor) -> None:
    model = geoaccel.accelerate(model, attention="matmul").requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(images)
    cost = model.cost(3, SIZE)  # type: ignore[operator]
    assert cost.total == counter.get_total_flops()
    assert model.cost(3, SIZE, ["pose"]).total < cost.total  # type: ignore[operator]
    with pytest.raises(ValueError, match="unknown head 'depth'; this network has: pose, surface"):
        model.cost(3, SIZE, ["depth"])  # type: ignore[operator]


def test_it_is_described_and_built(model: nn.Module) -> None:
    text = str(geoaccel.describe(model))
    assert text.startswith("third: ")
    assert "heads: pose, surface" in text
    assert build("third", pairs=1).config.pairs == 1  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"third takes no keyword 'pair'; known keywords: .* Did you mean 'pairs'"):
        build("third", pair=1)
    assert cast(model, torch.bfloat16).pose.weight.dtype == torch.float32  # type: ignore[union-attr]
