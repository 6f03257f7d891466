"""Conformance rules for merging methods on every backbone, whether part of this package or not.

    from geoaccel.testing import check_merging_method

    def test_strided_keys() -> None:
        check_merging_method(StridedKeys)

A broken rule raises an ``AssertionError`` that names it and says what was seen. To test each rule separately, run
:func:`check_rule` over ``MERGING_RULES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from geoaccel.backbone import BACKBONES
from geoaccel.merging.method import Merging
from geoaccel.testing import model_rules, token_rules
from geoaccel.testing.rules import MERGING_RULES, Trial, check_rule, tiny_network


def check_merging_method(
    method: Callable[..., Merging],
    backbones: Iterable[str] | None = None,
    *,
    knobs: Mapping[str, Any] | None = None,
    nothing: Mapping[str, Any] | None = None,
) -> None:
    """Check a merging method against all rules, on tiny networks with random weights.

    The method needs the knob ``bypass``, which is switched off: networks this small would otherwise stay dense.

    Args:
        method: Its class.
        backbones: Registered names; all by default.
        knobs: For a method that cannot be constructed with its defaults, or does not act with them.
        nothing: Knobs with which it merges nothing; ``ratio=0`` by default.

    Raises:
        AssertionError: At the first rule that is broken: which, on which backbone, and why.
        ValueError: For an unknown backbone.
    """
    for backbone in BACKBONES if backbones is None else backbones:
        trial = Trial(method, tiny_network(backbone), knobs or {}, {"ratio": 0} if nothing is None else nothing)
        for rule in MERGING_RULES:
            check_rule(rule, trial)


__all__ = [
    "MERGING_RULES",
    "Trial",
    "check_merging_method",
    "check_rule",
    "model_rules",
    "tiny_network",
    "token_rules",
]
