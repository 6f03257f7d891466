"""Procedural scenes: what is rendered must agree with the parameters it was rendered from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, project_points, unproject_depth
from geoaccel.eval.data import synthetic
from geoaccel.eval.data.procedural.orbits import OrbitConfig
from geoaccel.eval.data.procedural.raycast import render
from geoaccel.eval.data.procedural.world import BOX, ELLIPSOID, IS_OBJECT, KINDS, OBJECT_RADIUS, World, draw_worlds
from geoaccel.eval.data.synthetic import SceneBatch, sample_batch, sequence

SEEDS = (0, 7, 1_000_123)


@pytest.fixture(scope="module")
def batch() -> SceneBatch:
    return sample_batch(SEEDS, frames=3, size=(42, 56))


@pytest.fixture(scope="module")
def worlds() -> World:
    return draw_worlds(SEEDS, OrbitConfig())[0]


def implicit(world: World, points: Tensor) -> Tensor:
    """[B, Q, 3] -> [B, Q, N]: below one inside a primitive, one on its surface. In float64, unlike the renderer."""
    matrix = world.from_world.double()
    q = torch.einsum("bnij,bqj->bqni", matrix[..., :3], points.double()) + matrix[:, None, :, :, 3]
    kinds = torch.tensor(KINDS)
    box = q.abs().amax(-1)
    cylinder = torch.maximum(q[..., :2].norm(dim=-1), q[..., 2].abs())
    return torch.where(kinds == ELLIPSOID, q.norm(dim=-1), torch.where(kinds == BOX, box, cylinder))


def test_shapes_and_ranges(batch: SceneBatch) -> None:
    assert batch.images.shape == (3, 3, 3, 42, 56)
    assert batch.depth.shape == batch.mask.shape == batch.valid.shape == (3, 3, 42, 56)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert batch.images.std() > 0.1
    assert batch.depth.isfinite().all()
    assert not (batch.mask & ~batch.valid).any()


def test_cameras_are_cameras(batch: SceneBatch) -> None:
    rotation = batch.cam_from_world[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-6, rtol=0)
    assert (rotation.det() > 0).all()
    assert (batch.intrinsics[..., 0, 2] == 28).all()
    assert (batch.intrinsics[..., 1, 2] == 21).all()
    half_fov = torch.rad2deg(torch.atan(28 / batch.intrinsics[..., 0, 0]))
    assert (half_fov > 20).all()
    assert (half_fov < 35).all()


def test_points_are_the_unprojected_depth(batch: SceneBatch) -> None:
    expected = unproject_depth(batch.depth, batch.intrinsics, batch.cam_from_world)
    torch.testing.assert_close(batch.points_world, expected, atol=1e-5, rtol=0)
    pixels, depth = project_points(batch.points_world.flatten(2, 3), batch.intrinsics, batch.cam_from_world)
    valid = batch.valid.flatten(2)
    torch.testing.assert_close(depth[valid], batch.depth.flatten(2)[valid], atol=1e-4, rtol=0)
    u = torch.arange(56) + 0.5
    assert (pixels[..., 0].unflatten(-1, (42, 56)) - u)[batch.valid].abs().max() < 1e-3


def test_every_point_lies_on_a_surface_and_nothing_lies_before_it(batch: SceneBatch, worlds: World) -> None:
    points = batch.points_world.flatten(1, 3)
    value = implicit(worlds, points)
    on_ground = points[..., 2].abs() < 1e-4
    on_surface = (value - 1).abs().amin(-1) < 1e-3
    valid = batch.valid.flatten(1)
    assert (on_ground | on_surface)[valid].all()
    center = invert_rigid(batch.cam_from_world)[..., None, :3, 3].expand(-1, -1, 42 * 56, -1).flatten(1, 2)
    for share in np.linspace(0.0, 0.99, 12):
        between = center + float(share) * (points - center)
        assert (implicit(worlds, between)[valid] > 0.999).all()
        assert (between[..., 2][valid] > -1e-4).all()


def test_sky_rays_meet_nothing(batch: SceneBatch, worlds: World) -> None:
    far = unproject_depth(torch.full_like(batch.depth, 1.0), batch.intrinsics, batch.cam_from_world).flatten(1, 3)
    center = invert_rigid(batch.cam_from_world)[..., None, :3, 3].expand(-1, -1, 42 * 56, -1).flatten(1, 2)
    sky = ~batch.valid.flatten(1)
    assert sky.float().mean() > 0.05
    far, center, sky = far[:, ::15], center[:, ::15], sky[:, ::15]
    for depth in np.linspace(0.5, 18.0, 40):
        point = center + float(depth) * (far - center)
        assert (implicit(worlds, point)[sky] > 1).all()


def test_the_mask_is_the_object(batch: SceneBatch, worlds: World) -> None:
    share = batch.mask.float().mean((-1, -2))
    assert (share > 0.03).all()
    assert (share < 0.6).all()
    value = implicit(worlds, batch.points_world.flatten(1, 3))
    is_object = value.argmin(-1).apply_(lambda slot: IS_OBJECT[slot]).bool()
    assert is_object[batch.mask.flatten(1)].all()
    assert (batch.points_world[batch.mask][:, :2].norm(dim=-1) < OBJECT_RADIUS + 1e-3).all()


def test_frames_see_the_same_world() -> None:
    """Points of one frame, seen in the next: depth agrees there where they are not hidden, and so does colour."""
    batch = sample_batch(range(4), frames=2, size=(96, 96), orbit=OrbitConfig(span_deg=(15, 15), roll_deg=10))
    points = batch.points_world[:, 0].flatten(1, 2)
    pixels, depth = project_points(points, batch.intrinsics[:, 1], batch.cam_from_world[:, 1])
    column, row = pixels.floor().long().unbind(-1)
    inside = (column >= 0) & (column < 96) & (row >= 0) & (row < 96) & (depth > 0) & batch.valid[:, 0].flatten(1)
    index = (row * 96 + column).clamp(0, 96 * 96 - 1)
    there = batch.depth[:, 1].flatten(1).gather(1, index)
    there = torch.where(there > 0, there, 1e9)[inside]
    depth = depth[inside]
    assert (depth > 1.05 * there).float().mean() < 0.2  # hidden
    assert (depth < 0.95 * there).float().mean() < 0.02  # before the surface seen there: only across an edge
    seen = (depth / there - 1).abs() < 0.02
    colors = [batch.images[:, i].flatten(2).mT for i in range(2)]
    other = colors[1].gather(1, index[..., None].expand(-1, -1, 3))
    difference = (colors[0] - other)[inside][seen].abs()
    assert difference.median() < 0.04
    assert difference.mean() < 0.08


def test_a_scene_is_a_function_of_its_seed(batch: SceneBatch, this_processor: None) -> None:
    alone = sample_batch([SEEDS[1]], frames=3, size=(42, 56))
    for name in ("images", "depth", "mask", "points_world", "intrinsics", "cam_from_world"):
        assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[1]), name
    assert (batch.images[0] - batch.images[1]).abs().mean() > 0.05


def test_more_frames_keep_the_first_ones() -> None:
    few, many = (sample_batch(range(20), frames=n, size=(4, 4)).cam_from_world for n in (3, 8))
    kept = (few == many[:, :3]).flatten(1).all(1)
    azimuth = _azimuth(many)
    ordered = (azimuth.diff(dim=1).remainder(2 * torch.pi) < torch.pi).all(1)
    assert (kept | ordered).all()
    assert 4 <= kept.sum() <= 16


def test_no_direction_is_special() -> None:
    """One frame must not tell its place on the orbit: sky, sun, landmarks and cameras have no mean direction."""
    world, _, _ = draw_worlds(range(2000), OrbitConfig())
    assert world.sky[..., 1:7].mean(0).abs().max() < 0.03
    assert world.light[:, 0, :2].mean(0).abs().max() < 0.05
    feet = world.footprint[world.footprint[..., 2] > 0.01]
    assert feet[:, :2].mean(0).abs().max() < 0.15
    heading = _azimuth(sample_batch(range(300), frames=1, size=(2, 2)).cam_from_world)
    assert max(heading.cos().mean().abs(), heading.sin().mean().abs()) < 0.12


def test_cameras_stay_outside_and_above_ground() -> None:
    seeds = range(5000, 5200)
    for orbit in (OrbitConfig(), OrbitConfig(elevation_deg=(-10, -10)), OrbitConfig(fill=(0.85, 0.85))):
        batch = sample_batch(seeds, frames=8, size=(2, 2), orbit=orbit)
        center = invert_rigid(batch.cam_from_world)[..., :3, 3]
        assert (center[..., 2] > 0.29).all()
        assert (implicit(draw_worlds(seeds, orbit)[0], center) > 1.01).all()


@pytest.mark.parametrize("span", [0.0, 25.0, 90.0])
def test_span_is_what_was_asked_for(span: float) -> None:
    orbit = OrbitConfig(span_deg=(span, span))
    azimuth = _azimuth(sample_batch(range(50), frames=6, size=(2, 2), orbit=orbit).cam_from_world)
    turn = torch.rad2deg((azimuth[:, 1:] - azimuth[:, :1] + torch.pi).remainder(2 * torch.pi) - torch.pi).abs()
    assert turn.max() < span + 1e-3
    assert turn.max() >= 0.8 * span


def test_the_test_scenes_stay_the_same() -> None:
    """Published figures hold for these scenes: whoever changes them must evaluate again."""
    scene = sequence(0, frames=2, size=(28, 28))
    measured = [scene.images.mean(), scene.depth.mean(), scene.mask.float().mean(), *scene.cam_from_world[0, :, 2, 3]]
    expected = (0.404927, 5.130322, 0.142219, 4.738142, 4.888036)
    np.testing.assert_allclose([float(value) for value in measured], expected, rtol=2e-3)


def test_nothing_global_changes() -> None:
    torch.manual_seed(3)
    before, numpy_before, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002
    sample_batch([1], frames=1, size=(8, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002
    assert threads == torch.get_num_threads()


def test_autocast_does_not_blur_geometry(batch: SceneBatch) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sample_batch(SEEDS, frames=3, size=(42, 56))
    assert torch.equal(inside.depth, batch.depth)
    assert torch.equal(inside.cam_from_world, batch.cam_from_world)


def test_one_compilation_serves_all_sizes(monkeypatch: pytest.MonkeyPatch, this_processor: None) -> None:
    from torch._dynamo.testing import CompileCounter  # seconds that every other test is spared

    counter = CompileCounter()
    compiled = torch.compile(render, fullgraph=True, backend=counter)
    monkeypatch.setattr(synthetic, "_compiled", lambda: compiled)
    for num_scenes, frames, size in ((2, 4, (14, 14)), (1, 3, (14, 28)), (4, 2, (8, 8))):
        fused = sample_batch(range(num_scenes), frames=frames, size=size, compile=True)
        plain = sample_batch(range(num_scenes), frames=frames, size=size)
        torch.testing.assert_close(fused.images, plain.images, atol=1e-4, rtol=0)
        torch.testing.assert_close(fused.depth, plain.depth, atol=1e-4, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_cuda_agrees_with_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plain = sample_batch([3, 4], frames=2, size=(56, 56))
    for compile in (False, True):
        fast = sample_batch([3, 4], frames=2, size=(56, 56), device="cuda", compile=compile).to("cpu")
        assert ((fast.depth - plain.depth).abs() > 1e-3).float().mean() < 1e-3
        assert (fast.images - plain.images).abs().mean() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "0 to"),
        ({"frames": 0}, "at least one frame"),
        ({"size": (0, 8)}, "at least one frame"),
    ],
)
def test_bad_requests(changes: dict, message: str) -> None:
    arguments = {"seeds": [0], "frames": 1, "size": (8, 8)} | changes
    with pytest.raises(ValueError, match=message):
        sample_batch(arguments.pop("seeds"), **arguments)


@pytest.mark.parametrize("field", ["span_deg", "elevation_deg", "fov_deg", "fill"])
def test_bad_orbits(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}.*\(low, high\)"):
        OrbitConfig(**{field: (50.0, 10.0)})
    with pytest.raises(ValueError, match=field):
        OrbitConfig(**{field: (0.5, 400.0)})


def _azimuth(cam_from_world: Tensor) -> Tensor:
    center = invert_rigid(cam_from_world)[..., :3, 3]
    return torch.atan2(center[..., 1], center[..., 0])
