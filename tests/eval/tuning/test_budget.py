"""Budgets in words, and those that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

from geoaccel.errors import UserError
from geoaccel.eval.tuning.budget import Budget, three_digits

NOTHING: dict[str, str | None] = dict.fromkeys(("pose", "depth", "speedup", "memory"))


@pytest.mark.parametrize(("option", "text", "name", "value"), [
    ("pose", "0.5deg", "pose_deg", 0.5), ("pose", "2", "pose_deg", 2.0), ("pose", ".5 DEG", "pose_deg", 0.5),
    ("depth", "1%", "depth_rel", 0.01), ("speedup", "4", "speedup", 4.0), ("speedup", "1.5x", "speedup", 1.5),
    ("memory", "16GB", "memory_bytes", 16 * 10**9), ("memory", "2.5 GiB", "memory_bytes", 5 * 2**29),
])  # fmt: skip
def test_numbers_with_units(option: str, text: str, name: str, value: float) -> None:
    assert getattr(Budget.read(**{**NOTHING, option: text}), name) == value


@pytest.mark.parametrize(("given", "says"), [
    ({}, "no budget was given; give --max-pose-error"),
    ({"pose": "0"}, "--max-pose-error 0 leaves every layer dense"),
    ({"depth": "0%"}, "--max-depth-error 0 leaves every layer dense"),
    ({"pose": "-1deg"}, "--max-pose-error -1deg: give a number, as 0.5deg"),
    ({"pose": "1rad"}, "--max-pose-error 1rad"),
    ({"depth": "0.01"}, "--max-depth-error 0.01: give a number and its unit, as 1%"),
    ({"speedup": "1"}, "--speedup 1 is no faster than the dense model"),
    ({"speedup": "fast"}, "--speedup fast"),
    ({"memory": "16"}, "--max-memory 16 is not a size; give a number with a unit, such as 16GB"),
    ({"memory": "0GB"}, "--max-memory 0 is too small"),
])  # fmt: skip
def test_what_is_no_budget_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Budget.read(**{**NOTHING, **given})
    assert "\n" not in str(caught.value)


def test_the_larger_share_counts() -> None:
    errors = {"pose_deg": 0.25, "depth_rel": 0.008}
    assert Budget(pose_deg=0.5).share(errors) == 0.5
    assert Budget(pose_deg=0.5, depth_rel=0.01).share(errors) == pytest.approx(0.8)
    assert Budget(speedup=2.0).share(errors) == pytest.approx(0.8)  # a degree and a percent count alike


@pytest.mark.parametrize(("value", "up", "down"), [
    (0.3, 0.3, 0.3), (0.81201, 0.813, 0.812), (1234.0, 1240.0, 1230.0), (2.0, 2.0, 2.0), (0.0, 0.0, 0.0),
    (9.999, 10.0, 9.99), (float("inf"), float("inf"), float("inf")),
])  # fmt: skip
def test_what_is_advised_is_rounded_to_the_safe_side(value: float, up: float, down: float) -> None:
    assert three_digits(value, up=True) == pytest.approx(up)
    assert three_digits(value, up=False) == pytest.approx(down)
