"""Knobs of any frozen dataclass, a method of somebody else too: hashable once it is made, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from geoaccel.errors import UserError
from geoaccel.knobs import check_knobs


@dataclass(frozen=True)
class Method:
    """A knob that its own class does not look at."""

    free: Any = None

    def __post_init__(self) -> None:
        check_knobs(self, "mine")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([1, 2], (1, 2)),
        ([[1], "a"], ((1,), "a")),
        (np.arange(3), (0, 1, 2)),
        (torch.tensor([[1, 2]]), ((1, 2),)),
        ("word", "word"),
    ],
)
def test_rows_become_tuples(given: Any, kept: Any) -> None:
    made = Method(given)
    assert made.free == kept
    assert hash(made) == hash(Method(kept))


@pytest.mark.parametrize("given", [{"a": 1}, {1, 2}, bytearray(b"a")], ids=["dict", "set", "bytearray"])
def test_what_cannot_be_hashed_is_refused(given: Any) -> None:
    with pytest.raises(UserError, match=rf"mine: free=.* contains a {type(given).__name__}; give plain values"):
        Method(given)
