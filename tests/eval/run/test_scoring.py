"""Scores of predictions whose errors are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from analytic_scene import exact_depth
from pinhole_scenes import exact_geometry, pinhole_scene

from geoaccel.backbone import Geometry, Preprocess
from geoaccel.cameras import invert_rigid
from geoaccel.eval.data.synthetic import SceneBatch, sequence
from geoaccel.eval.metrics.pose_protocols import PairErrors
from geoaccel.eval.run.prepare import Truth, network_input, truth_of
from geoaccel.eval.run.scoring import Protocol, SceneScores, aggregate, relative_chamfer, score_scene

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def scene() -> SceneBatch:
    return sequence(0, frames=3, size=(42, 42))


def truth(scene: SceneBatch) -> Truth:
    return Truth(scene.cam_from_world[0].double(), scene.depth[0], scene.valid[0], scene.points_world[0])


def values(geometry: Geometry, scene: SceneBatch, **options) -> dict[str, float]:
    return score_scene(geometry, truth(scene), **options).values


def perfect(scene: SceneBatch) -> Geometry:
    """The truth at another scale, surest where it is nearest."""
    poses = scene.cam_from_world.clone()
    poses[..., :3, 3] *= 3
    conf = 1 / scene.depth.clamp(min=0.1)
    return Geometry(poses, scene.intrinsics, 3 * scene.depth, 3 * scene.points_world, conf)


def test_the_truth_at_another_scale_is_perfect(scene: SceneBatch) -> None:
    scores = values(perfect(scene), scene)
    assert scores["auc_30"] == scores["auc_3"] == scores["depth_delta_1_25"] == 1
    assert scores["depth_abs_rel"] == pytest.approx(0, abs=1e-5)
    assert scores["chamfer"] == pytest.approx(0, abs=1e-4)


def test_chamfer_is_over_twice_the_root_mean_square_distance_from_the_centre(scene: SceneBatch) -> None:
    """A plane of 8 x 8 points, and one whose points lie alternately a hundredth above and below it."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = torch.stack([rows, columns, torch.zeros(8, 8)], dim=-1)[None]
    bumpy = plane.clone()
    bumpy[..., 2] = 0.01 * (1 - 2 * ((rows + columns) % 2))
    flat = Truth(scene.cam_from_world[0].double(), None, torch.ones(1, 8, 8, dtype=torch.bool), plane)
    found = relative_chamfer(replace(perfect(scene), points_world=bumpy[None]), flat, "head")
    assert found == pytest.approx(0.01 / (2 * 10.5**0.5), rel=1e-3)


