"""The search by the outputs of the network: its loss, its cached front, its choices, going on after an interruption."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted, Stop
from references import relative_error
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, transform_points, unproject_depth
from geoaccel.models.vggt import VGGT
from geoaccel.quantization import W4A16, TaskSearch, TaskWeights, quantize, scale_activations, task_terms
from geoaccel.quantization.calibrate.blocks import blocks_of, find_blocks, running_order
from geoaccel.quantization.calibrate.prefix import Prefix
from geoaccel.quantization.calibrate.progress import Progress

PLACES = {
    "vggt": ("aggregator.frame_blocks.3.*", "aggregator.global_blocks.1.*", "camera_head.trunk.0.*"),
    "pi3": ("decoder.1.*", "decoder.4.*", "camera_decoder.blocks.0.*"),
    "pi3x": ("decoder.1.*", "decoder.4.*", "camera_decoder.blocks.0.*"),
    "da3": tuple(f"backbone.pretrained.blocks.{index}.*" for index in (1, 4, 7)),
}


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batches() -> list[Any]:
    images = [sample(1, 2, 3, 28, 28, seed=seed).sigmoid() for seed in (1, 2)]
    return [lambda image=image: image for image in images]


@pytest.fixture
def method(tiny: nn.Module) -> W4A16:
    """Three blocks: a search tries every layer several times."""
    return W4A16(group_size=8, include=PLACES[tiny.backbone.name])  # type: ignore[union-attr, index]


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def geometry(frames: int = 3, seed: int = 0) -> Geometry:
    """A scene whose points are exactly its depth unprojected."""
    cameras = torch.eye(4).repeat(1, frames, 1, 1)
    for index in range(frames):
        angle = torch.tensor(0.3 * index)
        cameras[0, index, 0, 0] = cameras[0, index, 2, 2] = angle.cos()
        cameras[0, index, 0, 2], cameras[0, index, 2, 0] = angle.sin(), -angle.sin()
        cameras[0, index, :3, 3] = sample(3, seed=seed + index)
    intrinsics = torch.tensor([[9.0, 0, 4], [0, 9, 3], [0, 0, 1]]).repeat(1, frames, 1, 1)
    depth = 2 + sample(1, frames, 6, 8, seed=seed).sigmoid()
    points = unproject_depth(depth, intrinsics, cameras)
    return Geometry(cam_from_world=cameras, intrinsics=intrinsics, depth=depth, points_world=points, conf=depth)


# ---------------------------------------------------------------------------------------------------- loss


def test_the_same_output_costs_nothing() -> None:
    assert set(task_terms(geometry(), geometry()).values()) == {0.0}


def test_a_change_of_the_world_frame_costs_nothing() -> None:
    dense = geometry()
    turn = geometry(seed=7).cam_from_world[:, 2]  # any rigid motion
    moved = replace(
        dense,
        cam_from_world=dense.cam_from_world @ invert_rigid(turn)[:, None],
        points_world=transform_points(turn, dense.points_world.flatten(1, 3)).view_as(dense.points_world),
    )
    assert all(value < 1e-5 for value in task_terms(moved, dense).values())


def test_each_change_is_seen_by_its_own_terms() -> None:
    dense = geometry()
    depth = replace(dense, depth=dense.depth * 1.1)
    points = replace(dense, points_world=dense.points_world + torch.tensor([0.0, 0.2, 0.0]))
    focal = replace(dense, intrinsics=dense.intrinsics * torch.tensor([1.1, 1.1, 1.0])[:, None])
    cameras = dense.cam_from_world.clone()
    cameras[0, 1, :3, 3] += 0.1
    moved = replace(dense, cam_from_world=cameras)
    terms = {
        name: task_terms(g, dense) for name, g in locals().items() if name in ("depth", "points", "focal", "moved")
    }
    seen = {name: {term for term, value in found.items() if value > 1e-6} for name, found in terms.items()}
    assert seen["depth"] == {"depth", "consistency"}
    assert seen["points"] == {"point", "consistency"}
    assert seen["focal"] == {"camera", "consistency"}
    assert seen["moved"] == {"camera", "consistency"}
    assert terms["focal"]["camera"] == pytest.approx(torch.tensor(1.1).log().item(), rel=1e-4)


def test_terms_do_not_depend_on_the_unit_of_length() -> None:
    def scaled(g: Geometry, factor: float) -> Geometry:
        cameras = g.cam_from_world.clone()
        cameras[..., :3, 3] *= factor
        return replace(g, cam_from_world=cameras, depth=g.depth * factor, points_world=g.points_world * factor)

    dense = geometry()
    other = replace(geometry(seed=3), points_world=dense.points_world)
    small, large = task_terms(other, dense), task_terms(scaled(other, 50.0), scaled(dense, 50.0))
    assert large == pytest.approx(small, rel=1e-3)
    assert all(value > 1e-3 for value in small.values())


def test_agreeing_better_than_the_dense_output_is_no_gain() -> None:
    exact = geometry()
    dense = replace(exact, points_world=exact.points_world + 0.1)
    assert task_terms(exact, dense)["consistency"] > 0.01


def test_pixels_weigh_what_the_dense_model_trusts_them() -> None:
    dense = geometry()
    conf = torch.ones_like(dense.depth)
    conf[..., :3, :] = 0
    off = dense.depth.clone()
    off[..., :3, :] += 1
    unsure = replace(dense, conf=conf)
    assert task_terms(replace(dense, depth=off), unsure)["depth"] == 0
    assert task_terms(replace(dense, depth=off), dense)["depth"] > 0


def test_outputs_that_are_not_finite_are_named() -> None:
    broken = replace(geometry(), depth=geometry().depth / 0)
    with pytest.raises(ValueError, match="NaN or infinite numbers in depth"):
        task_terms(broken, geometry())


def test_terms_are_weighed() -> None:
    weights = TaskWeights(camera=1, depth=2, point=3, consistency=4)
    terms = {"camera": 1.0, "depth": 10.0, "point": 100.0, "consistency": 1000.0}
    assert weights.total(terms) == 4321
    assert TaskWeights().total(terms) == 1012  # depth and points at 0.1, as in the paper's supplement


# --------------------------------------------------------------------------------------------- cached front


def test_blocks_in_the_order_in_which_they_run(tiny: nn.Module, batches: list[Any]) -> None:
    trunk, behind = running_order(tiny, batches[0]())
    only_conditions = ("depth_encoder", "pose_inject_blk", "cam_enc")
    assert sorted([*trunk, *behind]) == sorted(n for n in find_blocks(tiny) if not n.startswith(only_conditions))
    assert behind or tiny.backbone.name == "da3"  # type: ignore[union-attr]  # whose heads are convolutions
    if isinstance(tiny, VGGT):
        first = trunk.index("aggregator.frame_blocks.0")
        assert trunk[first : first + 3] == [
            "aggregator.frame_blocks.0",
            "aggregator.global_blocks.0",
            "aggregator.frame_blocks.1",
        ]
        assert all(name.startswith("camera_head.trunk.") for name in behind)
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_layers_of_a_block_stand_together() -> None:
    groups = blocks_of(dict.fromkeys(["a.0.attn.qkv", "b", "a.0.mlp.fc1", "a.1.attn.proj", "c.2.fc"]))
    assert groups == {
        "a.0": ["a.0.attn.qkv", "a.0.mlp.fc1"],
        "b": ["b"],
        "a.1": ["a.1.attn.proj"],
        "c.2.fc": ["c.2.fc"],
    }


@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_a_finished_front_gives_what_it_did(tiny: nn.Module, batches: list[Any], limit: int) -> None:
    trunk, _ = running_order(tiny, batches[0]())
    expected = [run(tiny, load()) for load in batches]
    calls: list[str] = []
    prefix = Prefix(tiny, trunk, batches, limit_bytes=limit)
    for number, name in enumerate(trunk):
        tiny.get_submodule(name).mlp.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[union-attr]
        prefix.advance()
        calls.clear()
        found = list(prefix.forwards())
        for (images, output), load, wanted in zip(found, batches, expected, strict=True):
            assert torch.equal(images, load())
            assert all(torch.equal(output[key], value) for key, value in wanted.items()), number
        assert bool(calls) == (limit == 1)
    assert prefix.keeping == (limit > 1)
    assert "forward" not in vars(tiny.get_submodule(trunk[0]))


# ------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("task", [None, TaskSearch(shortlist=1)])
def test_a_search_scales_and_changes_nothing_in_float(
    tiny: nn.Module, method: W4A16, batches: list[Any], task: TaskSearch | None
) -> None:
    before = run(tiny, batches[0]())
    found = scale_activations(tiny, method, batches, task=task)
    assert {scaling.fold.linear for scaling in found.scalings} == {
        place.replace("*", part) for place in method.include for part in ("attn.qkv", "attn.proj", "mlp.fc1")
    }
    assert any(scaling.exponent > 0 for scaling in found.scalings)
    for key, value in run(tiny, batches[0]()).items():
        assert relative_error(value, before[key]) < 1e-4, key
    assert set(found.terms) == (set() if task is None else {"rounded", "scaled"})


def test_the_terms_that_are_told_are_those_of_the_result(tiny: nn.Module, method: W4A16, batches: list[Any]) -> None:
    def terms(model: nn.Module) -> dict[str, float]:
        rows = [task_terms(geometry_of(model, load()), truth) for load, truth in zip(batches, dense, strict=True)]
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}

    @torch.no_grad()
    def geometry_of(model: Any, images: Tensor) -> Geometry:
        return model.backbone.geometry(model(images), tuple(images.shape[-2:]))

    dense = [geometry_of(tiny, load()) for load in batches]
    rounded = quantize(copy.deepcopy(tiny), method)
    found = scale_activations(tiny, method, batches, task=TaskSearch(shortlist=2)).terms
    assert found["rounded"] == pytest.approx(terms(rounded), rel=1e-3)
    assert found["scaled"] == pytest.approx(terms(quantize(tiny, method)), rel=1e-3)


def test_choices_follow_the_weights(tiny: nn.Module, method: W4A16, batches: list[Any]) -> None:
    if tiny.backbone.name == "pi3x":  # type: ignore[union-attr]
        pytest.skip("the search goes layer by layer, which on these random weights ends elsewhere")

    def total(weights: TaskWeights) -> dict[str, float]:
        task = TaskSearch(weights, shortlist=3)
        return scale_activations(copy.deepcopy(tiny), method, batches, task=task).terms["scaled"]

    nothing = TaskWeights(0, 0, 0, 0)
    cameras, depth = total(replace(nothing, camera=1e6)), total(replace(nothing, depth=1e6))
    assert cameras["camera"] < depth["camera"]
    assert depth["depth"] < cameras["depth"]
    # Without the task, the candidate with the smallest error of its own is what a layer-by-layer search takes.
    alone = scale_activations(copy.deepcopy(tiny), method, batches, task=TaskSearch(nothing, shortlist=3))
    first = next(scaling for scaling in alone.scalings)
    plain = scale_activations(copy.deepcopy(tiny), method, batches)
    assert first.exponent == next(s for s in plain.scalings if s.fold == first.fold).exponent


def test_an_empty_shortlist_is_refused() -> None:
    with pytest.raises(ValueError, match="shortlist=0 is too small; give at least 1"):
        TaskSearch(shortlist=0)


# ------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("task", [None, TaskSearch(shortlist=1)])
def test_an_interrupted_search_goes_on_and_ends_the_same(
    tiny: nn.Module, method: W4A16, batches: list[Any], tmp_path: Path, task: TaskSearch | None
) -> None:
    whole = copy.deepcopy(tiny)
    expected = scale_activations(whole, method, batches, task=task)
    lines: list[str] = []
    for after in (1, 4, 9):
        with pytest.raises(Stop):
            scale_activations(
                copy.deepcopy(tiny),
                method,
                batches,
                task=task,
                progress=Progress(tmp_path / "p", {"a": 1}),
                track=Interrupted(after),
                report=lines.append,
            )
    progress = Progress(tmp_path / "p", {"a": 1})
    found = scale_activations(tiny, method, batches, task=task, progress=progress, report=lines.append)
    # Every layer was decided once: nothing that was found was looked for again.
    assert len(lines) == len(expected.scalings) == len(set(lines))
    assert [s.exponent for s in found.scalings] == [s.exponent for s in expected.scalings]
    for (name, tensor), other in zip(tiny.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    assert set(progress.read("scales")["exponents"]) == {s.fold.linear for s in found.scalings}
    progress.finish()
    assert not (tmp_path / "p").exists()


def test_batches_that_were_added_up_are_not_run_again(
    tiny: nn.Module, method: W4A16, batches: list[Any], tmp_path: Path
) -> None:
    ran: list[int] = []
    handle = tiny.register_forward_pre_hook(lambda *_: ran.append(1))
    progress = Progress(tmp_path / "p", {})
    with pytest.raises(Stop):
        scale_activations(tiny, method, batches, progress=progress, track=Interrupted(1))
    assert len(ran) == 1
    scale_activations(tiny, method, batches, progress=progress)
    assert len(ran) == 2
    handle.remove()
