"""What commands print for other programs is JSON, whatever it holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geoaccel.console import print_json
from geoaccel.refine import Adjustment


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    nested = {
        "a": float("nan"),
        "b": [1, float("-inf"), {"c": (2.5, None)}],
        "d": "NaN",
        "e": True,
        "f": np.float64("nan"),
    }
    print_json(nested)
    line = capsys.readouterr().out

    def never(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(line, parse_constant=never) == {
        "a": None, "b": [1, None, {"c": [2.5, None]}], "d": "NaN", "e": True, "f": None,
    }  # fmt: skip
    assert line.count("\n") == 1


def test_an_adjustment_that_changed_nothing_has_no_errors() -> None:
    done = Adjustment(changed=False, reason="too few")
    assert (done.error_before, done.error_after) == (None, None)
    assert str(done) == "bundle adjustment changed nothing: too few"
