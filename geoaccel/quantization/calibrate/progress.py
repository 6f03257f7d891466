"""Progress of a long computation on disk, so that an interrupted one resumes.

It is in a folder next to the result, created with the first partial result and removed when the result is written.
Files in it are written atomically.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoaccel.atomic import write_tensors, write_text
from geoaccel.errors import UserError
from geoaccel.fingerprint import difference


class Progress:
    """The folder.

    Args:
        folder: Created when there is something to keep.
        config: Everything that determines the result.

    Raises:
        ValueError: If the folder belongs to a computation with other settings, or is damaged.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.begun = False
        self.config = wanted = json.loads(json.dumps(config, sort_keys=True))
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is in the way; move it, or choose another output file")
        files = list(self.folder.iterdir()) if self.folder.exists() else []
        others = [path for path in files if path.suffix != ".tmp" and path.name != "config.json"]
        found = self.read("config")
        if found is None and others:
            raise UserError(f"{self.folder} is in the way; move it, or choose another output file")
        if found != wanted and others:  # where nothing was found yet, there is nothing to lose
            raise UserError(
                f"{self.folder} contains unfinished work with other settings ({difference(found, wanted)}); finish it "
                "with those, delete the folder, or choose another output file"
            )

    def read(self, name: str) -> Any:
        """The data written under a name; None if there is none.

        Raises:
            ValueError: If it cannot be read.
        """
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} and start anew") from None

    def write(self, name: str, value: Any) -> None:
        """Store plain data."""
        self._begin()
        self._replace(name, value)

    def _begin(self) -> None:
        if not self.begun:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace("config", self.config)
            self.begun = True

    def _replace(self, name: str, value: Any) -> None:
        write_text(self.folder / f"{name}.json", json.dumps(value))

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes stored under a name; None if there are none.

        Raises:
            ValueError: If they cannot be read.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["notes"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.folder} and start anew") from None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Store tensors with notes."""
        self._begin()
        plain = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        write_tensors(self.folder / f"{name}.safetensors", plain, {"notes": json.dumps(dict(notes))})

    def finish(self) -> None:
        """Remove the folder, once the result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.begun = False
