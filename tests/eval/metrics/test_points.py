import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_poses import random_poses, random_similarity, rotation_about

from geoaccel import open3d_loader
from geoaccel.alignment import Similarity
from geoaccel.cameras import invert_rigid, transform_points
from geoaccel.errors import MissingPackage
from geoaccel.eval.metrics.point_protocols import PROTOCOLS, Cut3rCrop, FastVggtScannet
from geoaccel.eval.metrics.points import (
    accuracy_completeness,
    estimate_normals,
    icp,
    nearest_distances,
    random_subset,
    voxel_downsample,
)

pytest.importorskip("scipy", reason="nearest neighbours need SciPy")

seeds = st.integers(0, 10**6)


def cloud(count, seed=0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def surface(count, seed=0, noise=0.0):  # a wavy sheet, 2 x 2
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 2 - 1
    z = 0.3 * (3 * xy[:, :1]).sin() * (2 * xy[:, 1:]).cos()
    return torch.cat([xy, z], dim=1) + noise * torch.randn(count, 3, generator=generator, dtype=torch.float64)


def grid(size=20, spacing=0.05):  # a plane z = 0
    x, y = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([x, y, 0 * x], dim=-1).reshape(-1, 3) * spacing


def open3d_or_skip():
    try:
        return open3d_loader.load_open3d()
    except ImportError as error:
        pytest.skip(str(error))


def test_a_cloud_against_itself_is_perfect():
    scores = accuracy_completeness(cloud(500), cloud(500))
    zero = ["accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median"]
    assert [scores[key] for key in [*zero, "chamfer_sum", "chamfer_mean"]] == [0] * 6
    assert [scores[f"{name}_0.05"] for name in ("precision", "recall", "fscore")] == [1, 1, 1]
    assert scores["normal_consistency"] == pytest.approx(1)
    json.dumps(scores)


def test_a_shift_of_one_centimetre_gives_one_centimetre():
    scores = accuracy_completeness(grid() + torch.tensor([0, 0, 0.01]), grid(), thresholds=(0.005, 0.02))
    for key in ("accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median", "chamfer_mean"):
        assert scores[key] == pytest.approx(0.01, rel=1e-6)
    assert scores["chamfer_sum"] == pytest.approx(0.02, rel=1e-6)
    assert (scores["fscore_0.005"], scores["fscore_0.02"]) == (0, 1)
    assert scores["normal_consistency"] == pytest.approx(1)


def test_directions_are_not_confused():
    gt = torch.tensor([[0.0, 0, 0], [10, 0, 0]])
    pred = torch.tensor([[1.0, 0, 0], [0, 3, 0], [0, 0, 0]])
    scores = accuracy_completeness(pred, gt, thresholds=(2,), clip_distance=5)
    assert scores["accuracy_mean"] == pytest.approx(4 / 3)  # 1, 3, 0
    assert scores["accuracy_median"] == 1
    assert scores["completeness_mean"] == 2.5  # 0 and 9, clipped to 5
    assert scores["completeness_median"] == 2.5
    assert scores["precision_2"] == pytest.approx(2 / 3)
    assert scores["recall_2"] == 0.5
    assert scores["fscore_2"] == pytest.approx(4 / 7)
    assert np.isnan(scores["normal_consistency"])  # two points have no normal


def test_normal_consistency_is_the_cosine_at_nearest_neighbours():
    pred, gt = torch.zeros(2, 3), torch.zeros(1, 3)
    pred[1, 0] = 1
    normals = torch.tensor([[0.0, 0, 1], [0, 1, 0]])
    scores = accuracy_completeness(pred, gt, pred_normals=normals, gt_normals=torch.tensor([[0.0, 0, -1]]))
    assert scores["normal_consistency_accuracy"] == 0.5  # 1 and 0: signs do not matter
    assert scores["normal_consistency_completeness"] == 1
    assert scores["normal_consistency"] == 0.75
    with pytest.raises(ValueError, match="pred_normals"):
        accuracy_completeness(pred, gt, pred_normals=normals[:1])


@given(seeds, st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_nearest_distances_equal_brute_force(seed, count, other):
    a, b = cloud(count, seed), 3 * cloud(other, seed + 1)
    distance, index = nearest_distances(a, b)
    torch.testing.assert_close(distance, torch.cdist(a, b).amin(dim=1))
    torch.testing.assert_close((a - b[index]).norm(dim=-1), distance)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_scores_move_with_the_world(seed):
    pred, gt, similarity = surface(300, seed, 0.02), surface(200, seed + 1), random_similarity(seed)
    before = accuracy_completeness(pred, gt, thresholds=())
    after = accuracy_completeness(similarity.apply_points(pred), similarity.apply_points(gt), thresholds=())
    scale = float(similarity.scale)
    for key, value in before.items():
        assert after[key] == pytest.approx(value if key.startswith("normal") else scale * value, rel=1e-6)
    shuffled = accuracy_completeness(pred.flip(0), gt.flip(0), thresholds=())
    assert shuffled == pytest.approx(before)


def test_normals_of_a_plane_and_of_a_sphere():
    assert (estimate_normals(grid())[:, 2].abs() - 1).abs().max() < 1e-12
    sphere = torch.nn.functional.normalize(cloud(5000), dim=-1)
    assert ((estimate_normals(sphere) * sphere).sum(-1).abs() > 0.99).double().mean() > 0.99
    assert estimate_normals(cloud(4)).norm(dim=-1).tolist() == pytest.approx([1] * 4)  # fewer than 30 neighbours
    with pytest.raises(ValueError, match="at least 3 points"):
        estimate_normals(cloud(2))


def test_bad_clouds_are_refused():
    good, bad = cloud(5), cloud(5)
    bad[3, 1] = float("nan")
    for pred, message in ((bad, "pred has NaN .* 1 of 5"), (cloud(0), "no points"), (torch.zeros(5, 2), r"\[N, 3\]")):
        with pytest.raises(ValueError, match=message):
            accuracy_completeness(pred, good)
    with pytest.raises(ValueError, match="gt has NaN"):
        accuracy_completeness(good, bad)
    with pytest.raises(ValueError, match="Known: scipy, open3d"):
        nearest_distances(good, good, engine="faiss")


def test_voxels_begin_half_a_voxel_below_the_least_coordinate() -> None:
    line = torch.zeros(5, 3)
    line[:, 0] = torch.tensor([7.0, 7.4, 7.6, 8.4, 8.6])
    found = voxel_downsample(line, 1.0)[:, 0]
    torch.testing.assert_close(found, torch.tensor([7.2, 8.0, 8.6]).double(), rtol=0, atol=1e-6)


def test_voxel_downsampling_takes_means():
    near = torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [10, 0, 0]])
    torch.testing.assert_close(voxel_downsample(near, 1.0).float(), torch.tensor([[0.2, 0, 0], [10, 0, 0]]))
    torch.testing.assert_close(voxel_downsample(near + 1e6, 1.0)[0, 0].item(), 1e6 + 0.2, rtol=0, atol=0.05)
    assert len(voxel_downsample(cloud(1000), 1e-5)) == 1000
    for size, message in ((0.0, "positive"), (1e-9, "too small")):
        with pytest.raises(ValueError, match=message):
            voxel_downsample(cloud(10), size)


