import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoaccel.eval.metrics.depth import depth_errors, valid_depth


def test_depth_in_the_head():
    gt = torch.tensor([[1.0, 2, 4, 10]])
    perfect = depth_errors(3 * gt, gt)
    assert perfect["abs_rel"] == pytest.approx(0)
    assert perfect["delta_1_25"] == 1
    assert perfect["scale"] == pytest.approx(1 / 3)
    wrong = depth_errors(torch.tensor([[1.0, 2, 4, 20]]), gt, align="none")
    assert wrong["abs_rel"] == 0.25  # one of four pixels is 100 percent off
    assert wrong["delta_1_25"] == 0.75
    assert wrong["valid_pixels"] == 4
    near = depth_errors(torch.tensor([[1.0, 2, 4, 5]]), gt, align="none")
    assert (near["abs_rel"], near["delta_1_25"]) == (0.125, 0.75)  # too near is as wrong as too far
    assert depth_errors(torch.tensor([5.0]), torch.tensor([4.0]), align="none")["delta_1_25"] == 0  # 1.25 is not below


def test_delta_counts_too_far_and_too_near():
    """One pixel for each side of both bounds: max(p / g, g / p) is 1.5, 1.2, 1.5 and 1.2."""
    pred, gt = torch.tensor([3.0, 2.4, 2.0, 2.0]), torch.tensor([2.0, 2.0, 3.0, 2.4])
    for chosen, expected in (([0], 0), ([1], 1), ([2], 0), ([3], 1), ([0, 1, 2, 3], 0.5)):
        assert depth_errors(pred[chosen], gt[chosen], align="none")["delta_1_25"] == expected


def test_alignments_differ_where_they_should():
    gt = torch.tensor([1.0, 2, 3, 4, 5])
    outlier = torch.tensor([2.0, 4, 6, 8, 100])
    assert depth_errors(outlier, gt)["scale"] == 0.5
    assert depth_errors(outlier, gt, align="least_squares")["scale"] < 0.1
    shifted = depth_errors(2 * gt + 3, gt, align="scale_shift")
    assert shifted["abs_rel"] == pytest.approx(0, abs=1e-12)
    assert (shifted["scale"], shifted["shift"]) == pytest.approx((0.5, -1.5))
    with pytest.raises(ValueError, match="Known: median, least_squares, scale_shift, none"):
        depth_errors(gt, gt, align="best")


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from(["median", "least_squares", "scale_shift"]))
@settings(max_examples=50, deadline=None)
def test_errors_do_not_depend_on_the_scale_of_the_prediction(seed, scale, align):
    generator = torch.Generator().manual_seed(seed)
    gt, pred = torch.rand(2, 3, 4, 5, generator=generator, dtype=torch.float64) + 0.5
    one, other = depth_errors(pred, gt, align=align), depth_errors(scale * pred, gt, align=align)
    assert other["abs_rel"] == pytest.approx(one["abs_rel"], rel=1e-9)
    assert other["scale"] * scale == pytest.approx(one["scale"], rel=1e-6, abs=1e-9)


def test_only_valid_pixels_count():
    gt = torch.tensor([1.0, 0, -1, float("nan"), float("inf"), 50, 2])
    pred = torch.tensor([1.0, 9, 9, float("nan"), 9, 9, 2])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    assert valid_depth(gt, mask, max_depth=20).tolist() == [True, False, False, False, False, False, True]
    assert depth_errors(pred, gt, mask=mask, align="none", max_depth=20)["abs_rel"] == 0
    assert valid_depth(torch.tensor([1.0, 2, 3]), min_depth=1, max_depth=3).tolist() == [False, True, False]
    mask[6] = False
    assert depth_errors(pred, gt, mask=mask, align="none", max_depth=20)["valid_pixels"] == 1


def test_negative_depth_after_alignment_is_wrong():
    errors = depth_errors(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0]), align="none")
    assert errors["delta_1_25"] == 0.5
    assert errors["abs_rel"] == 1


def test_no_wrong_number_without_data():
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match="no valid depth"):
        depth_errors(ones, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no valid depth"):
        depth_errors(ones, ones, mask=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="NaN or infinite at 1 of 4"):
        depth_errors(torch.tensor([[1.0, 1], [1, float("nan")]]), ones)
    with pytest.raises(ValueError, match="resize"):
        depth_errors(torch.ones(2, 3), ones)
    with pytest.raises(ValueError, match="mask"):
        depth_errors(ones, ones, mask=torch.ones(3))
    with pytest.raises(ValueError, match="zero"):
        depth_errors(torch.zeros(2, 2), ones)
