"""What of all that is known a network is told."""

from __future__ import annotations

import pytest
import torch

from geoaccel.backbone import Conditioning
from geoaccel.conditions import Conditions
from geoaccel.inputs import _told

POSES, INTRINSICS = torch.eye(4).expand(2, 4, 4), torch.eye(3).expand(2, 3, 3)


def conditioning(*takes: str, together: bool = False) -> Conditioning:
    return Conditioning(takes, arguments=lambda conditions: {}, together=together)


@pytest.mark.parametrize(
    ("given", "backbone", "told"),
    [
        (("intrinsics",), None, ()),
        (("intrinsics",), conditioning("depths"), ()),
        (("intrinsics",), conditioning("poses", "intrinsics"), ("intrinsics",)),
        (("intrinsics",), conditioning("poses", "intrinsics", together=True), ()),
        (("poses", "intrinsics"), conditioning("poses", "intrinsics", together=True), ("poses", "intrinsics")),
    ],
    ids=["nothing is taken", "something else is", "taken", "not taken alone", "taken together"],
)
def test_intrinsics_are_told_where_they_are_taken(
    given: tuple[str, ...], backbone: Conditioning | None, told: tuple[str, ...]
) -> None:
    """The result has them in any case; other kinds that are not taken are refused before."""
    known = {"poses": POSES, "intrinsics": INTRINSICS}
    assert _told(Conditions(**{kind: known[kind] for kind in given}), backbone).given == told
