import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_poses import random_poses, random_rotations, random_similarity, rotation_about

from geoaccel.alignment import Similarity, umeyama
from geoaccel.cameras import project_points
from geoaccel.eval.metrics.geometry import (
    as_poses,
    camera_centers,
    direction_angle_deg,
    fit_scale,
    fit_scale_shift,
    median,
    pair_indices,
    relative_poses,
    rotation_angle_deg,
)

seeds = st.integers(0, 10**6)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("angle", [0.0, 1e-10, 1e-4, 1.0, 45.0, 90.0, 179.0, 179.999999, 180.0])
def test_a_known_rotation_has_exactly_its_angle(axis, angle):
    base = random_rotations(1, torch.Generator().manual_seed(1))[0]
    assert float(rotation_angle_deg(base, base @ rotation_about(axis, angle))) == pytest.approx(angle, abs=1e-13)
    assert float(rotation_angle_deg(torch.eye(3), rotation_about(axis, angle))) == pytest.approx(angle, rel=1e-14)


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_rotation_angle_of_equal_rotations_is_exactly_zero(seed):
    rotation = random_rotations(8, torch.Generator().manual_seed(seed))
    assert (rotation_angle_deg(rotation, rotation) == 0).all()
    rotation = rotation.float()
    assert (rotation_angle_deg(rotation, rotation) == 0).all()


def test_direction_angle():
    x, y = torch.tensor([1.0, 0, 0]), torch.tensor([0, 3.0, 0])
    assert float(direction_angle_deg(x, y)) == 90
    assert float(direction_angle_deg(x, -7 * x)) == 180
    assert float(direction_angle_deg(x, x + 1e-12 * y)) == pytest.approx(3 * 180e-12 / torch.pi)
    vectors = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    assert (direction_angle_deg(vectors, vectors) == 0).all()


def test_pairs_are_ordered():
    i, j = pair_indices(4)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_relative_poses_have_their_direction():
    poses = random_poses(5)
    i, j = pair_indices(5)
    i_from_j = relative_poses(poses)
    torch.testing.assert_close(i_from_j @ poses[j], poses[i])
    torch.testing.assert_close(relative_poses(poses, direction="j_from_i"), torch.linalg.inv(i_from_j))
    torch.testing.assert_close(relative_poses(poses[:, :3]), i_from_j)
    torch.testing.assert_close(relative_poses(torch.stack([poses, poses])), torch.stack([i_from_j, i_from_j]))
    with pytest.raises(ValueError, match="Known: i_from_j, j_from_i"):
        relative_poses(poses, direction="sideways")


def test_poses_that_are_not_rigid_are_refused():
    poses = random_poses(3)
    as_poses(poses.bfloat16())  # as coarse as a model may be
    scaled, mirrored, broken = poses.clone(), poses.clone(), poses.clone()
    scaled[:, :3, :3] *= 1.1
    mirrored[1, :3, 0] *= -1
    broken[2, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="no rotation"):
        as_poses(scaled)
    with pytest.raises(ValueError, match="mirroring"):
        as_poses(mirrored)
    with pytest.raises(ValueError, match=r"gt has NaN or infinite entries in frames \[2\]"):
        as_poses(broken, "gt")
    with pytest.raises(ValueError, match="expected transforms"):
        as_poses(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match=r"\[S, 4, 4\]"):
        as_poses(poses[0])


