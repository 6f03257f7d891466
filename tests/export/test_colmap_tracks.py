"""COLMAP models of measured tracks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from geoaccel.export import colmap, colmap_tracks
from geoaccel.export.colmap_tracks import LEAST_ANGLE, useful_points
from geoaccel.tracks import Cameras, reprojection_errors, triangulate, without_short
from geoaccel.tracks.triangulate import widest_angles
from measure_refinement import exact_tracks, rendered, spoiled


@pytest.fixture(scope="module")
def truth():
    return rendered(1003, frames=4, size=112)


@pytest.fixture(scope="module")
def scene(truth):
    """Wrong cameras, right tracks."""
    return replace(spoiled(truth), tracks=exact_tracks(truth))


@pytest.mark.parametrize("kind", ["colmap", "colmap-text"])
def test_observations_are_what_was_measured(scene, kind, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    scene.save(tmp_path / "out", [kind, "ply"])
    folder = tmp_path / "out" / "sparse" / "0"
    model = pycolmap.Reconstruction(str(folder))
    measured = useful_points(scene)
    assert measured is not None
    tracks = measured.tracks
    assert len(model.points3D) == len(tracks) > 0.9 * len(without_short(scene.tracks, len(scene))) > 100
    assert (folder / "tracks.txt").read_text().startswith(f"measured: {len(tracks)} tracks by truth")
    for n in range(0, len(tracks), 7):
        seen = {
            (element.image_id - 1, *model.images[element.image_id].points2D[element.point2D_idx].xy)
            for element in model.points3D[n + 1].track.elements
        }
        own = tracks.track == n
        assert seen == set(zip(tracks.frame[own].tolist(), *tracks.pixels[own].T.tolist(), strict=True))
    cameras = Cameras.of(scene)
    errors = reprojection_errors(tracks, cameras, triangulate(tracks, cameras))
    assert model.points3D[1].error == pytest.approx(errors[tracks.track == 0].mean(), rel=1e-3)
    assert len(trimesh.load(tmp_path / "out" / "points.ply").vertices) > 10 * len(tracks), "the cloud stays whole"


def test_splats_start_from_the_cloud(scene, tmp_path, monkeypatch):
    monkeypatch.setattr(colmap, "MAX_POINTS", 3000)
    scene.save(tmp_path / "out", ["colmap"])
    file = tmp_path / "out" / "sparse" / "0" / "points3D.ply"
    head = file.read_bytes().split(b"end_header")[0].decode()
    wanted = ["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"]
    assert [line.split()[-1] for line in head.splitlines() if line.startswith("property")] == wanted
    read, cloud = trimesh.load(file), scene.point_cloud().thin(3000)
    assert len(read.vertices) == 3000 > 5 * len(scene.tracks)
    np.testing.assert_array_equal(np.float32(read.vertices), cloud.points.numpy())
    np.testing.assert_array_equal(read.colors[:, :3], cloud.colors.numpy())


def test_a_bundle_can_be_adjusted_to_them(scene, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    scene.save(tmp_path / "out", ["colmap"])
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    before = model.compute_mean_reprojection_error()
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    pycolmap.bundle_adjustment(model, options)
    model.update_point_3d_errors()
    assert before > 0.5
    assert model.compute_mean_reprojection_error() < 0.1 * before


def test_cameras_far_off_can_be_adjusted_too(truth, tmp_path):
    """COLMAP gives points that end behind a camera an error of 1e154, and has a filter for them."""
    pycolmap = pytest.importorskip("pycolmap")
    replace(spoiled(truth, degrees=40, share=0.5), tracks=exact_tracks(truth)).save(tmp_path / "out", ["colmap"])
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    options = pycolmap.BundleAdjustmentOptions()
    options.print_summary = False
    pycolmap.bundle_adjustment(model, options)
    pycolmap.ObservationManager(model).filter_observations_with_negative_depth()
    model.update_point_3d_errors()
    assert model.num_points3D() > 50
    assert model.compute_mean_reprojection_error() < 1e3


def test_no_point_lies_behind_a_camera_that_sees_it(scene):
    turned = scene.cam_from_world.clone()
    turned[1, :3] = turned[1, :3] * turned.new_tensor([-1.0, 1.0, -1.0])[:, None]  # looks the other way
    measured = useful_points(replace(scene, cam_from_world=turned))
    assert measured is not None
    frames = np.bincount(measured.tracks.frame, minlength=len(scene))
    assert frames[1] < 0.1 * np.bincount(scene.tracks.frame)[1]
    assert (frames[[0, 2, 3]] > 50).all(), "what the others see stays"
    cameras = Cameras.of(replace(scene, cam_from_world=turned))
    _, inside = cameras.project(measured.points[measured.tracks.track], measured.tracks.frame)
    assert (inside[:, 2] > 0).all()
    assert np.isfinite(measured.errors).all()


def test_points_of_nearly_parallel_rays_are_left_out(truth, monkeypatch):
    tracks, cameras = without_short(exact_tracks(truth), len(truth)), Cameras.of(truth)
    angles = widest_angles(tracks, cameras, triangulate(tracks, cameras))
    assert angles.min() > LEAST_ANGLE
    bound = float(np.median(angles))
    monkeypatch.setattr(colmap_tracks, "LEAST_ANGLE", bound)
    measured = useful_points(replace(truth, tracks=tracks))
    assert measured is not None
    np.testing.assert_array_equal(measured.tracks.pixels, tracks.where(angles >= bound).pixels)
    monkeypatch.setattr(colmap_tracks, "LEAST_ANGLE", 179.0)
    assert useful_points(replace(truth, tracks=tracks)) is None


@pytest.mark.parametrize("source", ["measured", "projected"])
def test_every_observation_is_one_that_masks_keep(scene, source):
    """The left third of the first image and the upper half of the others."""
    selected = torch.zeros_like(scene.mask)
    selected[0, :, : scene.mask.shape[2] // 3] = selected[1:, : scene.mask.shape[1] // 2] = True
    masked = replace(scene, selected=selected, tracks=scene.tracks if source == "measured" else None)
    model = colmap.build(masked, masked.point_cloud(conf_percentile=0, max_points=500))
    assert model.said.startswith(source)
    assert len(model.points3d) > 50
    for i, transform in enumerate(masked.transforms):
        at = torch.from_numpy(np.stack([model.points2d[i]["x"], model.points2d[i]["y"]], axis=-1))
        column, row = transform.pixels_to_network(at).long().unbind(-1)
        assert len(row) > 20
        assert selected[i, row, column].all()


def test_too_few_tracks_are_no_model(scene):
    few = scene.tracks.where(np.arange(len(scene.tracks)) < 5)
    model = colmap.build(replace(scene, tracks=few), scene.point_cloud(max_points=500))
    assert len(model.points3d) > 50
    assert (model.points3d["track_length"] >= 2).all()
