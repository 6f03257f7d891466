"""Fidelity: nothing changed is exactly perfect, and what was changed by hand is what is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geoaccel.eval.metrics.fidelity as module
from geoaccel.backbone import Geometry
from geoaccel.cameras import scene_size
from geoaccel.eval.metrics.fidelity import (
    fidelity,
    fidelity_per_frame,
)

PERFECT_ONES = {"fidelity_auc_5", "fidelity_auc_30", "fidelity_conf_spearman"}
ERRORS = {
    *(f"fidelity_{what}{which}_deg" for what in ("rotation", "translation") for which in ("", "_mean", "_max")),
    *("fidelity_depth_abs_rel", "fidelity_conf_rel", "fidelity_point_distance", "fidelity_focal"),
    *("fidelity_principal_point", "fidelity_camera_turn_deg", "fidelity_camera_distance"),
}


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Geometry:
    return model.backbone.geometry(model(images), (images.shape[-2], images.shape[-1]))  # type: ignore[union-attr,operator]


def turned(axis: int, degrees: float) -> Tensor:  # [3, 3]
    a, b = [i for i in range(3) if i != axis]
    angle = math.radians(degrees)
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[a, a] = rotation[b, b] = math.cos(angle)
    rotation[a, b], rotation[b, a] = -math.sin(angle), math.sin(angle)
    return rotation


def geometry(frames: int = 3, seed: int = 0) -> Geometry:
    """Cameras on the x axis, one metre apart, looking ahead; 4 x 5 pixels each."""
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4, dtype=torch.float64).repeat(1, frames, 1, 1)
    poses[0, :, 0, 3] = -torch.arange(frames)
    intrinsics = torch.tensor([[100.0, 0, 2.5], [0, 120, 2], [0, 0, 1]]).repeat(1, frames, 1, 1)
    depth = 1 + torch.rand(1, frames, 4, 5, generator=generator)
    points = torch.randn(1, frames, 4, 5, 3, generator=generator)
    return Geometry(poses, intrinsics, depth, points, torch.rand(1, frames, 4, 5, generator=generator))


def turn_middle_camera(scene: Geometry, degrees: float) -> Geometry:
    """About its own centre and its y axis."""
    poses = scene.cam_from_world.clone()
    poses[0, 1, :3] = turned(1, degrees) @ poses[0, 1, :3]
    return replace(scene, cam_from_world=poses)


def assert_perfect(values: dict[str, float]) -> None:
    """Not nearly: exactly."""
    assert values == dict.fromkeys(PERFECT_ONES, 1.0) | dict.fromkeys(ERRORS, 0.0)


def test_the_dense_cameras_are_the_truth() -> None:
    """Where these stand still there is no direction to miss; where only the accelerated ones do, it is lost."""
    moving, still = geometry(), geometry()
    still.cam_from_world[..., :3, 3] = 0
    assert fidelity(moving, still)["fidelity_translation_max_deg"] == 0
    assert fidelity(still, moving)["fidelity_translation_deg"] == 90


def test_a_model_is_exactly_faithful_to_itself(tiny: nn.Module) -> None:
    images = torch.rand(1, 3, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    first, second = predict(tiny, images), predict(tiny, images)
    assert_perfect(fidelity(first, second))
    assert len(fidelity_per_frame(first, second)) == 3
    for frame in fidelity_per_frame(first, second):
        assert len(frame) == 7
        assert set(frame.values()) == {0.0}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.floats(-6, 6))
def test_equal_poses_give_exactly_zero(seed: int, dtype: torch.dtype, exponent: float) -> None:
    """Any rotation, any distance, any rounding: no arc cosine of almost one."""
    generator = torch.Generator().manual_seed(seed)
    scene = geometry(4, seed)
    poses = scene.cam_from_world.clone()
    poses[0, :, :3, :3] = torch.linalg.qr(torch.randn(4, 3, 3, dtype=torch.float64, generator=generator)).Q
    poses[0, :, :3, :3] *= torch.linalg.det(poses[0, :, :3, :3])[:, None, None]
    poses[0, :, :3, 3] = 10**exponent * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    one = replace(scene, cam_from_world=poses.to(dtype), conf=scene.conf.to(dtype))
    assert_perfect(fidelity(one, replace(one, cam_from_world=poses.to(dtype).clone())))
    assert {frame["fidelity_camera_turn_deg"] for frame in fidelity_per_frame(one, one)} == {0.0}


def test_a_turned_camera_is_seen_in_its_pairs() -> None:
    """Pairs 01, 02, 12: rotations x 0 x. The other's direction turns only where the camera is the observer: 0 0 x."""
    x, dense = 6.5, geometry()
    values = fidelity(turn_middle_camera(dense, x), dense)
    expected = {"rotation": x, "rotation_mean": 2 * x / 3, "rotation_max": x}
    expected |= {"translation": 0.0, "translation_mean": x / 3, "translation_max": x}
    for name, angle in expected.items():
        assert values[f"fidelity_{name}_deg"] == pytest.approx(angle, abs=1e-9), name
    assert values["fidelity_auc_30"] == pytest.approx((1 + 2 * 24 / 30) / 3)
    assert values["fidelity_auc_5"] == pytest.approx(1 / 3)
    turns = [frame["fidelity_camera_turn_deg"] for frame in fidelity_per_frame(turn_middle_camera(dense, x), dense)]
    assert turns == pytest.approx([0, x, 0], abs=1e-9)
    for name in ("depth_abs_rel", "point_distance", "focal"):
        assert values[f"fidelity_{name}"] == 0


