"""Reconstruction: from images to one set of tensors, back to the images' pixels, and the choice of points."""

from __future__ import annotations

import base64
import io
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic_scene import (
    MODES,
    WALL_Z,
    AnalyticModel,
    checked_memory,  # noqa: F401 (a fixture)
    exact_depth,
    load,
    original_intrinsics,
    poses,
)
from PIL import Image
from torch_work import work_of

from geoaccel.cameras import project_points
from geoaccel.images import ImageTransform, load_images
from geoaccel.point_cloud import random_rows
from geoaccel.prediction import _nearest_rotations
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


@pytest.fixture(scope="module", params=MODES)
def scene(request, tmp_path_factory, checked_memory):  # noqa: F811
    """One scene for all tests, which leave it as it is."""
    batch, model = load(tmp_path_factory.mktemp("scene") / "photos", request.param)
    return reconstruct(batch, model=model)


def _from_tensor(change=lambda g: g, count=3, **options):
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * count
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 28, 42, generator=generator)
    return reconstruct(images, model=AnalyticModel(transforms, change=change), **options)


def test_contract(scene):
    frames, height, width = scene.depth.shape
    assert scene.cam_from_world.shape == (frames, 4, 4)
    assert scene.intrinsics.shape == (frames, 3, 3)
    assert scene.points_world.shape == (frames, height, width, 3)
    assert scene.conf.shape == scene.mask.shape == (frames, height, width)
    assert scene.images.shape == (frames, 3, height, width)
    assert scene.names == ["photo_0.png", "photo_1.png", "photo_2.png"]
    for tensor in (scene.cam_from_world, scene.intrinsics, scene.depth, scene.points_world, scene.conf, scene.images):
        assert tensor.dtype == torch.float32
        assert not tensor.is_inference()
    assert torch.equal(scene.mask, torch.stack([t.valid_mask() for t in scene.transforms]))


def test_original_cameras_and_depth_are_the_scenes_own(scene):
    for i, transform in enumerate(scene.transforms):
        size = transform.original_size
        truth = original_intrinsics(size)
        torch.testing.assert_close(scene.original_intrinsics()[i], truth, rtol=1e-5, atol=1e-3)
        depth, exact = scene.original_depth(i), exact_depth(truth, poses(3)[i], size)
        assert depth.shape == size
        assert torch.equal(depth > 0, transform.seen_mask())
        error = (depth - exact).abs()[transform.seen_mask()]
        assert error.median() < 1e-3
        assert (error < 0.05).float().mean() > 0.9  # the rest is the sphere's outline


def test_original_points_lie_on_the_wall_and_project_onto_their_pixels(scene):
    points = scene.original_points(1)
    assert points.shape == (*scene.transforms[1].original_size, 3)
    seen = scene.transforms[1].seen_mask()
    assert torch.equal(points.isfinite().all(-1), seen)
    assert ((points[seen][:, 2] - WALL_Z).abs() < 0.01).float().mean() > 0.5
    pixels, _ = project_points(points[seen], scene.original_intrinsics()[1], scene.cam_from_world[1])
    row, column = seen.nonzero(as_tuple=True)
    torch.testing.assert_close(pixels, torch.stack([column, row], -1) + 0.5, rtol=0, atol=1e-3)


def test_point_cloud_pixels_are_where_the_points_project(scene):
    cloud = scene.point_cloud(conf_percentile=0)
    assert len(cloud) == int(scene.mask.sum())
    assert cloud.kept_share == 1.0
    assert cloud.colors.dtype == torch.uint8
    for i, transform in enumerate(scene.transforms):
        own = cloud.frame == i
        pixels, _ = project_points(cloud.points[own], scene.original_intrinsics()[i], scene.cam_from_world[i])
        assert (pixels - cloud.pixels[own]).abs().max() < 0.01
        height, width = transform.original_size
        # The images' red and green say where in the picture a point was.
        place = cloud.pixels[own] / torch.tensor([width, height])
        assert (cloud.colors[own][:, :2] / 255 - place).abs().max() < 0.02


def test_pixels_of_a_cloud_are_those_of_each_images_own_transform(scene):
    cloud = scene.point_cloud(conf_percentile=20, max_points=500)
    _, row, column = scene.usable(20).nonzero(as_tuple=True)
    rows = random_rows(len(row), 500, 0)
    network = torch.stack([column, row], dim=-1)[rows] + 0.5
    for i, transform in enumerate(scene.transforms):
        own = cloud.frame == i
        assert torch.equal(cloud.pixels[own], transform.pixels_to_original(network[own]))
    only_last = scene.point_cloud(mask=torch.arange(len(scene))[:, None, None].expand_as(scene.mask) == 2)
    assert torch.equal(only_last.pixels, scene.point_cloud().pixels[scene.point_cloud().frame == 2])


def test_the_work_of_a_cloud_grows_as_the_scene():
    few, many = (work_of(_from_tensor(count=frames).point_cloud).elements for frames in (16, 64))
    assert many < 4.2 * few


