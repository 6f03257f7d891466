"""What every merging method says of knobs and photographs that it cannot take."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conformance import knobs_of, make, run
from merging_scenes import photographs
from torch import nn

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