def test_a_camera_on_the_opposite_side_is_180_degrees_away() -> None:
    """Directions are not folded, as VGGT's evaluation folds them: mirrored is as wrong as can be."""
    dense = geometry()
    poses = dense.cam_from_world.clone()
    poses[0, :, 0, 3] *= -1
    values = fidelity(replace(dense, cam_from_world=poses), dense)
    for which in ("", "_mean", "_max"):
        assert values[f"fidelity_translation{which}_deg"] == 180
        assert values[f"fidelity_rotation{which}_deg"] == 0
    assert values["fidelity_auc_5"] == values["fidelity_auc_30"] == 0


def test_cameras_that_are_farther_apart_are_seen() -> None:
    """Neither an angle, nor depth, nor a point changes; frame i is i metres from where it was."""
    dense = geometry()
    poses = dense.cam_from_world.clone()
    poses[0, :, :3, 3] *= 2
    far = replace(dense, cam_from_world=poses)
    size = float(scene_size(dense.points_world.double().flatten(0, -2)))
    distances = [frame["fidelity_camera_distance"] for frame in fidelity_per_frame(far, dense)]
    assert distances == pytest.approx([0, 1 / size, 2 / size])
    values = fidelity(far, dense)
    assert values["fidelity_camera_distance"] == pytest.approx(1 / size)
    assert [name for name in ERRORS if values[name] > 0] == ["fidelity_camera_distance"]


PLACES = [
    *(("cam_from_world", (0, 1, row, 3)) for row in range(3)),
    *(("intrinsics", (0, 2, row, column)) for row, column in ((0, 0), (1, 1), (0, 2), (1, 2))),
    *((name, (0, 1, 2, 3)) for name in ("depth", "conf")),
    *(("points_world", (0, 1, 2, 3, axis)) for axis in range(3)),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
@pytest.mark.parametrize("amount", [1e-6, 1.0])
def test_whatever_changes_is_no_longer_perfect(name: str, place: tuple[int, ...], amount: float) -> None:
    """Any single number of the answer of three frames, also of cameras that stand in one place."""
    one = geometry()
    still = replace(one, cam_from_world=torch.eye(4, dtype=torch.float64).repeat(1, 3, 1, 1))
    for dense in (one, still):
        changed = getattr(dense, name).clone().double()
        changed[place] += amount
        values = fidelity(replace(dense, **{name: changed}), dense)
        assert [error for error in ERRORS if values[error] > 0], values


@pytest.mark.parametrize("axis", range(3))
def test_a_frame_that_turns_with_no_other_is_no_longer_perfect(axis: int) -> None:
    dense = geometry(frames=1)
    poses = dense.cam_from_world.clone()
    poses[0, 0, :3, :3] = turned(axis, 1e-4)
    values = fidelity(replace(dense, cam_from_world=poses), dense)
    assert values["fidelity_camera_turn_deg"] == pytest.approx(1e-4)


def test_intrinsics_and_confidence_are_relative_to_the_dense_ones() -> None:
    dense = geometry()
    intrinsics, conf = dense.intrinsics.clone(), dense.conf.clone()
    intrinsics[0, 1, 0, 2] += 30  # of a focal length of 100
    intrinsics[0, 1, 1, 2] -= 48  # of 120
    conf[0, 2] *= 1.5
    values = fidelity(replace(dense, intrinsics=intrinsics, conf=conf), dense)
    assert values["fidelity_principal_point"] == pytest.approx(0.5 / 3)
    share = float(dense.conf[0, 2].mean() / dense.conf.mean())
    assert values["fidelity_conf_rel"] == pytest.approx(0.5 * share / 3)


def test_pairs_do_not_see_a_moved_world() -> None:
    dense = geometry()
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :3], world[:3, 3] = turned(2, 50.0), torch.tensor([1.0, 2, 3])
    moved = replace(dense, cam_from_world=dense.cam_from_world @ world)
    values = fidelity(moved, dense)
    assert max(values[f"fidelity_{what}_max_deg"] for what in ("rotation", "translation")) < 1e-9
    turns = [frame["fidelity_camera_turn_deg"] for frame in fidelity_per_frame(moved, dense)]
    assert turns == pytest.approx([50] * 3)


