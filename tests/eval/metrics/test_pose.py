import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_poses import jitter, poses_from, random_poses, random_similarity, rotation_about, seeds, two_cameras

from geoaccel.eval.metrics.pose import auc, fold, pair_scores, recall, relative_pose_errors
from geoaccel.eval.metrics.trajectories import (
    stands_still,
)


@given(seeds, st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_identity_is_exactly_zero_and_auc_one(seed, count):
    for poses in (random_poses(count, seed), random_poses(count, seed).float(), random_poses(count, seed)[:, :3]):
        for direction in ("i_from_j", "j_from_i", "both"):
            rotation, translation = relative_pose_errors(poses, poses, direction=direction)
            assert len(rotation) == len(translation) == count * (count - 1) // 2
            assert (rotation == 0).all()
            assert (translation == 0).all()
    assert all(auc(rotation, threshold) == 1 for threshold in (3, 5, 15, 30))


@pytest.mark.parametrize("angle", [1e-6, 0.5, 10.0, 90.0, 179.5])
def test_a_known_rotation_gives_exactly_its_angle(angle):
    gt = random_poses(4)
    pred = gt.clone()
    pred[2, :3] = rotation_about("y", angle) @ pred[2, :3]  # camera 2 turns about its own centre
    rotation, translation = relative_pose_errors(pred, gt, fold_translation=False, direction="j_from_i")
    wrong = [1, 3, 5]  # pairs (0, 2), (1, 2), (2, 3)
    torch.testing.assert_close(rotation[wrong], torch.full((3,), angle, dtype=torch.float64), rtol=0, atol=1e-10)
    assert rotation[[0, 2, 4]].max() < 1e-12
    assert translation[[0, 2, 4, 5]].max() < 1e-12  # T_j T_i^-1 of (2, 3) lives in camera 3, which did not turn


def test_translation_angles_folded_and_not():
    gt = two_cameras([1.0, 0, 0])
    sideways = two_cameras([0.0, 0, 1])
    slanted = two_cameras([-1.0, 0, 1])
    backwards = two_cameras([-2.0, 0, 0])
    for pred, folded, unfolded in ((sideways, 90, 90), (slanted, 45, 135), (backwards, 0, 180)):
        assert float(relative_pose_errors(pred, gt)[1]) == pytest.approx(folded, abs=1e-12)
        assert float(relative_pose_errors(pred, gt, fold_translation=False)[1]) == pytest.approx(unfolded)
    assert fold(torch.tensor([0.0, 90, 135, 180])).tolist() == [0, 90, 45, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_without_a_baseline(dtype, this_processor):
    still = two_cameras([0.0, 0, 0], rotation_about("y", 10))
    still[:, :3, 3] += still[:, :3, :3] @ torch.tensor([3.0, 100, 7], dtype=torch.float64)  # both centres far off
    still, moving = still.to(dtype), two_cameras([1.0, 0, 0], rotation_about("y", 10)).to(dtype)
    for fold_translation in (True, False):
        rotation, translation = relative_pose_errors(moving, still, fold_translation=fold_translation)
        assert float(translation) == 0  # nothing to be wrong about
        assert float(rotation) < 1e-4
    assert float(relative_pose_errors(still.double(), still)[1]) == 0
    static = two_cameras([0.0, 0, 0])
    assert float(relative_pose_errors(static, moving)[1]) == 90  # no direction predicted where there is one
    assert float(relative_pose_errors(static, moving, fold_translation=False)[1]) == 90


def turning_on_the_spot(spot, count=4):  # [count, 4, 4], float64
    rotation = torch.stack([rotation_about("y", 10.0 * i) @ rotation_about("x", 3.0 * i) for i in range(count)])
    return poses_from(rotation, torch.tensor([spot], dtype=torch.float64).expand(count, 3))


def as_float32(poses):
    return poses.float().double()


def as_short_text(poses):
    return torch.tensor([float(f"{x:.7g}") for x in poses.flatten().tolist()], dtype=torch.float64).view_as(poses)


@pytest.mark.parametrize("as_stored", [as_float32, as_short_text])
def test_what_a_file_rounds_is_no_motion_although_scenes_are_float64(as_stored):
    still = as_stored(turning_on_the_spot([3.0, 100, 7]))
    wandering = still.clone()
    wandering[:, :3, 3] += torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    for direction in ("i_from_j", "j_from_i", "both"):
        rotation, translation = relative_pose_errors(wandering, still, direction=direction)
        assert (translation == 0).all()
        assert auc(torch.maximum(rotation, translation), 30) == 1
    assert stands_still(still)
    # A millimetre at a hundred metres is motion.
    steps = torch.linspace(0, 3e-3, 4, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0, 0])
    moving, sideways = still.clone(), still.clone()
    moving[:, :3, 3] += (still[:, :3, :3] @ steps[..., None])[..., 0]
    sideways[:, :3, 3] += (still[:, :3, :3] @ steps.flip(-1)[..., None])[..., 0]
    assert not stands_still(moving)
    assert relative_pose_errors(sideways, moving)[1].min() > 70
    # Nor does a prediction move by its rounding: no direction where there is one.
    assert (relative_pose_errors(still, wandering)[1] == 90).all()


@given(seeds, st.sampled_from(["i_from_j", "j_from_i", "both"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_invariance_to_a_similarity_of_either_side(seed, direction, fold_translation):
    gt = random_poses(6, seed)
    pred = jitter(gt, 0.1, seed)
    options = {"direction": direction, "fold_translation": fold_translation}
    expected = relative_pose_errors(pred, gt, **options)
    moved = relative_pose_errors(
        random_similarity(seed).apply_poses(pred), random_similarity(seed + 1).apply_poses(gt), **options
    )
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-7)


def test_bad_poses_are_refused():
    poses = random_poses(3)
    broken = poses.clone()
    broken[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"pred has NaN or infinite entries in frames \[1\]"):
        relative_pose_errors(broken, poses)
    with pytest.raises(ValueError, match="gt has NaN"):
        relative_pose_errors(poses, broken)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        relative_pose_errors(poses[:1], poses[:1])
    with pytest.raises(ValueError, match="same S"):
        relative_pose_errors(poses, poses[:2])


def test_poses_may_be_arrays_of_any_precision():
    poses = random_poses(4)
    expected = relative_pose_errors(jitter(poses, 0.1), poses)
    torch.testing.assert_close(relative_pose_errors(jitter(poses, 0.1).numpy(), poses.numpy()), expected)
    rotation, translation = relative_pose_errors(poses.bfloat16(), poses)
    assert max(rotation.max(), translation.max()) < 2


def brute_force_auc(errors, threshold):
    """Integrate the recall curve with 1-degree bins, bin by bin, pair by pair."""
    area = 0.0
    for upper in range(1, threshold + 1):
        hits = sum(1 for e in errors if e < upper or (upper == threshold and e == threshold))
        area += hits / len(errors)
    return area / threshold


def histogram_auc(errors, threshold):  # the recipe of the VGGT paper's evaluation
    counts, _ = np.histogram(errors, bins=np.arange(threshold + 1))
    return (counts.cumsum() / len(errors)).mean()


@given(
    st.lists(st.one_of(st.floats(0, 200), st.integers(0, 40), st.just(float("inf"))), min_size=1, max_size=60),
    st.sampled_from([1, 3, 5, 15, 30]),
)
@settings(max_examples=200, deadline=None)
def test_auc_equals_the_integral_of_the_recall_curve(errors, threshold):
    errors = torch.tensor(errors, dtype=torch.float64)
    assert auc(errors, threshold) == pytest.approx(brute_force_auc(errors.tolist(), threshold), abs=1e-12)
    assert auc(errors, threshold) == pytest.approx(histogram_auc(errors.numpy(), threshold), abs=1e-12)


def test_auc_in_the_head():
    assert auc(torch.zeros(5), 30) == 1
    assert auc(torch.tensor([100.0]), 30) == 0
    assert auc(torch.tensor([0.5, 100.0]), 30) == 0.5
    assert auc(torch.tensor([1.5]), 3) == pytest.approx(2 / 3)  # missed by the first of three bins
    assert auc([2.0], 3) == pytest.approx(1 / 3)
    assert auc([3.0], 3) == pytest.approx(1 / 3)  # the last bin includes its edge
    for bad in ([], [float("nan")], [-1.0]):
        with pytest.raises(ValueError, match="errors"):
            auc(torch.tensor(bad), 30)
    for threshold in (0, 2.5):
        with pytest.raises(ValueError, match="whole number"):
            auc(torch.zeros(1), threshold)


def test_recall_and_pair_scores():
    rotation, translation = torch.tensor([1.0, 4, 20, 2]), torch.tensor([0.0, 8, 1, 40])
    assert recall(rotation, 5) == 0.75
    assert recall(rotation, 4) == recall(rotation, 2.5) == 0.5  # below, not at the threshold
    scores = pair_scores(rotation, translation, (5, 30))
    assert scores["rra_5"] == 0.75
    assert scores["rta_5"] == 0.5
    assert scores["auc_30"] == auc(torch.tensor([1.0, 8, 20, 40]), 30)