@given(seeds, st.integers(3, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_umeyama_recovers_a_random_transform(seed, count, with_scale):
    truth = random_similarity(seed)
    if not with_scale:
        truth = Similarity(torch.ones((), dtype=torch.float64), truth.rotation, truth.translation)
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = umeyama(points, truth.apply_points(points), with_scale=with_scale)
    assert (found.matrix() - truth.matrix()).abs().max() < 1e-9


def test_umeyama_in_a_batch_equals_one_by_one():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 4, 3, 7, 3, generator=generator).unbind(0)
    weights = torch.rand(4, 3, 7, generator=generator)
    batch = umeyama(source, target, weights=weights).matrix()
    for b in range(4):
        for c in range(3):
            torch.testing.assert_close(batch[b, c], umeyama(source[b, c], target[b, c], weights=weights[b, c]).matrix())


def test_umeyama_leaves_out_points_of_weight_zero():
    truth = random_similarity(4)
    points = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    target = truth.apply_points(points)
    target[0], target[1, 2] = float("nan"), 1e9
    found = umeyama(points, target, weights=torch.tensor([0.0, 0, 1, 1, 1, 1]))
    assert (found.matrix() - truth.matrix()).abs().max() < 1e-9
    with pytest.raises(ValueError, match="NaN"):
        umeyama(points, target)
    with pytest.raises(ValueError, match="no correspondences"):
        umeyama(points, target, weights=torch.zeros(6))


def test_umeyama_never_mirrors():
    points = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mirrored = points * torch.tensor([-1.0, 1, 1])
    found = umeyama(points, mirrored)
    assert float(torch.linalg.det(found.rotation)) == pytest.approx(1)
    # The scale is the best one for that rotation, which is smaller than for a mirror.
    moved, target = (x - x.mean(0) for x in (points @ found.rotation.T, mirrored))
    assert float(found.scale) == pytest.approx(float((moved * target).sum() / moved.square().sum()))


def test_umeyama_of_degenerate_points_keeps_the_residual_minimal():
    line = torch.arange(4.0)[:, None] * torch.tensor([1.0, 2, 2])
    target = 2 * line @ rotation_about("z", 30).T.float() + 1
    # The target, of about 20, is a product in float32.
    torch.testing.assert_close(umeyama(line, target).apply_points(line), target.double(), rtol=0, atol=1e-5)
    same = umeyama(torch.ones(4, 3), line)
    assert float(same.scale) == 1
    torch.testing.assert_close(same.apply_points(torch.ones(4, 3)), line.double().mean(0).expand(4, 3))


@given(seeds, st.integers(1, 30), st.floats(-8, 8))
@settings(max_examples=40, deadline=None)
def test_coinciding_points_have_no_scale(seed, count, exponent):
    """Whatever their place: its mean is rounded, and that rounding is no spread."""
    generator = torch.Generator().manual_seed(seed)
    same = (10**exponent * torch.randn(3, generator=generator, dtype=torch.float64)).expand(count, 3)
    target = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    found = umeyama(same, target, weights=torch.rand(count, generator=generator, dtype=torch.float64) + 0.1)
    assert float(found.scale) == 1
    assert torch.equal(found.rotation, torch.eye(3, dtype=torch.float64))
    scale, shift = fit_scale_shift(same[:, 0], target[:, 0])
    assert float(scale) == 1
    assert float(shift) == pytest.approx(float(target[:, 0].mean() - same[0, 0]), rel=1e-9, abs=1e-9)


def test_points_that_nearly_coincide_have_a_scale():
    """A millimetre apart, a hundred kilometres from the origin."""
    near = 1e5 + 1e-3 * torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(umeyama(near, 3 * near).scale) == pytest.approx(3, rel=1e-6)
    assert float(fit_scale_shift(near[:, 0], 3 * near[:, 0])[0]) == pytest.approx(3, rel=1e-6)


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_moving_world_and_cameras_together_changes_no_image(seed):
    similarity, poses = random_similarity(seed), random_poses(4, seed)
    points = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    intrinsics = torch.tensor([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]], dtype=torch.float64)
    moved = similarity.apply_poses(poses)
    torch.testing.assert_close(camera_centers(moved), similarity.apply_points(camera_centers(poses)))
    for before, after in zip(poses, moved, strict=True):
        pixels, depth = project_points(points, intrinsics, before)
        moved_pixels, moved_depth = project_points(similarity.apply_points(points), intrinsics, after)
        torch.testing.assert_close(moved_pixels, pixels, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moved_depth, similarity.scale * depth)


def test_scale_and_shift():
    source = torch.tensor([1.0, 2, 3, 4])
    assert float(fit_scale(source, 3 * source)) == 3
    assert float(fit_scale(source, 3 * source, method="least_squares")) == 3
    assert float(fit_scale(source, torch.tensor([2.0, 4, 6, 800]))) == 2  # the median ignores the outlier
    scale, shift = fit_scale_shift(source, 2 * source - 5)
    assert (float(scale), float(shift)) == (2, -5)
    scale, shift = fit_scale_shift(torch.ones(3), torch.tensor([1.0, 2, 6]))
    assert (float(scale), float(shift)) == (1, 2)
    batch = torch.stack([source, 2 * source])
    assert fit_scale(batch, source.expand(2, 4)).tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="no values"):
        fit_scale(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="zero"):
        fit_scale(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="Known: median, least_squares"):
        fit_scale(source, source, method="mean")


def test_median_is_the_middle():
    assert float(median(torch.tensor([3.0, 1, 2]))) == 2
    assert float(median(torch.tensor([4.0, 1, 2, 3]))) == 2.5
    assert median(torch.tensor([[1.0, 5], [2, 2]])).tolist() == [3, 2]
