"""Measurements of an earlier plan: its errors are reused for another budget, on the same model and photographs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoaccel.console import expand
from geoaccel.errors import UserError
from geoaccel.eval.tuning.trials import NAMES, Errors
from geoaccel.fingerprint import difference

MADE_OF, TRIALS = "made_of", "trials"
"""Entries of a plan's .json: what determines errors, and the errors of every change that was tried."""


@dataclass(frozen=True)
class Earlier:
    """The measurements of an earlier plan.

    Attributes:
        path: Path of the file.
        made_of: What determined its errors, as plain data.
        trials: Errors by set and change.
    """

    path: Path
    made_of: dict[str, Any]
    trials: dict[str, Errors]

    @classmethod
    def read(cls, given: str) -> Earlier:
        """From the JSON that ``geoaccel tune`` wrote.

        Raises:
            UserError: If it is not such a file.
        """
        path = expand(given)
        try:
            document = json.loads(path.read_text())
            trials = {
                change: {name: float(errors[name]) for name in NAMES} for change, errors in document[TRIALS].items()
            }
            return cls(path, dict(document[MADE_OF]), trials)
        except FileNotFoundError:
            raise UserError(f"--measured {path}: there is no such file; give the .json written with a plan") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            why = "has no measurements"
            raise UserError(f"--measured {path} {why}; give the .json written with a plan") from None

    def errors(self, made_of: Mapping[str, Any]) -> dict[str, Errors]:
        """The errors, if measured under the same conditions.

        Raises:
            UserError: Naming what differs.
        """
        if (other := difference(self.made_of, json.loads(json.dumps(made_of)))) is not None:
            raise UserError(f"--measured {self.path} does not match this run ({other}); leave it out")
        return dict(self.trials)

    @staticmethod
    def document(made_of: Mapping[str, Any], trials: Mapping[str, Errors]) -> dict[str, Any]:
        """The entries that `read` expects, as plain data."""
        return {MADE_OF: dict(made_of), TRIALS: dict(trials)}
