"""docs/results/predicted.md: predictions are those of this code, and close to what was measured."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

import predicted_speedups
from geoaccel.merging.gain import ERROR, MIN_GAIN, too_little

CLOSE = 0.15
"""Of the measured speedup."""


@functools.cache
def found() -> dict[str, list[dict[str, Any]]]:
    return {name: predicted_speedups.rows(name) for name in predicted_speedups.MODELS}


@pytest.fixture(autouse=True)
def _built_in_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOACCEL_RATES", "built-in")


def test_the_page_is_what_the_command_writes() -> None:
    assert predicted_speedups.DOCUMENT.read_text() == predicted_speedups.document(found()), (
        "run GEOACCEL_RATES=built-in python scripts/figures/predicted_speedups.py --write"
    )


def test_predictions_are_close() -> None:
    for name, rows in found().items():
        for row in rows:
            assert abs(row["predicted"] / row["measured"] - 1) <= CLOSE, (name, row)


def test_no_method_acts_where_it_gains_too_little() -> None:
    """By default, by the speedups that were measured."""
    for name, rows in found().items():
        for row in rows:
            if too_little(row["decided"], MIN_GAIN) is None:
                assert row["measured"] >= MIN_GAIN, (name, row)


def test_predictions_are_off_by_less_than_what_is_to_spare() -> None:
    """Nine of ten, on validation scenes, by which it was chosen."""
    high = []
    for name in predicted_speedups.MODELS:
        path = predicted_speedups.ROOT / "benchmarks" / f"predicted-{name}-frames-validation.json"
        rows = [row for own in json.loads(path.read_text())["frames"].values() for row in own if row["merging"]]
        high += [row["predicted_speedup"] / row["effects"]["speedup"]["mean"] for row in rows]
    assert len(high) == 48
    assert sum(ratio > ERROR for ratio in high) <= len(high) / 10
