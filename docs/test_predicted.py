"""docs/results/predicted.md: predictions are those of this code, and close to what was measured."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import predicted_speedups

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
    from geoaccel.merging.gain import MIN_GAIN, too_little

    for name, rows in found().items():
        for row in rows:
            if too_little(row["predicted"], MIN_GAIN) is None:
                assert row["measured"] >= MIN_GAIN, (name, row)