def test_the_larger_angle_of_a_pair_counts(scene: SceneBatch) -> None:
    """The last camera is rolled by 20 degrees about its centre: two of three pairs turn, every place stays right."""
    angle = torch.deg2rad(torch.tensor([0.0, 0.0, 20.0]))
    turn = torch.eye(4).repeat(3, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = angle.cos()
    turn[:, 0, 1], turn[:, 1, 0] = -angle.sin(), angle.sin()
    right = perfect(scene)
    scores = values(replace(right, cam_from_world=turn @ right.cam_from_world), scene, points=False)
    assert scores["rotation_median_deg"] == pytest.approx(20, abs=1e-2)
    assert scores["auc_15"] == pytest.approx(1 / 3)
    assert scores["auc_30"] == pytest.approx(1 / 3 + 2 / 3 * 10 / 30, abs=0.03)


def test_depth_and_confidence_errors(scene: SceneBatch) -> None:
    right = perfect(scene)
    depth = right.depth.clone()
    depth[:, 0] *= 1.5
    conf = torch.ones_like(depth)
    conf[:, 0] = 0
    scores = values(replace(right, depth=depth, conf=conf), scene)
    upside_down = values(replace(right, depth=depth, conf=1 - conf), scene)
    assert scores["depth_abs_rel"] > 0.1
    assert scores["chamfer"] > 0.01
    assert scores["conf_spearman"] > 0.5
    assert upside_down["conf_spearman"] == pytest.approx(-scores["conf_spearman"])
    valid = scene.valid[0] & (torch.arange(3)[:, None, None] > 0)  # without the frame that is off
    without = score_scene(replace(right, depth=depth), replace(truth(scene), valid=valid)).values
    assert without["depth_abs_rel"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("mode", "size"), [("crop", (60, 80)), ("pad", (90, 60)), ("crop", (200, 120))])
def test_ground_truth_lands_on_the_pixels_of_the_network(mode: str, size: tuple[int, int]) -> None:
    scene = pinhole_scene(size)
    images, transforms = network_input(scene, Preprocess(mode, 56, 14), resize=True)
    known = truth_of(scene, transforms)
    right = exact_geometry(scene, transforms, images.shape[-2:])
    assert known.depth is not None
    assert known.valid is not None
    inside = torch.stack([t.valid_mask() for t in transforms])
    assert torch.equal(known.valid, inside)
    # The nearest pixel of the map is up to half a pixel away: only the ball's edge differs.
    relative = ((known.depth - right.depth[0]).abs() / right.depth[0])[inside]
    assert relative.median() < 0.004
    assert (relative > 0.05).float().mean() < 0.03
    scored = score_scene(right, known, scene=scene, transforms=transforms)
    assert scored.category == "ball"
    assert scored.values["auc_3"] == 1
    assert scored.values["depth_abs_rel"] < 0.01
    assert scored.values["chamfer"] < 0.01


def test_images_that_are_fed_as_they_are_must_divide_into_patches() -> None:
    images, transforms = network_input(pinhole_scene((56, 84)), Preprocess(), resize=False)
    assert images.shape == (1, 3, 3, 56, 84)
    assert transforms[0].scale == (1, 1)
    with pytest.raises(ValueError, match="80 x 60 pixels are not multiples of the patch size 14"):
        network_input(pinhole_scene((60, 80)), Preprocess(), resize=False)


def test_depth_is_scored_where_only_intrinsics_are_missing() -> None:
    """The lenses of TUM's freiburg1 and 2 distort: no 3x3 matrix, and depth all the same."""
    full = pinhole_scene((56, 56))
    scene = replace(full, frames=tuple(replace(frame, intrinsics=None) for frame in full.frames))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    known = truth_of(scene, transforms)
    right = exact_geometry(full, transforms, (56, 56))
    assert known.points_world is None
    scored = score_scene(right, known, scene=scene, transforms=transforms).values
    assert scored["depth_abs_rel"] == pytest.approx(0, abs=1e-6)
    assert "conf_spearman" in scored
    assert "chamfer" not in scored
    worse = replace(right, depth=right.depth * torch.linspace(1, 2, 56))
    assert score_scene(worse, known, scene=scene, transforms=transforms).values["depth_abs_rel"] > 0.1
    with pytest.raises(ValueError, match="'pi3-points' needs depth and intrinsics"):
        score_scene(right, known, Protocol(points="pi3-points"), scene=scene, transforms=transforms)


def test_cameras_that_stand_still_cost_no_more_than_the_trajectory() -> None:
    full = pinhole_scene((56, 56))
    spot = torch.tensor([0.3, 2.0, -0.1], dtype=torch.float64)
    still = []
    for frame in full.frames:
        world_from_cam = invert_rigid(frame.cam_from_world)
        world_from_cam[:3, 3] = spot
        pose = invert_rigid(world_from_cam).float().double()  # as a file of float32 has it
        depth = exact_depth(frame.intrinsics, pose, (56, 56))
        still.append(replace(frame, cam_from_world=pose, read_depth=lambda d=depth: d))
    scene = replace(full, frames=tuple(still))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    right = exact_geometry(scene, transforms, (56, 56))
    scored = score_scene(right, truth_of(scene, transforms), scene=scene, transforms=transforms).values
    assert scored["auc_3"] == scored["auc_30"] == 1
    assert scored["depth_abs_rel"] == pytest.approx(0, abs=1e-6)
    assert scored["chamfer"] == pytest.approx(0, abs=1e-4)
    assert scored["rpe_rotation_deg"] == pytest.approx(0, abs=1e-3)
    assert not {"ate_rmse", "ate_mean", "ate_median", "ate_scale", "rpe_translation"} & scored.keys()
    moving = score_scene(right, truth_of(full, transforms), scene=full, transforms=transforms).values
    assert {"ate_rmse", "ate_mean", "ate_median", "ate_scale", "rpe_translation"} <= moving.keys()


def test_a_scene_without_depth_is_scored_by_its_poses_alone() -> None:
    full = pinhole_scene((56, 56))
    scene = replace(full, frames=tuple(replace(frame, read_depth=None) for frame in full.frames))
    _, transforms = network_input(scene, Preprocess(), resize=False)
    known = truth_of(scene, transforms)
    scored = score_scene(exact_geometry(full, transforms, (56, 56)), known, scene=scene, transforms=transforms)
    assert scored.values["auc_30"] == 1
    assert not {"depth_abs_rel", "chamfer", "conf_spearman"} & scored.values.keys()


def test_wrong_protocols_are_one_line() -> None:
    for options in ({"pose": "vgt-co3d"}, {"points": "pi3-point"}, {"depth": "meridian"}, {"points_from": "heads"}):
        with pytest.raises(ValueError, match=r"unknown .*; known: "):
            Protocol(**options)


def test_data_sets_are_means_over_categories_and_over_scenes_that_have_a_score() -> None:
    def scene(name: str, category: str, error: float, **values: float) -> SceneScores:
        pairs = PairErrors(torch.tensor([error]), torch.tensor([0.0]), category)
        return SceneScores(name, category, 2, pairs, values)

    rows = [scene("a", "apple", 0.0, x=1.0), scene("b", "apple", 0.0, x=2.0), scene("c", "car", 90.0, y=5.0)]
    scores = aggregate(rows, Protocol())
    assert scores["auc_30"] == 0.5  # two categories, not three scenes
    assert scores["auc_30_pooled"] == pytest.approx(2 / 3)
    assert (scores["x"], scores["y"]) == (1.5, 5.0)
    assert aggregate([], Protocol()) == {}


def test_one_scene_without_a_number_does_not_spoil_the_mean() -> None:
    pairs = PairErrors(torch.tensor([0.0]), torch.tensor([0.0]))
    found = [{"x": 0.4, "z": math.nan}, {"x": math.nan, "y": math.inf}, {"y": 2.0}]
    scores = aggregate([SceneScores("s", None, 2, pairs, values) for values in found], Protocol())
    assert (scores["x"], scores["y"]) == (0.4, 2.0)
    assert math.isnan(scores["z"])
