"""Patches of frames are matched with those of others, and with those elsewhere in their own frame."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geoaccel.frame_matches import MOST_OTHERS, MOST_PATCHES, averaged, evenly_spread, frame_matches

GRID = (6, 8)


def views(frames: int = 4, *, common: float = 0.0) -> Tensor:
    """The same patches in other places, and one frame of others; all with something in common."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(48, 32, generator=generator)
    found = [seen[torch.randperm(48, generator=generator)] for _ in range(frames - 1)]
    other = torch.randn(48, 32, generator=generator)
    return torch.stack([*found, other]) + common * torch.ones(32)


def test_frames_of_one_thing_are_found_in_each_other_and_others_are_not() -> None:
    found = frame_matches(views(), GRID)
    assert found.others.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(found.ratios, found.ratios.T)
    assert found.ratios[:3, :3].max() < -8  # the same patches: as near as can be
    assert found.ratios[3, :3].abs().max() < 0.2  # no nearer than elsewhere in itself


def test_what_all_patches_have_in_common_does_not_count() -> None:
    alone, together = (frame_matches(views(common=common), GRID).ratios[3, :3] for common in (0.0, 2.0))
    torch.testing.assert_close(together, alone, atol=0.1, rtol=0)


def test_by_hand() -> None:
    """Two frames of a row of patches; their neighbours, a quarter of the row away, are not elsewhere."""
    first = torch.eye(4)
    second = torch.tensor([[0.6, 0.8, 0, 0], [0, 0.6, 0.8, 0], [0, 0, 0.6, 0.8], [0, 0, 0, 1.0]])
    # In itself the first finds nothing (distance 1); the second finds 0.48 of two at most, a step of two away: nothing.
    # In the second the first finds 0.6, 0.8, 0.8 and 1, and the second in the first 0.8, 0.8, 0.8 and 1.
    expected = (torch.tensor(1 - 0.8).log() + torch.tensor(1 - 0.85).log()) / 2
    found = frame_matches(torch.stack([first, second]), (1, 4)).ratios
    assert float(found[0, 1]) == float(found[1, 0]) == pytest.approx(float(expected), abs=1e-5)


def test_a_black_frame_has_a_finite_ratio() -> None:
    x = views()
    x[0] = 1.0
    found = frame_matches(x, GRID).ratios
    assert found.isfinite().all()
    assert found[0, 1:].min() > 1


def test_of_many_frames_and_patches_some_are_compared() -> None:
    assert evenly_spread(5).tolist() == [0, 1, 2, 3, 4]
    assert len(evenly_spread(500)) == MOST_OTHERS
    assert evenly_spread(500)[-1] == 499
    few, grid = averaged(torch.rand(2, 37 * 28, 3), (37, 28), MOST_PATCHES)
    assert grid == (10, 7)
    assert few.shape == (2, 70, 3)
    x = torch.rand(MOST_OTHERS + 8, 12, 5)
    found = frame_matches(x, (3, 4))
    assert found.ratios.shape == (MOST_OTHERS + 8, MOST_OTHERS)
    chosen = x[found.others]
    torch.testing.assert_close(found.ratios[found.others], frame_matches(chosen, (3, 4)).ratios)


def test_one_frame_and_one_patch() -> None:
    assert frame_matches(torch.rand(1, 1, 4), (1, 1)).ratios.shape == (1, 1)
