"""What every merging method says of knobs and photographs that it cannot take."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conformance import knobs_of, make, run
from merging_scenes import photographs
from references import IDLE_KNOBS, NEEDED_KNOBS
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import MERGING
from geoaccel.testing.rules import tensors_of

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
        with pytest.raises(ValueError, match=f"{name}: {flag}={value!r} must be true or false"):
            make(name, **{flag: value})


def test_photographs_with_nan_are_one_clear_line(tiny: nn.Module, name: str) -> None:
    images = photographs(3, (4, 6))
    images[0, 1, 0, 5, 5] = torch.nan
    for knobs in ({}, {"bypass": True}):
        geoaccel.accelerate(tiny, merging=make(name, **knobs))
        with pytest.raises(ValueError, match="image 1 of scene 0 holds NaN") as caught:
            run(tiny, images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 0, 1, 1.5, float("nan"), "half"])
def test_shares_outside_the_range_are_refused(name: str, value: Any) -> None:
    assert "ratio" in knobs_of(name) or name in IDLE_KNOBS
    for knobs, allowed, fine in ((SHARES, r"\[0, 1\)", 0), (KEPT, r"\(0, 1\]", 1)):
        if value == fine:
            continue
        for knob in set(knobs) & set(knobs_of(name)):
            with pytest.raises(ValueError, match=rf"{name}.*{knob}.*{allowed}") as caught:
                make(name, **{knob: value})
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.99, -1, 0, True, "high", float("nan"), float("inf"), None])
def test_a_least_gain_is_a_speedup(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}: min_gain={value!r} is not a valid speedup") as caught:
        make(name, bypass=True, min_gain=value)
    assert "\n" not in str(caught.value)
    assert make(name, bypass=True, min_gain=1).min_gain == 1


def test_acting_always_leaves_no_least_gain(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: bypass=False always merges, so min_gain=1.3 has no effect"):
        make(name, min_gain=1.3)


def test_methods_are_frozen_and_print_their_knobs(method: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bypass = True
    assert "bypass=False" in repr(method)
    assert hash(method) == hash(make(method.name))


# Another value than the default for every knob that is no switch.
OTHER: dict[str, Any] = {
    "ratio": 0.2,
    "query_keep": 0.45,
    "key_keep": 0.55,
    "outliers": 0.15,
    "protect": 0.3,
    "block": (8, 2),
    "refresh": (0, 20),
    "targets": "random",
    "seed": 5,
    "group": (2, 3),
    "tap": 1,
    "stride": 3,
    "counted_frames": 1.5,
    "frame_layers": 0,
    "variant": "direct",
    "scope": "frame",
    "choose": "most_confident",
    "predictor": "untrained",
}
NOISE = photographs(4, (7, 10))

# Knobs that show only beside another: of the one method it is refused alone, of the other it moves too little on noise.
REFUSED_ALONE = {("come", "seed"): {"choose": "random", "predictor": "auto"}}
SEEN_WITH = {**REFUSED_ALONE, ("litevggt", "seed"): {"targets": "random"}, ("asymmetric", "stride"): {"keys": None}}


def other(name: str, knob: str) -> Any:
    default = {k.name: k.default for k in dataclasses.fields(MERGING[name])}.get(knob)  # type: ignore[arg-type]
    return not default if isinstance(default, bool) else OTHER[knob]


def outcome(model: nn.Module, method: Any) -> tuple[Tensor, ...]:
    """What the network makes of noise: its cameras, in which all tokens have a say."""
    geoaccel.accelerate(model, merging=method)
    with torch.no_grad():
        return tuple(tensors_of(model(NOISE, heads=["camera"])).values())


def differ(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def made(name: str, **knobs: Any) -> Any | str:
    """A method, or what it says of knobs that it does not take."""
    try:
        return make(name, **knobs)
    except ValueError as error:
        return str(error)


def test_no_knob_is_silently_ignored(tiny: nn.Module, name: str) -> None:
    """Each does something alone; beside each other knob it still does, or the two are refused together."""
    elsewhere = {"bypass", "min_gain", *NEEDED_KNOBS.get(name, {})}
    knobs = [knob for knob in knobs_of(name) if knob not in elsewhere]
    values = {knob: other(name, knob) for knob in knobs}
    for knob in [knob for knob in knobs if (name, knob) in SEEN_WITH]:
        company = SEEN_WITH[name, knob]
        without = outcome(tiny, make(name, **company))
        assert differ(outcome(tiny, make(name, **company, **{knob: values.pop(knob)})), without)
    dense = outcome(tiny, make(name))
    alone = {knob: outcome(tiny, make(name, **{knob: value})) for knob, value in values.items()}
    for knob, found in alone.items():
        assert differ(found, dense), f"{name}: {knob}={values[knob]} changes nothing"
    for pair in itertools.combinations(values, 2):
        method = made(name, **{knob: values[knob] for knob in pair})
        if isinstance(method, str):
            assert all(knob in method or knob == "released_code" for knob in pair), method
            continue
        both = outcome(tiny, method)
        for knob, beside in (pair, pair[::-1]):
            assert differ(both, alone[beside]), f"{name}: {knob} is ignored beside {beside}"


@pytest.mark.parametrize(("method", "knob"), REFUSED_ALONE)
def test_a_knob_of_another_choice_is_refused(method: str, knob: str) -> None:
    with pytest.raises(ValueError, match=f"{method}: {knob}="):
        make(method, **{knob: OTHER[knob]})


def test_contradictions_are_refused_whatever_the_values() -> None:
    """Those that are a knob's default, too."""
    for knobs in ({"query_keep": 0.9}, {"query_keep": 0.2}, {"key_keep": 0.3}):
        with pytest.raises(ValueError, match=r"httm: ratio=0.5 and .* both set how many tokens stay"):
            MERGING["httm"](ratio=0.5, **knobs)
    assert MERGING["httm"](ratio=0.5, outliers=0.3).outliers == 0.3  # type: ignore[union-attr]


LISTS = ([1, 2], [[1], "a"], {"a": 1}, {1, 2}, np.arange(3), torch.arange(3), bytearray(b"a"))


@pytest.mark.parametrize("value", LISTS, ids=[type(value).__name__ for value in LISTS])
def test_knobs_are_hashable_or_refused(tiny: nn.Module, name: str, value: Any) -> None:
    """As settings files and notebooks give them; describe groups methods by what they are."""
    for knob in knobs_of(name):
        found = made(name, **{knob: value})
        if isinstance(found, str):
            assert found.startswith(f"{name}: ")
            assert f"{knob}=" in found
            continue
        hash(found)
        geoaccel.accelerate(tiny, merging=found)
        assert len(geoaccel.describe(tiny).merging) == 1


def test_whole_numbers_are_whole(name: str) -> None:
    for knob in {"seed", "tap"} & set(knobs_of(name)):
        for value in ("abc", 1.5, True, [1]):
            with pytest.raises(ValueError, match=rf"{name}: {knob}=.* must be a whole number"):
                make(name, **{knob: value})