def test_random_subset_is_deterministic():
    a = cloud(100)
    assert random_subset(a, 100) is a
    assert torch.equal(random_subset(a, 10), random_subset(a, 10))
    assert not torch.equal(random_subset(a, 10), random_subset(a, 10, seed=1))


def test_icp_recovers_a_small_motion():
    target = surface(4000)
    motion = Similarity(
        torch.ones((), dtype=torch.float64), rotation_about("z", 0.4), torch.tensor([0.004, -0.006, 0.008]).double()
    )
    result = icp(motion.apply_points(target), target, max_distance=0.1, max_iterations=60, tolerance=1e-12)
    torch.testing.assert_close(result.transform, torch.linalg.inv(motion.matrix()), rtol=0, atol=1e-9)
    assert result.fitness == 1
    assert result.inlier_rmse < 1e-9
    apart = icp(target + 10, target, max_distance=0.1)
    assert (apart.fitness, apart.inlier_rmse) == (0, 0)
    assert torch.equal(apart.transform, torch.eye(4, dtype=torch.float64))


def test_everything_equals_open3d():
    open3d = open3d_or_skip()
    pred, gt = surface(3000, 1, 0.01) + torch.tensor([0.02, 0.0, 0.03]), surface(2500, 2, 0.01)
    ours, theirs = (nearest_distances(pred, gt, engine=engine) for engine in ("scipy", "open3d"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    cosine = (estimate_normals(gt) * estimate_normals(gt, engine="open3d")).sum(-1).abs()
    assert cosine.min() > 1 - 1e-9
    ours, theirs = (icp(pred, gt, max_distance=0.1, engine=engine) for engine in ("scipy", "open3d"))
    torch.testing.assert_close(ours.transform, theirs.transform, rtol=0, atol=1e-9)
    assert (ours.fitness, ours.inlier_rmse) == pytest.approx((theirs.fitness, theirs.inlier_rmse))
    ours, theirs = (accuracy_completeness(pred, gt, engine=engine) for engine in ("scipy", "open3d"))
    assert ours == pytest.approx(theirs, rel=1e-8)
    down = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(gt.numpy())).voxel_down_sample(0.1)
    expected = torch.from_numpy(np.array(down.points))
    assert len(expected) == len(voxel_downsample(gt, 0.1))
    assert nearest_distances(expected, voxel_downsample(gt, 0.1))[0].max() < 1e-12


def test_a_missing_library_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(MissingPackage, match=r"pip install geoaccel\[eval\].*apt-get install libusb-1.0-0") as caught:
        nearest_distances(cloud(3), cloud(3), engine="open3d")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(MissingPackage, match=r"pip install 'geoaccel\[eval\]'"):
        nearest_distances(cloud(3), cloud(3))


def test_importing_is_light():
    code = (
        "import sys; from geoaccel.eval.metrics import confidence, depth, point_protocols, pose;"
        "print([name for name in ('open3d', 'scipy', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def point_map(frames=2, height=24, width=32):  # a smooth surface seen by each frame, in front of the first camera
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    maps = [torch.stack([u + 0.3 * s, v, 3 + 0.2 * (3 * u).sin() * v + 0.1 * s], dim=-1) for s in range(frames)]
    return torch.stack(maps).double()


def test_pi3_points_undo_a_similarity():
    gt = point_map()  # moved off its grid: of two neighbours at the same distance, rounding would choose one
    gt += 0.01 * torch.rand(gt.shape, dtype=gt.dtype, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(gt.shape[:-1], dtype=torch.bool)
    valid[0, :4] = False
    pred = random_similarity(3).apply_points(gt.flatten(0, -2)).reshape(gt.shape)
    pred[0, 0] = float("nan")  # not valid, so it must not matter
    scores = PROTOCOLS["pi3-points"].score(pred, gt, valid)
    assert max(scores["accuracy_mean"], scores["completeness_mean"]) < 1e-9
    assert scores["normal_consistency"] == pytest.approx(1)
    assert scores["alignment_scale"] == pytest.approx(1 / float(random_similarity(3).scale))
    assert scores["num_pred"] == int(valid.sum())
    pred[1] = float("nan")
    with pytest.raises(ValueError, match="pred has NaN"):
        PROTOCOLS["pi3-points"].score(pred, gt, valid)
    with pytest.raises(ValueError, match="no pixel"):
        PROTOCOLS["pi3-points"].score(gt, gt, torch.zeros_like(valid))
    with pytest.raises(ValueError, match="resample"):
        PROTOCOLS["pi3-points"].score(gt[:, ::2], gt, valid)
    assert PROTOCOLS["pi3-points-dtu"].icp_distance == 100


def test_cut3r_crop_removes_depth_shift_and_scale_in_the_first_camera():
    assert PROTOCOLS["cut3r-crop"].crop == 224
    protocol = Cut3rCrop(crop=24, max_points=1000)
    gt = point_map(2, 30, 32)
    valid = torch.ones(gt.shape[:-1], dtype=torch.bool)
    pred = 2.5 * gt + torch.tensor([0.0, 0, 1.0])
    pose = random_poses(1)[0]
    world = transform_points(invert_rigid(pose), gt.flatten(0, -2)).reshape(gt.shape)
    scores = protocol.score(pred, world, valid, gt_first_cam_from_world=pose)
    assert scores["accuracy_mean"] < 0.01  # two different random subsets
    assert scores["alignment_scale"] == pytest.approx(0.4)
    assert Cut3rCrop().score(pred, gt, valid)["chamfer_sum"] < 1e-9  # a crop larger than the views keeps all
    assert scores["num_pred"] == 1000  # of 2 * 24 * 24
    # Not a similarity: a first camera that is wrong by 30 degrees stays wrong, where pi3-points would not notice.
    turned = (gt.flatten(0, -2) @ rotation_about("z", 30).T).reshape(gt.shape)
    assert Cut3rCrop().score(turned, gt, valid)["chamfer_sum"] > 0.01
    assert PROTOCOLS["pi3-points"].score(turned, gt, valid)["chamfer_sum"] < 1e-9


def test_fastvggt_scannet_clips_and_fits_boxes():
    protocol = PROTOCOLS["fastvggt-scannet"]
    gt, pose = surface(20_000), random_poses(1)[0]
    in_camera = transform_points(pose, gt)
    scores = protocol.score(in_camera, gt, first_cam_from_world=pose)
    assert scores["chamfer_sum"] < 1e-6
    assert protocol.score(7 * gt + 2, gt)["chamfer_sum"] < 1e-6  # box scale and centre
    assert protocol.score(7 * gt + 2, gt)["alignment_scale"] == pytest.approx(1 / 7)
    # The documented flaw: one outlier rescales everything, and the clip caps what it costs.
    outlier = torch.cat([gt, torch.tensor([[1000.0, 0, 0]])])
    assert 0.5 < protocol.score(outlier, gt)["chamfer_sum"] <= 1
    few = FastVggtScannet(max_points=50)
    assert few.score(gt, gt)["num_pred"] <= 50


def test_dtu_masks_plane_and_outliers():
    protocol = PROTOCOLS["dtu-mvs"]
    gt = grid(20, 1.0)
    near, far = gt[:10] + torch.tensor([0, 0, 2.0]), torch.tensor([[0.0, 0, 500]])
    scores = protocol.score(torch.cat([near, far]), gt[:10])
    assert scores["accuracy_mean"] == pytest.approx(2)  # the point 500 mm away is left out
    assert scores["completeness_mean"] == pytest.approx(2)
    assert scores["chamfer_mean"] == pytest.approx(2)
    assert scores["num_pred"] == 10
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[0, :5] = True  # cells x = 0, y = 0 ... 4
    box = torch.tensor([[0.0, 0, 0], [19, 19, 19]])
    masked = protocol.score(near, gt[:10], obs_mask=mask, box=box)
    assert (masked["num_pred"], masked["num_gt"]) == (5, 10)
    plane = torch.tensor([0.0, 1, 0, -6.5])  # keeps y > 6.5
    assert protocol.score(near, gt[:10], ground_plane=plane)["num_gt"] == 3
    with pytest.raises(ValueError, match="check frame and unit"):
        protocol.score(far, gt)
    with pytest.raises(ValueError, match="both or neither"):
        protocol.score(near, gt, obs_mask=mask)


def test_every_protocol_says_what_it_is():
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert type(protocol).__doc__
        assert protocol.inputs in ("maps", "clouds")


@pytest.mark.slow
def test_one_million_points_take_less_than_twenty_seconds():
    pred, gt = surface(1_000_000, 1, 0.01), surface(1_000_000, 2, 0.01)
    start = time.process_time()
    scores = accuracy_completeness(pred, gt)
    assert time.process_time() - start < 2 * 20  # CPU seconds of two cores: other work on the machine does not count
    assert scores["accuracy_mean"] < 0.01
