"""How long windows are: what was asked for, or what fits into memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_windows import photographs
from torch import nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.memory import HEADROOM, Limit
from geoaccel.windows.predict import Lengths, lengths_for


def test_lengths_that_a_run_began_with_and_that_no_longer_fit(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("too much")

    monkeypatch.setattr("geoaccel.windows.run.plan_for", refuse)
    run: dict[str, Any] = {"model": tiny, "window": "auto", "overlap": 4, "size": 42}
    photos = photographs(tmp_path / "photos", 12)
    for auto, says in (
        (Lengths(8, 4), r"windows of 8 frames, with which this run began, .* \(too much\)"),
        (None, "^too m"),
    ):
        with pytest.raises(UserError, match=says):
            geoaccel.reconstruct_windows(photos, auto=auto, out=tmp_path / f"{auto is None}", **run)


def test_auto_takes_what_fits(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: int) -> None:
        for module in ("windows.predict", "memory"):
            monkeypatch.setattr(f"geoaccel.{module}.free_bytes", lambda device: size)

    monkeypatch.setattr("geoaccel.memory.estimate_bytes", lambda model, frames, size, **how: frames * 100)
    free(2500)
    assert lengths_for(tiny, "auto", None, (28, 28)) == Lengths(20, 10)
    free(10**9)
    assert lengths_for(tiny, "auto", 7, (28, 28)) == Lengths(60, 7)
    monkeypatch.setattr("geoaccel.memory.in_use", lambda device: 0)
    asked = Limit(max_bytes=round(1000 * HEADROOM))
    assert lengths_for(tiny, "auto", None, (28, 28), asked) == Lengths(8, 4)
    free(100)
    with pytest.raises(UserError, match="smaller --size"):
        lengths_for(tiny, "auto", None, (28, 28))


def test_auto_counts_with_plans_and_names_a_limit_that_is_enough(
    tiny: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimate(model: nn.Module, frames: int, size: Any, plan: Any = None, **how: Any) -> int:
        return frames * 10**6 * (100 if plan is None else 1)

    monkeypatch.setattr("geoaccel.memory.estimate_bytes", estimate)
    monkeypatch.setattr("geoaccel.memory.in_use", lambda device: 10**8)

    def window(megabytes: int) -> int:
        return lengths_for(tiny, "auto", None, (28, 28), Limit.of(f"{megabytes}MB")).window

    assert window(130) == 20  # all at once not one frame would fit
    assert window(105) == 4  # not with a margin, but it fits
    with pytest.raises(UserError, match=r"^a window has at least 4 frames, and 4 .* need about 4 MB on cpu, ") as error:
        window(103)
    enough = re.search(r"--max-memory (\d+)MB", str(error.value))
    assert enough is not None
    assert window(int(enough[1])) >= 4


def test_chunks_cover_the_sequence() -> None:
    for count in (1, 15, 16, 17, 24, 25, 100):
        chunks = Lengths(16, 8).chunks(count)
        assert chunks[0][0] == 0
        assert [stop for _, stop in chunks[:-1]] == [start for start, _ in chunks[1:]]
        assert chunks[-1][1] == count