def test_confidence_filter_keeps_the_surest_share(scene):
    cloud = scene.point_cloud(conf_percentile=40)
    assert cloud.kept_share == pytest.approx(0.6, abs=0.01)
    left_out = int(scene.mask.sum()) - len(cloud)
    everything = scene.conf[scene.mask].sort().values
    assert cloud.conf.min() >= everything[left_out - 1]


def test_equal_confidences_stay_together():
    flat = _from_tensor(lambda g: replace(g, conf=torch.ones_like(g.conf)))
    assert flat.point_cloud(conf_percentile=50).kept_share == 1.0


def test_point_cloud_mask_and_thinning(scene):
    mask = torch.zeros_like(scene.mask)
    mask[1] = True
    only_second = scene.point_cloud(conf_percentile=0, mask=mask)
    assert only_second.frame.unique().tolist() == [1]

    state = torch.get_rng_state()
    thin = scene.point_cloud(max_points=100, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert len(thin) == 100
    assert thin.kept_share == scene.point_cloud().kept_share
    assert torch.equal(thin.points, scene.point_cloud(max_points=100, seed=3).points)
    assert not torch.equal(thin.points, scene.point_cloud(max_points=100, seed=4).points)
    assert (thin.frame.diff() >= 0).all()


def test_point_cloud_refuses_what_makes_no_sense(scene):
    with pytest.raises(ValueError, match=r"conf_percentile=100"):
        scene.point_cloud(conf_percentile=100)
    for count in (0, -5):
        with pytest.raises(ValueError, match=f"max_points={count} is too small"):
            scene.point_cloud(max_points=count)
    for share in ("30", None, True):
        with pytest.raises(ValueError, match=rf"conf_percentile={share!r} is not a number; give one in \[0, 100\)"):
            scene.point_cloud(conf_percentile=share)
    for bound in ("100", 1e5, True):
        with pytest.raises(ValueError, match=f"max_points={bound!r} (is not a whole number|is too small); give 1"):
            scene.point_cloud(max_points=bound)
    with pytest.raises(ValueError, match="no point is left: mask and confidence filter remove every pixel; relax"):
        scene.point_cloud(mask=torch.zeros_like(scene.mask))
    with pytest.raises(ValueError, match="no point is left: no pixel is usable"):
        replace(scene, mask=torch.zeros_like(scene.mask)).point_cloud()
    with pytest.raises(ValueError, match=r"expected \[S, H, W\]"):
        scene.point_cloud(mask=scene.mask[0])


def test_paths_are_read_as_the_model_wants(tmp_path):
    batch, model = load(tmp_path / "photos", "crop")
    from_folder = reconstruct(tmp_path / "photos", model=model)
    assert torch.equal(from_folder.images, batch.images)
    assert [path.name for path in from_folder.paths] == from_folder.names
    assert torch.equal(from_folder.read_original(1), batch.original(1))


def test_memory_is_estimated_first(checked_memory):  # noqa: F811
    checked_memory.clear()
    _from_tensor()
    assert checked_memory == [{"frames": 3, "size": (28, 42), "unread": False}]


def test_what_cannot_fit_is_refused_before_the_second_image_is_read(tmp_path, monkeypatch):
    import geoaccel.images.sources as sources

    batch, model = load(tmp_path / "photos", "crop")
    read, before = [], sources.FilePicture.read
    monkeypatch.setattr(
        sources.FilePicture, "read", lambda self, *given: read.append(self.name) or before(self, *given)
    )

    def refuse(model, *, frames, size, unread):
        raise ValueError(f"{frames} of {size}, unread={unread}")

    monkeypatch.setattr(sys.modules["geoaccel.memory"], "check_memory", refuse)
    size = tuple(batch.images.shape[-2:])
    with pytest.raises(ValueError, match=re.escape(f"{len(batch)} of {size}, unread=True")):
        reconstruct(tmp_path / "photos", model=model)
    assert read == batch.names[:1]


def test_images_stay_float32_whatever_the_weights():
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    model = AnalyticModel(transforms).to(torch.bfloat16)
    assert reconstruct(torch.rand(2, 3, 28, 42), model=model).depth.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3, 28, 42), (2, 3, 0, 42)])
def test_images_without_pixels_are_refused(shape):
    with pytest.raises(ValueError, match="have no pixels; give at least one image"):
        reconstruct(torch.rand(shape), model=AnalyticModel([]))


def test_only_needed_heads_run():
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    model = AnalyticModel(transforms)
    model.heads = ("camera", "depth", "point", "track")
    reconstruct(torch.rand(2, 3, 28, 42), model=model)
    assert model.asked == ["camera", "depth"]
    reconstruct(torch.rand(2, 3, 28, 42), model=model, points="head")
    assert model.asked == ["camera", "depth", "point"]
    model.heads = ("point", "conf", "camera")
    reconstruct(torch.rand(2, 3, 28, 42), model=model)
    assert model.asked == ["point", "conf", "camera"]
    model.heads = ("camera", "depth")
    with pytest.raises(ValueError, match="needs a point head"):
        reconstruct(torch.rand(2, 3, 28, 42), model=model, points="head")


