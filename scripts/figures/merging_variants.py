"""Measured variants of merging: their names, methods and knobs, and the baseline of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from geoaccel.errors import UserError
from geoaccel.eval.tuning.choices import acting
from geoaccel.merging import MERGING
from geoaccel.merging.layers import plain
from geoaccel.registry import make, unknown
from geoaccel.tuned import TunedPlan

Knobs = dict[str, dict[Any, Any]]
"""Knobs by name of the method; or, under ``layers``, the method of each layer."""

LAYERS = "layers"

ALWAYS: dict[str, Any] = {"bypass": False}
"""Knobs of every method: variants measure the effect of an active method, not whether it would be bypassed."""

DENSE = "dense"
FREE = "free attention"
"""Free global attention: every token keeps its own value. No method saves more; its cameras are meaningless."""

GROUPS: dict[str, dict[str, Knobs]] = {
    "published": {name: {name: {}} for name in ("httm", "litevggt", "fastvggt", "come", "avggt")},
    "ours": {
        "asymmetric": {"asymmetric": {}},
        "alike": {"alike": {}},
        "litevggt, random targets": {"litevggt": {"targets": "random"}},
    },
    "compositions": {name: {part: {} for part in name.split("+")} for name in ("come+httm", "alike+httm")},
    "ablations": {
        "litevggt, released choice": {"litevggt": {"released_code": True}},
        "alike, random groups": {"come": {"choose": "random", "group": None}},
        "alike, most confident groups": {"come": {"choose": "most_confident", "group": None}},
        "httm, no outlier filter": {"httm": {"outliers": 0}},
        "alike, least confident groups": {"come": {"group": None}},
        "alike, first frame kept": {"alike": {"anchor": True}},
        "httm, whole pictures": {"httm": {"block": "spatial-first"}},
        "httm, no anchor": {"httm": {"anchor": False}},
        "litevggt, keys weighed": {"litevggt": {"targets": "random", "log_bias": True}},
        "alike, direct": {"alike": {"variant": "direct"}},
        "httm, keys weighed": {"httm": {"log_bias": True}},
        "httm, outliers of each head": {"httm": {"adaptive": False}},
        "fastvggt, keys weighed": {"fastvggt": {"log_bias": True}},
        "fastvggt, released choice": {"fastvggt": {"released_code": True}},
    },
}
NAMED: dict[str, Knobs] = {DENSE: {}} | {name: knobs for group in GROUPS.values() for name, knobs in group.items()}
BASES = dict.fromkeys(["litevggt, released choice", "litevggt, keys weighed"], "litevggt, random targets")
"""Baseline of a variant if it is not the method before its comma."""


def base(name: str) -> str:
    """The baseline of a variant."""
    return BASES.get(name, name.partition(",")[0])


def chosen(given: list[str]) -> dict[str, Knobs]:
    """Variants by name, with all their knobs.

    Args:
        given: Names of groups or of variants, any method with knobs (``asymmetric, stride=4, anchor=false``), a plan
            of ``geoaccel tune`` (``*.yaml``), which acts wherever it says, or ``FREE``.

    Raises:
        UserError: For an unknown name, method or knob.
    """
    found: dict[str, Knobs] = {}
    for name in given:
        if name in GROUPS:
            found |= GROUPS[name]
        elif name in NAMED:
            found[name] = NAMED[name]
        elif name == FREE:
            found[name] = {FREE: {}}
        elif name.endswith(".yaml"):
            found[Path(name).stem] = _planned(name)
        elif "=" in name:
            found[name] = _spelled(name)
        else:
            raise UserError(
                unknown("variant", name, [*GROUPS, *NAMED, FREE]) + "; or a method with knobs: 'httm, outliers=0'"
            )
    plans = {name: methods for name, methods in found.items() if LAYERS in methods or FREE in methods}
    variants = {name: {m: knobs | ALWAYS for m, knobs in found[name].items()} for name in found if name not in plans}
    for methods in variants.values():
        for method, knobs in methods.items():
            make(MERGING, method, knobs)  # rejects wrong knobs before anything is measured
    return {name: {**variants, **plans}[name] for name in found}


def _planned(path: str) -> Knobs:
    """The methods of each layer in a plan, without bypass."""
    plan = TunedPlan.read(path)
    if plan.quantization:
        raise UserError(f"plan {path} also quantizes, which is not measured here; tune without --max-memory")
    return {LAYERS: {first: plain(acting(method)) for first, _, method in plan.layers.entries}}


def _spelled(name: str) -> Knobs:
    """``asymmetric, stride=4`` as a method with knobs."""
    method, *settings = (part.strip() for part in name.split(", "))
    pairs = [setting.partition("=") for setting in settings]
    if not all(knob and sign and value for knob, sign, value in pairs):
        raise UserError(f"variant {name!r}: write a method and its knobs, such as 'asymmetric, stride=4, anchor=false'")
    return {method: {knob: yaml.safe_load(value) for knob, _, value in pairs}}
