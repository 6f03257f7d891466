"""What is known of a scene is in its cameras, depth, points and files alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic_scene import AnalyticModel, checked_memory, original_intrinsics  # noqa: F401 (a fixture)
from large_tensors import LargeTensors

from geoaccel.alignment import Similarity
from geoaccel.cameras import invert_rigid, project_points, unproject_depth
from geoaccel.images import ImageTransform
from geoaccel.priors import moved, one_camera, read_distance, with_intrinsics
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")
SIZE = (56, 84)


def blurred(geometry: Any) -> Any:
    """A model that is wrong about focal lengths, by another factor for each image and direction."""
    factors = torch.tensor([[0.8, 1.1], [0.9, 1.3], [1.2, 0.7], [1.05, 1.0]])
    intrinsics = geometry.intrinsics.clone()
    for axis in (0, 1):
        intrinsics[0, :, axis, axis] *= factors[: intrinsics.shape[1], axis]
    return replace(geometry, intrinsics=intrinsics)


def scene(count: int = 4, change: Any = blurred, **options: Any) -> Any:
    transforms = [ImageTransform(SIZE, SIZE, (1.0, 1.0), (0.0, 0.0))] * count
    images = torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    return reconstruct(images, model=AnalyticModel(transforms, change=change), **options)


def projected_onto_their_pixels(result: Any) -> bool:
    cloud = result.point_cloud(conf_percentile=0)
    for i in range(len(result)):
        own = cloud.frame == i
        pixels, _ = project_points(cloud.points[own], result.original_intrinsics()[i], result.cam_from_world[i])
        if (pixels - cloud.pixels[own]).abs().max() > 0.01:
            return False
    return True


def test_true_intrinsics_give_the_true_points_and_stand_in_every_file(tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    truth = scene(change=lambda g: g)
    matrix = original_intrinsics(SIZE)
    numbers = ",".join(str(float(matrix[at])) for at in ((0, 0), (1, 1), (0, 2), (1, 2)))
    predicted, found = scene(), scene(intrinsics=numbers)
    torch.testing.assert_close(found.points_world, truth.points_world, rtol=1e-4, atol=1e-4)
    assert (predicted.points_world - truth.points_world).abs().max() > 0.1
    assert torch.equal(found.depth, predicted.depth)
    assert projected_onto_their_pixels(found)
    found.save(tmp_path / "out", "colmap,nerfstudio,npz")
    model = pycolmap.Reconstruction(str(tmp_path / "out" / "sparse" / "0"))
    assert len(model.cameras) == 1
    (camera,) = model.cameras.values()
    np.testing.assert_allclose(camera.params, [float(n) for n in numbers.split(",")], rtol=1e-6)
    with np.load(tmp_path / "out" / "reconstruction.npz") as arrays:
        np.testing.assert_allclose(arrays["original_intrinsics"], matrix.expand(4, 3, 3), rtol=1e-6)
    document = json.loads((tmp_path / "out" / "transforms.json").read_text())
    assert document["fl_x"] == pytest.approx(float(matrix[0, 0]), rel=1e-6)
    assert not any("fl_x" in frame for frame in document["frames"])


def test_one_camera_for_all_images() -> None:
    predicted = scene().original_intrinsics()
    shared = scene(shared_camera=True)
    found = shared.original_intrinsics()
    assert found.eq(found[:1]).all()
    torch.testing.assert_close(found[0, 0, 0], predicted[:, 0, 0].double().median().float())
    assert float(found[0, 0, 0]) != pytest.approx(float(found[0, 1, 1]))
    both = scene(shared_camera=True, square_pixels=True).original_intrinsics()
    assert both.eq(both[:1]).all()
    assert float(both[0, 0, 0]) == pytest.approx(float(both[0, 1, 1]), rel=1e-6)
    square = scene(square_pixels=True)
    torch.testing.assert_close(square.original_intrinsics()[:, 0, 0], square.original_intrinsics()[:, 1, 1])
    expected = (predicted[:, 0, 0] * predicted[:, 1, 1]).sqrt()
    torch.testing.assert_close(square.original_intrinsics()[:, 0, 0], expected)
    assert projected_onto_their_pixels(shared)
    assert projected_onto_their_pixels(square)


def test_the_known_camera_is_the_shared_one() -> None:
    given = torch.tensor([[90.0, 0, 42], [0, 80.0, 28], [0, 0, 1]])
    found = scene(intrinsics=given, shared_camera=True, square_pixels=True).original_intrinsics()
    torch.testing.assert_close(found, given.expand(4, 3, 3))


def test_a_camera_that_was_turned_upright_is_the_same_one() -> None:
    sizes = [(56, 84), (84, 56), (56, 84)]
    transforms = [
        ImageTransform(size, (84, 84), (1.0, 1.0), ((84 - size[1]) / 2, (84 - size[0]) / 2)) for size in sizes
    ]
    model = AnalyticModel(transforms, change=blurred)
    batch_images = torch.rand(3, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    result = reconstruct(batch_images, model=model)
    result.transforms[:] = transforms
    found = one_camera(result, shared=True).original_intrinsics()
    torch.testing.assert_close(found[0, [0, 1], [0, 1]], found[1, [1, 0], [1, 0]])
    torch.testing.assert_close(found[1, :2, 2], torch.tensor([28.0, 42.0]))
    result.transforms[1] = ImageTransform((60, 60), (84, 84), (1.0, 1.0), (12.0, 12.0))
    with pytest.raises(ValueError, match="84x56 and of 60x60 pixels cannot share one camera"):
        one_camera(result, shared=True)


def test_a_known_centre_stays_where_a_photograph_is_turned() -> None:
    sizes = [(56, 84), (84, 56), (56, 84)]
    transforms = [ImageTransform(size, (84, 84), (1.0, 1.0), (0.0, 0.0)) for size in sizes]
    result = reconstruct(torch.rand(3, 3, 84, 84), model=AnalyticModel(transforms, change=blurred))
    result.transforms[:] = transforms
    known = torch.tensor([True, False, False])
    given = torch.tensor([[90.0, 0, 38], [0, 80.0, 30], [0, 0, 1]]).expand(3, 3, 3)
    for told, of_turned in ((known, (28.0, 42.0)), (~known, (38.0, 30.0))):
        found = one_camera(with_intrinsics(result, given, told), shared=True, known=told).original_intrinsics()
        torch.testing.assert_close(found[[0, 2], :2, 2], torch.tensor([[38.0, 30.0]]).expand(2, 2))
        torch.testing.assert_close(found[1, :2, 2], torch.tensor(of_turned))


def test_a_known_distance_is_the_distance_of_the_cameras() -> None:
    plain, found = scene(), scene(scale="frame_0000,frame_0003.png=125cm")
    before, after = (invert_rigid(s.cam_from_world)[:, :3, 3] for s in (plain, found))
    assert float((after[0] - after[3]).norm()) == pytest.approx(1.25, rel=1e-5)
    factor = found.found["scale"]
    torch.testing.assert_close(after, before * factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.depth, plain.depth * factor)
    assert found.unit == "metre"
    assert projected_onto_their_pixels(found)
    assert scene(scale="frame_0000,frame_0003=7").unit == "that of the given distance"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a.jpg=1m", "give two images and the distance"),
        ("a.jpg,b.jpg", "give two images and the distance"),
        ("a.jpg,b.jpg=far", "give two images and the distance"),
        ("a.jpg,b.jpg=-1m", "must be a positive number"),
        ("a.jpg,b.jpg=nan", "must be a positive number"),
        ("a.jpg,b.jpg=1yd", "unknown unit of length 'yd'"),
        ("a.jpg,a=1m", "names the same image twice"),
        ("a.jpg,q.jpg=1m", "unknown image 'q.jpg'"),
    ],
)
def test_what_is_no_distance(given: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_distance(given, ["a.jpg", "b.jpg", "c,d.jpg"])


def test_names_may_hold_commas_and_units_are_metres() -> None:
    found = read_distance("c,d,a.jpg=10ft", ["a.jpg", "b.jpg", "c,d.jpg"])
    assert (found.first, found.second, found.unit) == (2, 0, "metre")
    assert found.length == pytest.approx(3.048)


def test_images_of_two_cameras_need_their_folders() -> None:
    names = [f"cam{camera}/{i}.jpg" for camera in (0, 1) for i in (0, 1)]
    found = read_distance("cam1/0,rig/cam0/1.jpg=2", names)
    assert (found.first, found.second) == (2, 1)
    for given in ("0,1=1m", "cam0/0,1=1m", "1,cam0/0=1m"):
        with pytest.raises(ValueError, match=r"[01] is ambiguous .cam0/[01].jpg, cam1/[01].jpg.; give the image"):
            read_distance(given, names)


def test_points_are_made_anew_one_frame_after_the_other() -> None:
    """Those of all frames at once in float64, and what lies between, would take more memory than the scene."""
    plain = scene(20, change=lambda g: g)
    plain.depth[3, :5] = 0.0
    empty = plain.depth[..., None] == 0
    with LargeTensors(plain.points_world.nbytes / 2) as made:
        halved = with_intrinsics(plain, plain.intrinsics * torch.tensor([[0.5], [0.5], [1.0]]))
    assert made.count == 1
    points = unproject_depth(plain.depth, halved.intrinsics, plain.cam_from_world)
    assert torch.equal(halved.points_world, points.masked_fill(empty, 0.0))
    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    similarity = Similarity(torch.tensor(1.7), turn, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    with LargeTensors(plain.points_world.nbytes / 2) as made:
        found = moved(plain, similarity, "metre")
    assert made.count == 1
    points = similarity.apply_points(plain.points_world.flatten(0, 2)).float().view_as(plain.points_world)
    assert torch.equal(found.points_world, points.masked_fill(empty, 0.0))


def positions(path: Path, result: Any, wrong: int = 0) -> Any:
    """Of the cameras of a scene, in a world twice as large that is turned, moved, and in parts wrong."""
    turn = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    centres = 2 * invert_rigid(result.cam_from_world.double())[:, :3, 3] @ turn.T + torch.tensor([10.0, 20, 30])
    given = centres.clone()
    given[1 : 1 + wrong] += 5
    lines = [f"{name} {x} {y} {z}" for name, (x, y, z) in zip(result.names, given.tolist(), strict=True)]
    path.write_text("\n".join(lines))
    return centres


@pytest.mark.parametrize("wrong", [0, 2])
def test_known_positions_are_those_of_the_cameras(tmp_path: Path, wrong: int) -> None:
    plain = scene(10, change=lambda g: g)
    expected = positions(tmp_path / "p.txt", plain, wrong)
    found = scene(10, change=lambda g: g, positions=tmp_path / "p.txt")
    centres = invert_rigid(found.cam_from_world.double())[:, :3, 3]
    torch.testing.assert_close(centres, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.depth, 2 * plain.depth, rtol=1e-3, atol=0)
    assert found.unit == "that of the given positions"
    assert list(found.found["positions"]["wrong"]) == plain.names[1 : 1 + wrong]
    assert projected_onto_their_pixels(found)


def test_choices_that_contradict_each_other() -> None:
    for options, says in (
        ({"points": "head", "intrinsics": 90}, "intrinsics cannot change"),
        ({"points": "head", "shared_camera": True}, "shared_camera cannot change"),
        ({"points": "head", "refine": "ba"}, "refine cannot change"),
        ({"scale": "a,b=1", "positions": "p.txt"}, "give one of them"),
        ({"conditions": {"poses": "p.json"}, "poses": "p.json"}, "were both given"),
        ({"size": 28}, "resize these images yourself"),
    ):
        with pytest.raises(ValueError, match=says):
            scene(**options)  # type: ignore[arg-type]
