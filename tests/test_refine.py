"""Bundle adjustment of a reconstruction."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from geoaccel.cameras import invert_rigid, project_points
from geoaccel.errors import UserError
from geoaccel.images import ImageTransform
from geoaccel.refine import _adjusted, bundle_adjust, check_refine, check_tracks, with_tracks
from geoaccel.tracks import LEAST_TRACKS, Cameras, Tracks, reprojection_errors, triangulate
from measure_refinement import auc_5, exact_tracks, rendered, spoiled

pycolmap = pytest.importorskip("pycolmap")


@pytest.fixture(scope="module")
def truth():
    return rendered(1003, frames=5, size=112)


@pytest.fixture(scope="module")
def spoiled_scene(truth):
    return replace(spoiled(truth), tracks=exact_tracks(truth))


@pytest.fixture(scope="module")
def adjusted(spoiled_scene):
    return bundle_adjust(spoiled_scene)


def test_exact_tracks_bring_the_cameras_back(truth, spoiled_scene, adjusted):
    scene, done = adjusted
    assert done.changed
    assert done.error_after < 0.1 < done.error_before
    assert 0.1 < done.turned_deg < 5
    assert auc_5(spoiled_scene.cam_from_world, truth.cam_from_world) < 0.8
    assert auc_5(scene.cam_from_world, truth.cam_from_world) == 1
    assert f"{done.error_before:.2f} to {done.error_after:.2f} pixels on {done.held_out} held-out tracks" in str(done)


def test_first_camera_and_scale_stay(spoiled_scene, adjusted):
    before, after = (invert_rigid(scene.cam_from_world)[:, :3] for scene in (spoiled_scene, adjusted[0]))
    torch.testing.assert_close(before[0], after[0], atol=1e-5, rtol=0)
    size = [(centres[:, :, 3] - centres[0, :, 3]).norm(dim=1).sum() for centres in (before, after)]
    torch.testing.assert_close(*size, rtol=1e-4, atol=0)


def test_depth_is_rescaled_image_by_image_and_points_follow(spoiled_scene, adjusted):
    depth = spoiled_scene.depth.clone()
    depth[2] *= 1.3
    scene, done = bundle_adjust(replace(spoiled_scene, depth=depth))
    assert done.changed
    mask = scene.mask[2]
    ratio = scene.depth[2][mask] / adjusted[0].depth[2][mask]
    assert ratio.median() == pytest.approx(1, abs=0.01)
    pixels, z = project_points(scene.points_world[2, 50:51, 60], scene.intrinsics[2], scene.cam_from_world[2])
    torch.testing.assert_close(pixels[0], torch.tensor([60.5, 50.5]), atol=1e-2, rtol=0)
    assert z[0] == pytest.approx(float(scene.depth[2, 50, 60]), rel=1e-4)


def test_known_intrinsics_stay_and_wrong_ones_are_found(truth, spoiled_scene, adjusted):
    fixed, _ = bundle_adjust(spoiled_scene, lens="fixed")
    torch.testing.assert_close(fixed.intrinsics, spoiled_scene.intrinsics)
    wrong = truth.intrinsics.clone()
    wrong[:, [0, 1], [0, 1]] *= 1.05
    scene, done = bundle_adjust(replace(spoiled_scene, intrinsics=wrong, tracks=exact_tracks(truth, count=300)))
    assert done.changed
    assert len(scene.intrinsics[:, 0, 0].unique()) == 1, "what one camera took stays one camera"
    assert scene.intrinsics[0, 0, 0] == pytest.approx(float(truth.intrinsics[0, 0, 0]), rel=0.01)


def test_tracks_of_two_views_tie_no_cameras_together(truth, spoiled_scene):
    """However many they are: each pair of cameras could have a scale of its own."""
    tracks = exact_tracks(truth, count=400)
    first_two = np.concatenate([np.arange(length) < 2 for length in tracks.lengths()])
    tracks, _ = tracks.keep(first_two)
    assert len(tracks) > 200
    scene, done = bundle_adjust(replace(spoiled_scene, tracks=tracks))
    assert not done.changed
    assert "too few for bundle adjustment" in str(done)
    assert torch.equal(scene.cam_from_world, spoiled_scene.cam_from_world)


def test_nothing_is_made_worse(truth, spoiled_scene):
    good = replace(truth, tracks=exact_tracks(truth))
    scene, done = bundle_adjust(good)
    assert not done.changed
    assert scene.cam_from_world is good.cam_from_world
    noise = spoiled_scene.tracks
    assert noise is not None
    shuffled = replace(noise, pixels=np.random.default_rng(0).permutation(noise.pixels))
    scene, done = bundle_adjust(replace(good, tracks=shuffled))
    assert auc_5(scene.cam_from_world, truth.cam_from_world) == 1
    assert "changed nothing" in str(done)


def test_too_few_tracks_to_judge_by(truth):
    few = replace(truth, tracks=exact_tracks(truth, count=30))
    scene, done = bundle_adjust(few)
    assert not done.changed
    assert scene.cam_from_world is few.cam_from_world
    assert "too few" in str(done)


@pytest.mark.parametrize("poor", [0, 2, 4])
def test_an_image_without_tracks_keeps_its_place_among_the_others(truth, spoiled_scene, poor):
    """Centres on a line hold nothing against a turn about it; it was off by 1 degree, as were the others before."""
    tracks = spoiled_scene.tracks
    assert tracks is not None
    given = replace(spoiled_scene, tracks=tracks.keep(tracks.frame != poor)[0])
    scene, done = bundle_adjust(given)
    assert done.changed
    test_first_camera_and_scale_stay(given, (scene, done))
    rest = [i for i in range(5) if i != poor]
    assert auc_5(scene.cam_from_world[rest], truth.cam_from_world[rest]) == 1
    for other in rest:
        ours, theirs = (
            one.cam_from_world[poor, :3, :3] @ one.cam_from_world[other, :3, :3].T for one in (scene, truth)
        )
        assert ((ours @ theirs.T).trace() - 1) / 2 > np.cos(np.radians(2.0))


def test_two_images_with_tracks_of_three(truth):
    """The first stays whichever has none, and nothing breaks where two cameras alone were adjusted."""
    scene = replace(spoiled(truth), tracks=exact_tracks(truth, count=400))
    cameras = Cameras.of(scene)
    pair = scene.tracks.keep(np.isin(scene.tracks.frame, [1, 2]))[0]
    after = _adjusted(cameras, pair, "fixed")
    np.testing.assert_allclose(after.cam_from_world[0], cameras.cam_from_world[0], atol=1e-9)
    size = [np.linalg.norm(one.centres() - one.centres()[0], axis=1).sum() for one in (cameras, after)]
    assert size[0] == pytest.approx(size[1])
    errors = [np.median(reprojection_errors(pair, one, triangulate(pair, one))) for one in (cameras, after)]
    assert errors[1] < 0.1 * errors[0]


def test_what_is_unknown_or_missing_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="unknown refinement 'slam'; known: ba"):
        check_refine("slam")
    with pytest.raises(UserError, match="unknown source of tracks 'guess'"):
        check_tracks("guess")
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    check_refine(None)
    check_tracks("auto")
    for wrong in (lambda: check_refine("ba"), lambda: check_tracks("measure")):
        with pytest.raises(UserError, match=r"needs pycolmap.*pip install 'geoaccel\[refine\]'"):
            wrong()


def test_tracks_of_a_model_without_pycolmap(truth, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert with_tracks(truth, "auto").tracks is None
    assert "are projections" in caplog.text


def test_tracks_where_nothing_can_be_recognised(truth, caplog):
    grey = torch.full((112, 112, 3), 128, dtype=torch.uint8)
    scene = with_tracks(replace(truth, read_original=lambda i: grey), "auto")
    assert scene.tracks is not None
    assert len(scene.tracks) < LEAST_TRACKS
    assert "too few for a COLMAP model" in caplog.text


def test_of_one_image_no_larger_images_are_asked_for(caplog):
    one = rendered(1003, frames=1, size=112)
    assert with_tracks(one, "auto").tracks is not None
    assert "too few" not in caplog.text


def test_masks_hold_for_the_adjustment_and_its_judge(truth, spoiled_scene):
    """What does not move with the cameras, as an overlay, spoils them where it is not left out."""
    tracks = spoiled_scene.tracks
    still = np.random.default_rng(0).uniform([0, 84], [112, 112], (200, 2))
    overlay = Tracks(np.repeat(np.arange(200), 5), np.tile(np.arange(5), 200), still.repeat(5, 0), "an overlay")
    seen = tracks.keep(tracks.pixels[:, 1] < 84)[0]
    both = Tracks(
        *(np.concatenate([getattr(seen, part), getattr(overlay, part) + (len(seen) if part == "track" else 0)])
          for part in ("track", "frame", "pixels")),
        "both",
    )  # fmt: skip
    selected = torch.ones_like(truth.mask)
    selected[:, 84:] = False
    scene, done = bundle_adjust(replace(spoiled_scene, tracks=both, selected=selected))
    assert done.changed
    assert done.tracks == len(seen)
    assert auc_5(scene.cam_from_world, truth.cam_from_world) > 0.95


def test_one_camera_held_in_two_ways_stays_one(truth, spoiled_scene):
    """Each second image is a portrait, the others are landscapes; the focal length is wrong by 5 %."""
    tracks = exact_tracks(truth, count=600)
    sizes = [(84, 112) if i % 2 == 0 else (112, 84) for i in range(5)]
    edges = np.array([(0.0, 14.0) if i % 2 == 0 else (14.0, 0.0) for i in range(5)])
    transforms = [
        ImageTransform(size, (112, 112), (1.0, 1.0), tuple(edge))
        for size, edge in zip(sizes, edges.tolist(), strict=True)
    ]
    pixels, limits = tracks.pixels - edges[tracks.frame], np.array(sizes)[:, ::-1][tracks.frame]
    inside = ((pixels >= 0) & (pixels < limits)).all(1)
    tracks = replace(tracks, pixels=pixels).keep(inside)[0]
    wrong = truth.intrinsics.clone()
    wrong[:, [0, 1], [0, 1]] *= 1.05
    scene, done = bundle_adjust(replace(spoiled_scene, transforms=transforms, intrinsics=wrong, tracks=tracks))
    assert done.changed
    torch.testing.assert_close(scene.intrinsics, scene.intrinsics[:1].expand(5, 3, 3))
    assert scene.intrinsics[0, 0, 0] == pytest.approx(float(truth.intrinsics[0, 0, 0]), rel=0.01)
    assert auc_5(scene.cam_from_world, truth.cam_from_world) == 1
