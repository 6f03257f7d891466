import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoaccel.eval.metrics.confidence import confidence_rank_correlation, spearman


def test_spearman_in_the_head():
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 1000])) == 1
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == -1
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 2])) == 0.5  # 1 - 6 * 2 / (3 * 8)
    assert math.isnan(spearman(torch.ones(3), torch.tensor([1.0, 2, 3])))
    assert spearman(torch.tensor([1.0, 1, 2]), torch.tensor([4.0, 4, 9])) == 1  # ties share a rank
    with pytest.raises(ValueError, match="same length"):
        spearman(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match="NaN"):
        spearman(torch.tensor([1.0, float("nan")]), torch.ones(2))


@given(st.lists(st.tuples(st.integers(-5, 5), st.floats(-10, 10)), min_size=3, max_size=50))
@settings(max_examples=60, deadline=None)
def test_spearman_equals_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    a, b = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    if a.unique().numel() == 1 or b.unique().numel() == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_confidence_that_falls_with_error_is_perfect_on_any_scale():
    error = torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(0))
    assert confidence_rank_correlation(-error, error) == pytest.approx(1)
    assert confidence_rank_correlation(1 + torch.exp(-5 * error.double()), error.double()) == pytest.approx(1)
    assert confidence_rank_correlation(error, error) == pytest.approx(-1)


def test_mask_and_shapes():
    error = torch.tensor([0.0, 1, 2, 9])
    conf = torch.tensor([3.0, 2, 1, float("nan")])
    assert confidence_rank_correlation(conf, error, mask=torch.tensor([1, 1, 1, 0])) == pytest.approx(1)
    with pytest.raises(ValueError, match="NaN"):
        confidence_rank_correlation(conf, error)
    with pytest.raises(ValueError, match="differ in shape"):
        confidence_rank_correlation(conf, error[:2])
    with pytest.raises(ValueError, match="mask"):
        confidence_rank_correlation(conf, error, mask=torch.ones(2))


def test_sampling_is_deterministic_and_leaves_the_global_state_alone():
    conf, error = torch.rand(2, 50_000, generator=torch.Generator().manual_seed(0))
    error = error - conf / 2
    before = torch.get_rng_state()
    first = confidence_rank_correlation(conf, error, max_samples=10_000)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == confidence_rank_correlation(conf, error, max_samples=10_000)
    assert first != confidence_rank_correlation(conf, error, max_samples=10_000, seed=1)
    assert first == pytest.approx(confidence_rank_correlation(conf, error), abs=0.03)
