"""What every merging method says of knobs and photographs that it cannot take."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conformance import IMAGES, NEEDED, knobs_of, make, run
from merging_scenes import photographs
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import MERGING

SHARES = ("ratio", "protect")
KEPT = ("query_keep", "key_keep")


def test_rows_of_whole_numbers_come_in_any_kind(name: str) -> None:
    for knob, good, bad in (
        ("group", np.array([2, 3]), (3, (2.5, 2), "23")),
        ("block", np.array([8, 2]), (128, (8, 2.5))),
        ("refresh", np.arange(0, 24, 6), (6, (0.5,))),
    ):
        if knob not in knobs_of(name):
            continue
        assert getattr(make(name, **{knob: good}), knob) == tuple(good.tolist())
        for value in bad:
            with pytest.raises(ValueError, match=rf"{name}: {knob}="):
                make(name, **{knob: value})


@pytest.mark.parametrize("value", ["no", "false", 0, None])
def test_flags_are_true_or_false(name: str, value: Any) -> None:
    flags = [knob.name for knob in dataclasses.fields(MERGING[name]) if isinstance(knob.default, bool)]  # type: ignore[arg-type]
    assert "bypass" in flags
    for flag in flags:
        with pytest.raises(ValueError, match=f"{name}: {flag}={value!r} is neither true nor false"):
            make(name, **{flag: value})


def test_photographs_with_nan_are_one_clear_line(tiny: nn.Module, name: str) -> None:
    images = photographs(3, (4, 6))
    images[0, 1, 0, 5, 5] = torch.nan
    for knobs in ({}, {"bypass": True}):
        geoaccel.accelerate(tiny, merging=make(name, **knobs))
        with pytest.raises(ValueError, match="photograph 1 of scene 0 holds NaN") as caught:
            run(tiny, images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 0, 1, 1.5, float("nan"), "half"])
def test_shares_outside_the_range_are_refused(name: str, value: Any) -> None:
    assert "ratio" in knobs_of(name)
    for knobs, allowed, fine in ((SHARES, r"\[0, 1\)", 0), (KEPT, r"\(0, 1\]", 1)):
        if value == fine:
            continue
        for knob in set(knobs) & set(knobs_of(name)):
            with pytest.raises(ValueError, match=rf"{name}.*{knob}.*{allowed}") as caught:
                make(name, **{knob: value})
            assert "\n" not in str(caught.value)


def test_methods_are_frozen_and_print_their_knobs(method: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bypass = True
    assert "bypass=False" in repr(method)
    assert hash(method) == hash(make(method.name))


# Another value than the default for every knob that changes what is merged.
OTHER: dict[str, Any] = {
    "ratio": 0.4,
    "query_keep": 0.45,
    "key_keep": 0.55,
    "outliers": 0.15,
    "protect": 0.3,
    "anchor": None,  # the other one
    "adaptive": False,
    "log_bias": None,
    "released_code": True,
    "block": (8, 2),
    "refresh": (0, 20),
    "targets": "random",
    "seed": 5,
    "group": (2, 3),
    "tap": 0,
    "variant": "direct",
    "scope": "frame",
    "choose": "random",
    "predictor": "untrained",
}
# Knobs that need another to be of use, and are refused without.
WITH = {("come", "seed"): {"choose": "random", "predictor": "auto"}}
# Pairs of which one settles in the open what the other is about.
SETTLED = {
    ("litevggt", "released_code", "refresh"): "given layers win over the published code's",
}


def other(name: str, knob: str) -> Any:
    default = next(k.default for k in dataclasses.fields(MERGING[name]) if k.name == knob) if knob != "ratio" else None  # type: ignore[arg-type]
    return not default if isinstance(default, bool) else OTHER[knob]


@torch.no_grad()
def outcome(model: nn.Module, method: Any) -> tuple[Tensor, ...]:
    """What the network makes of noise; two scenes of the same so that a batch is no question of knobs."""
    geoaccel.accelerate(model, merging=method)
    return tuple(run(model, IMAGES).values())


def differ(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_knob_is_silently_ignored(tiny: nn.Module, name: str) -> None:
    """Each does something alone; beside each other knob it still does, or the two are refused together."""
    knobs = [knob for knob in knobs_of(name) if knob != "bypass"]
    needed = NEEDED.get(name, {})
    alone: dict[str, tuple[Tensor, ...]] = {"": outcome(tiny, make(name))}
    values = {knob: other(name, knob) for knob in knobs if knob not in needed}
    for knob, value in values.items():
        if (name, knob) in WITH:
            with pytest.raises(ValueError, match=f"{name}: {knob}="):
                make(name, **{knob: value})
            base = outcome(tiny, make(name, **WITH[name, knob]))
            assert differ(outcome(tiny, make(name, **WITH[name, knob], **{knob: value})), base), knob
            continue
        more = {"predictor": "auto"} if (name, knob) == ("come", "choose") else {}
        alone[knob] = outcome(tiny, make(name, **{knob: value}, **more))
        assert differ(alone[knob], alone[""]), f"{name}: {knob}={value} changes nothing"
    for first, second in itertools.combinations([knob for knob in alone if knob], 2):
        more = {"predictor": "auto"} if name == "come" and "choose" in (first, second) else {}
        try:
            method = make(name, **{first: values[first], second: values[second]}, **more)
        except ValueError as error:
            said = str(error)
            assert first in said or second in said
            continue
        if not {(name, first, second), (name, second, first)} & SETTLED.keys():
            both = outcome(tiny, method)
            assert differ(both, alone[first]), f"{name}: {second} is ignored beside {first}"
            assert differ(both, alone[second]), f"{name}: {first} is ignored beside {second}"


def test_contradictions_are_refused_whatever_the_values() -> None:
    """Those that are a knob's default, too."""
    for knobs in ({"query_keep": 0.9}, {"query_keep": 0.2}, {"key_keep": 0.3}):
        with pytest.raises(ValueError, match=r"httm: ratio=0.5 and .* both say how many tokens stay"):
            MERGING["httm"](ratio=0.5, **knobs)
    assert MERGING["httm"](ratio=0.5, outliers=0.3).outliers == 0.3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "value", [[1, 2], [[1], "a"], {"a": 1}, {1, 2}, np.arange(3), torch.arange(3), bytearray(b"a")]
)
def test_knobs_are_hashable_or_refused(tiny: nn.Module, name: str, value: Any) -> None:
    """As settings files and notebooks give them; describe groups methods by what they are."""
    for knob in knobs_of(name):
        try:
            method = make(name, **{knob: value})
        except ValueError as error:
            said = str(error)
            assert f"{name}: " in said
            assert f"{knob}=" in said
            assert "\n" not in said
            continue
        hash(method)
        geoaccel.accelerate(tiny, merging=method)
        assert name in repr(geoaccel.describe(tiny)).lower()


def test_whole_numbers_are_whole(name: str) -> None:
    for knob in {"seed", "tap"} & set(knobs_of(name)):
        for value in ("abc", 1.5, True, [1]):
            with pytest.raises(ValueError, match=rf"{name}: {knob}=.* is no whole number"):
                make(name, **{knob: value})