def test_depth_focal_and_points_are_relative_to_the_dense_ones() -> None:
    dense = geometry()
    depth, intrinsics, points = dense.depth.clone(), dense.intrinsics.clone(), dense.points_world.clone()
    depth[0, 1] *= 1.1
    intrinsics[0, 2, 0, 0] *= 0.8
    points[0, 0, ..., 2] += 0.5
    other = replace(dense, depth=depth, intrinsics=intrinsics, points_world=points)
    distance = 0.5 / float(scene_size(dense.points_world.double().flatten(0, -2)))
    expected = {
        "fidelity_depth_abs_rel": [0, 0.1, 0],
        "fidelity_focal": [0, 0, 0.1],  # one of two axes by a fifth
        "fidelity_point_distance": [distance, 0, 0],
    }
    frames, scene = fidelity_per_frame(other, dense), fidelity(other, dense)
    for name, values in expected.items():
        assert [frame[name] for frame in frames] == pytest.approx(values, abs=1e-7), name
        assert scene[name] == pytest.approx(sum(values) / 3, abs=1e-7), name
    assert fidelity(dense, other)["fidelity_depth_abs_rel"] == pytest.approx((1 - 1 / 1.1) / 3)


def test_the_size_of_a_scene() -> None:
    assert scene_size(torch.tensor([[[5.0, 0, 1], [7, 0, 1]], [[0, 4, 0], [0, 0, 0]]])).tolist() == [2, 4]
    assert float(scene_size(torch.zeros(4, 3))) > 0


def test_confidence_is_compared_by_rank() -> None:
    dense = geometry()
    for change, expected in ((torch.exp, 1), (torch.neg, -1)):
        found = fidelity(replace(dense, conf=change(dense.conf)), dense)["fidelity_conf_spearman"]
        assert found == pytest.approx(expected, abs=1e-12)


def test_a_constant_confidence_has_no_order() -> None:
    dense = geometry()
    constant = replace(dense, conf=torch.ones_like(dense.conf))
    for accelerated, reference in ((constant, dense), (dense, constant), (constant, constant)):
        assert set(fidelity(accelerated, reference)) == (PERFECT_ONES | ERRORS) - {"fidelity_conf_spearman"}


def test_only_so_many_pixels_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = geometry()
    conf = dense.conf.clone()
    conf.view(-1)[1::2] = conf.view(-1)[1::2].flip(0)
    other = replace(dense, conf=conf)
    assert fidelity(other, dense)["fidelity_conf_spearman"] < 0.99
    monkeypatch.setattr(module, "MAX_PIXELS", dense.conf.numel() - 1)
    assert fidelity(other, dense)["fidelity_conf_spearman"] == 1


def test_one_frame_has_no_pairs() -> None:
    one = geometry(frames=1)
    assert fidelity(one, one) == {
        "fidelity_depth_abs_rel": 0.0,
        "fidelity_point_distance": 0.0,
        "fidelity_conf_rel": 0.0,
        "fidelity_focal": 0.0,
        "fidelity_principal_point": 0.0,
        "fidelity_camera_turn_deg": 0.0,
        "fidelity_camera_distance": 0.0,
        "fidelity_conf_spearman": 1.0,
    }
    assert len(fidelity_per_frame(one, one)) == 1


@pytest.mark.parametrize("compare", [fidelity, fidelity_per_frame])
def test_only_the_same_scene_can_be_compared(compare: Callable[[Geometry, Geometry], Any]) -> None:
    one = geometry()
    two = Geometry(*(torch.cat([getattr(one, f.name)] * 2) for f in fields(Geometry)))
    for pair in ((one, geometry(frames=2)), (two, two)):
        with pytest.raises(ValueError, match="the same scene"):
            compare(*pair)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f.name for f in fields(Geometry)])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    good = geometry()
    tensor = getattr(good, name).clone()
    tensor.view(-1)[-5] = value
    bad = replace(good, **{name: tensor})
    for pair, who in (((bad, good), "accelerated"), ((good, bad), "dense"), ((bad, bad), "accelerated")):
        for compare in (fidelity, fidelity_per_frame):
            with pytest.raises(ValueError, match=f"the {who} model predicted NaN or infinite numbers in {name}"):
                compare(*pair)
