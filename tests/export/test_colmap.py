"""COLMAP models: points on their pixels, tracks that agree, errors that are recorded."""

from __future__ import annotations

import numpy as np
import pytest
from export_scenes import checked_memory, scene, small  # noqa: F401 (fixtures)

from geoaccel.cameras import project_points, quaternion
from geoaccel.export import colmap

pytestmark = pytest.mark.usefixtures("checked_memory")


def _camera_matrix(camera) -> np.ndarray:  # [3, 3]
    fx, fy, cx, cy = camera.params
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


@pytest.mark.parametrize("kind", ["colmap", "colmap-text"])
def test_colmap_points_land_on_their_pixels(scene, kind, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    cloud = scene.save(tmp_path / "out", [kind], max_points=2000, tracks="project")
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))

    assert len(cloud) == 2000
    assert 500 < len(model.points3D) <= 2000
    assert min(point.track.length() for point in model.points3D.values()) == 2
    assert (tmp_path / "out" / "sparse" / "0" / "tracks.txt").read_text().startswith("projected")
    assert sorted(image.name for image in model.images.values()) == scene.names
    assert model.compute_mean_reprojection_error() < 0.01
    for i, transform in enumerate(scene.transforms):
        image = model.images[i + 1]
        camera = model.cameras[image.camera_id]
        assert camera.model.name == "PINHOLE"
        assert (camera.height, camera.width) == transform.original_size
        np.testing.assert_allclose(_camera_matrix(camera), scene.original_intrinsics()[i], atol=1e-3)
        np.testing.assert_allclose(image.cam_from_world().matrix(), scene.cam_from_world[i, :3], atol=1e-6)
        for observation in image.points2D:
            projected = image.project_point(model.points3D[observation.point3D_id].xyz)
            assert np.abs(projected - observation.xy).max() < 0.01
    rows = {tuple(xyz): n for n, xyz in enumerate(cloud.points.double().numpy().tolist())}
    for m in range(1, len(model.points3D) + 1, 97):
        point = model.points3D[m]
        n = rows[tuple(point.xyz)]
        source = point.track.elements[0]
        assert source.image_id == cloud.frame[n] + 1
        observation = model.images[source.image_id].points2D[source.point2D_idx]
        assert observation.point3D_id == m
        np.testing.assert_allclose(observation.xy, cloud.pixels[n], atol=1e-6)
        assert (point.color == cloud.colors[n].numpy()).all()


def test_colmap_text_and_binary_say_the_same(small, tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    small.save(tmp_path / "out", ["colmap", "colmap-text"])
    folder = str(tmp_path / "out" / "sparse" / "0")
    text, binary = pycolmap.Reconstruction(), pycolmap.Reconstruction()
    text.read_text(folder)
    binary.read_binary(folder)
    assert text.num_points3D() == binary.num_points3D()
    for n, point in binary.points3D.items():
        assert (text.points3D[n].xyz == point.xyz).all()
        elements, others = point.track.elements, text.points3D[n].track.elements
        assert [(e.image_id, e.point2D_idx) for e in elements] == [(e.image_id, e.point2D_idx) for e in others]


def test_colmap_names_with_blanks(small, tmp_path, caplog):
    pycolmap = pytest.importorskip("pycolmap")
    small.names[:] = ["a b.png", "c/d.png"]
    small.save(tmp_path / "out", ["colmap", "colmap-text"])
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    assert [model.images[i].name for i in (1, 2)] == ["a b.png", "c/d.png"]
    assert "'a b.png'" in caplog.text


def test_colmap_tracks_join_views_that_agree(small):
    cloud = small.point_cloud(conf_percentile=0)
    model = colmap.build(small, cloud)
    lengths = model.points3d["track_length"]
    assert lengths.sum() == len(model.tracks) == sum(map(len, model.points2d))
    # The scene is exact: all of a view that another camera can see is in both tracks.
    assert (lengths == 2).all()
    assert 0.5 * len(cloud) < len(lengths) < len(cloud)
    assert model.points3d["error"].max() < 1e-3


def test_colmap_leaves_out_views_that_disagree(small):
    cloud = small.point_cloud(conf_percentile=0)
    small.depth[1] *= 1.5
    model = colmap.build(small, cloud)
    from_first = {tuple(point) for point in cloud.points[cloud.frame == 0].double().tolist()}
    assert not from_first & {tuple(point) for point in model.points3d["xyz"].tolist()}


def test_colmap_records_the_error_of_points_off_their_pixels(small):
    cloud = small.point_cloud(conf_percentile=0)
    small.points_world[0, 10, 20, 0] += 1
    moved = small.point_cloud(conf_percentile=0)
    row = int((cloud.points != moved.points).any(-1).nonzero()[0, 0])
    pixels, _ = project_points(moved.points[row : row + 1], small.original_intrinsics()[0], small.cam_from_world[0])
    expected = float((pixels - moved.pixels[row]).norm())
    assert expected > 5
    errors = colmap._reprojection_error(small, moved, small.original_intrinsics().double())
    assert errors[row] == pytest.approx(expected, rel=1e-4)
    recorded = colmap.build(small, moved).points3d["error"]
    assert np.isin(recorded, errors).all()
    assert len(recorded) > 100


@pytest.mark.parametrize("degrees", [0, 1e-4, 90, 120, 179.9999, 180])
def test_quaternions(degrees):
    angle, axis = np.radians(degrees), np.array([1.0, -2.0, 3.0]) / np.sqrt(14)
    cross = np.cross(np.eye(3), axis).T
    rotation = np.eye(3) + np.sin(angle) * cross.T + (1 - np.cos(angle)) * cross @ cross
    w, x, y, z = quaternion(rotation)
    back = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    np.testing.assert_allclose(back, rotation, atol=1e-12)
    assert w >= 0
