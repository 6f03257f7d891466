import pytest
import torch

import geoaccel
from geoaccel.testing import check_merging_method


@pytest.mark.parametrize(("stride", "left_out"), [(1, 0.0), (2, 24 / 63), (3, 30 / 63)])
def test_every_nth_patch_is_a_key(stride: int, left_out: float) -> None:
    model, images = geoaccel.load_model("vggt-mini"), torch.rand(1, 3, 3, 56, 56)
    with torch.inference_mode():
        dense = model(images)["depth"]
        geoaccel.accelerate(model, merging=geoaccel.merging.Strided(stride=stride, bypass=False))
        assert torch.equal(model(images)["depth"], dense) == (stride == 1)
    (action,) = geoaccel.describe(model).merging
    assert action.effective_key_ratio == pytest.approx(left_out)


def test_the_rules_of_every_method() -> None:
    check_merging_method(geoaccel.merging.Strided, nothing={"stride": 1})
