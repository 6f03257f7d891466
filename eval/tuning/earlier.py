"""What an earlier plan was chosen by: its errors serve another budget, on the same model and photographs."""

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
"""Entries of the figures beside a plan: what decides errors, and the errors of every change that was tried."""


@dataclass(frozen=True)
class Earlier:
    """The figures beside an earlier plan.

    Attributes:
        path: Of the file.
        made_of: What decided its errors, as plain data.
        trials: Errors by set and change.
    """

    path: Path
    made_of: dict[str, Any]
    trials: dict[str, Errors]

    @classmethod
    def read(cls, given: str) -> Earlier:
        """From the JSON that ``geoaccel tune`` wrote.

        Raises:
            UserError: If it is no such file.
        """
        path = expand(given)
        try:
            document = json.loads(path.read_text())
            trials = {
                change: {name: float(errors[name]) for name in NAMES} for change, errors in document[TRIALS].items()
            }
            return cls(path, dict(document[MADE_OF]), trials)
        except FileNotFoundError:
            raise UserError(f"--measured {path}: there is no such file; give the .json beside a plan") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            why = "holds nothing that was measured"
            raise UserError(f"--measured {path} {why}; give the .json beside a plan") from None

    def errors(self, made_of: Mapping[str, Any]) -> dict[str, Errors]:
        """The errors, where they were found on the same.

        Raises:
            UserError: Naming what is another now.
        """
        if (other := difference(self.made_of, json.loads(json.dumps(made_of)))) is not None:
            raise UserError(f"--measured {self.path} is of something else ({other}); leave it out")
        return dict(self.trials)

    @staticmethod
    def document(made_of: Mapping[str, Any], trials: Mapping[str, Errors]) -> dict[str, Any]:
        """What `read` looks for, as plain data."""
        return {MADE_OF: dict(made_of), TRIALS: dict(trials)}