def test_points_of_the_head_are_taken_on_request():
    def shift(g):
        return replace(g, points_world=g.points_world + 7)

    assert torch.equal(_from_tensor(shift).points_world, _from_tensor().points_world)
    head = _from_tensor(shift, points="head").points_world
    torch.testing.assert_close(head, _from_tensor().points_world + 7)


def test_rotations_are_made_exact():
    def roughen(g):
        return replace(g, cam_from_world=g.cam_from_world.bfloat16())

    rotation = _from_tensor(roughen).cam_from_world[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(3, 3, 3), rtol=0, atol=1e-6)
    assert (torch.linalg.det(rotation) > 0).all()


def test_pixels_without_a_prediction_are_masked():
    def spoil(g):
        depth, conf = g.depth.clone(), g.conf.clone()
        depth[0, 0, 3, 4], depth[0, 1, 5, 6], conf[0, 2, 7, 8] = float("nan"), -1.0, float("inf")
        return replace(g, depth=depth, conf=conf)

    scene = _from_tensor(spoil)
    assert (~scene.mask).nonzero().tolist() == [[0, 3, 4], [1, 5, 6], [2, 7, 8]]
    for tensor in (scene.depth, scene.conf, scene.points_world):
        assert tensor.isfinite().all()
    assert scene.original_depth(0)[3, 4] == 0
    assert scene.original_points(0)[3, 4].isnan().all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("depth", "no finite depth"),
        ("cam_from_world", "no finite camera .* 3 of 3"),
        ("intrinsics", "no finite camera"),
    ],
)
def test_broken_predictions_are_named(field, message):
    def spoil(g):
        return replace(g, **{field: torch.full_like(getattr(g, field), float("nan"))})

    with pytest.raises(ValueError, match=message):
        _from_tensor(spoil)


def test_bad_input():
    with pytest.raises(ValueError, match="Did you mean 'depth'"):
        _from_tensor(points="depht")
    model = AnalyticModel([])
    with pytest.raises(ValueError, match=r"uint8 \[3, 3, 28, 28\]; expected one scene"):
        reconstruct(torch.zeros(3, 3, 28, 28, dtype=torch.uint8), model=model)
    with pytest.raises(ValueError, match="expected one scene"):
        reconstruct(torch.zeros(2, 3, 3, 28, 28), model=model)
    pixels = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    for wrong in (pixels * 255, pixels * 2 - 1, pixels * torch.nan):
        with pytest.raises(ValueError, match=r"pixels range from .*; expected finite values in \[0, 1\]"):
            reconstruct(wrong, model=model)
    with pytest.raises(ValueError, match="fps=2 applies only to videos"):
        reconstruct(pixels, model=model, fps=2)
    with pytest.raises(TypeError, match="model is 'vggt-mini'; load it first"):
        reconstruct(pixels, model="vggt-mini")


def test_max_frames_applies_to_tensors():
    transforms = [ImageTransform((28, 42), (28, 42), (1.0, 1.0), (0.0, 0.0))] * 2
    images = torch.rand(5, 3, 28, 42, generator=torch.Generator().manual_seed(0))
    found = reconstruct(images, model=AnalyticModel(transforms), max_frames=2)
    assert torch.equal(found.images, images[[0, 4]])
    with pytest.raises(ValueError, match="max_frames=-1"):
        reconstruct(images, model=AnalyticModel(transforms), max_frames=-1)


def test_poses_are_rotations_even_where_a_model_predicts_a_mirror():
    matrices = torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -0.9])), 2 * torch.eye(3)])
    rotations = _nearest_rotations(matrices)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(3))
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(3, 3, 3))


def test_a_scene_in_three_lines(scene):
    lines = repr(scene).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) < 120
    assert lines[0].startswith("Reconstruction of 3 images, each ")
    assert lines[1].strip() == "photo_0.png, photo_1.png, photo_2.png"
    assert re.fullmatch(r"  depth [\d.]+ to [\d.]+, \d+ % of the pixels usable", lines[2])
    many = replace(scene, names=[f"{i}.jpg" for i in range(3)], mask=torch.zeros_like(scene.mask))
    assert "no depth" in repr(many)


def test_a_scene_in_a_notebook_is_its_contact_sheet():
    scene = _from_tensor()
    shown = scene._repr_html_()
    assert repr(scene).splitlines()[0] in shown
    picture = re.search(r'src="data:image/png;base64,([^"]+)"', shown)
    width, height = Image.open(io.BytesIO(base64.b64decode(picture[1]))).size
    assert width > height > 300


def test_what_holds_tensors_does_not_print_them(scene):
    for thing in (scene, scene.point_cloud(), load_images([np.zeros((60, 80, 3), np.uint8)])):
        assert "tensor(" not in repr(thing)
        assert len(repr(thing)) < 300
