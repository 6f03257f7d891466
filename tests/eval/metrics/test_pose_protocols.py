"""Published protocols of poses: what each depends on, and how it aggregates."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from random_poses import jitter, random_poses, rotation_about, seeds, two_cameras

from geoaccel.eval.metrics.pose_protocols import PROTOCOLS, PairErrors


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_strict_does_not_depend_on_the_order_of_frames(seed):
    gt = random_poses(6, seed)
    pred = jitter(gt, 0.2, seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    strict = PROTOCOLS["strict"]
    before, after = strict.errors(pred, gt), strict.errors(pred[order], gt[order])
    torch.testing.assert_close(after.rotation_deg.sort().values, before.rotation_deg.sort().values)
    torch.testing.assert_close(after.translation_deg.sort().values, before.translation_deg.sort().values)
    assert strict.scores([after])["auc_30"] == pytest.approx(strict.scores([before])["auc_30"])


def test_published_protocols_depend_on_the_order_of_frames():
    # Camera 1 is turned by 10 degrees: seen from camera 0 the baseline is right, seen from camera 1 it is 10 off.
    gt, pred = two_cameras([1.0, 0, 0]), two_cameras([1.0, 0, 0], rotation_about("y", 10))
    translations = {}
    for name in ("vggt-co3d", "pi3-co3d", "strict"):
        protocol = PROTOCOLS[name]
        one, other = protocol.errors(pred, gt), protocol.errors(pred.flip(0), gt.flip(0))
        assert float(one.rotation_deg) == pytest.approx(10)
        assert float(other.rotation_deg) == pytest.approx(10)
        translations[name] = [round(float(errors.translation_deg), 6) for errors in (one, other)]
    assert translations == {"vggt-co3d": [0, 10], "pi3-co3d": [10, 0], "strict": [10, 10]}


def test_protocols_aggregate_as_they_say():
    zero, far = torch.zeros(1), torch.full((1,), 60.0)
    backwards = torch.full((1,), 180.0)
    sequences = [PairErrors(zero, zero, "apple"), PairErrors(far, zero, "car"), PairErrors(far, zero, "car")]
    vggt, pi3, strict = (PROTOCOLS[name] for name in ("vggt-co3d", "pi3-co3d", "strict"))
    assert vggt.scores(sequences)["auc_30"] == 0.5  # mean over two categories
    assert pi3.scores(sequences)["auc_30"] == pytest.approx(1 / 3)  # three pairs
    assert vggt.scores(sequences)["auc_30_pooled"] == pi3.scores(sequences)["auc_30"]
    assert pi3.scores(sequences)["auc_30_category_mean"] == vggt.scores(sequences)["auc_30"]
    flipped = [PairErrors(zero, backwards)]
    assert vggt.scores(flipped)["auc_30"] == 1
    assert vggt.scores(flipped)["auc_30_unfolded"] == 0
    assert strict.scores(flipped)["auc_30"] == 0
    assert (vggt.num_frames, vggt.seed, vggt.min_images) == (10, 0, 50)
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert type(protocol).__doc__
        with pytest.raises(ValueError, match="no sequence"):
            protocol.scores([])
        with pytest.raises(dataclasses.FrozenInstanceError):
            protocol.seed = 1
