"""Predictions on disk: one file a scene, and the configuration that made them.

    run/
      config.json                       what made the predictions; another configuration is refused
      predictions/<scene>.safetensors   geometry, frame names, transforms, which photographs, what merging did

A file appears under its name only when it is complete, so whatever is there counts, and a run that was killed continues
with the scenes that are missing. Where nothing was predicted yet another configuration takes the folder over: a typo
must not spoil it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.images import ImageTransform

SCORES = "scores.json"
TIMING = "timing.json"

Photographs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prediction:
    """One scene as it was predicted.

    Attributes:
        geometry: B = 1, float32, on the CPU.
        frames: Names of the frames, in order.
        transforms: From the photographs to the network input.
        effective_ratio: 1 - M / N of the merged tokens; None where nothing merges.
        photographs: Size in bytes and time of the last change of each; empty where they are rendered.
    """

    geometry: Geometry
    frames: tuple[str, ...]
    transforms: list[ImageTransform]
    effective_ratio: float | None = None
    photographs: Photographs = ()


class Store:
    """The folder of one evaluation run.

    Args:
        folder: Made if it is not there.
        config: What makes the predictions: everything that changes them, and nothing else.

    Raises:
        ValueError: If the folder holds predictions of another configuration.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.predictions = self.folder / "predictions"
        self.config: dict[str, Any] = json.loads(json.dumps(config, sort_keys=True))
        path = self.folder / "config.json"
        ours = path.exists() and not self._is_another(path)
        if not path.exists() and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is not empty and holds no evaluation; choose another out folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not ours:
            write_text(path, json.dumps(self.config, indent=1, sort_keys=True) + "\n")
        self.predictions.mkdir(exist_ok=True)

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store of a folder that another process has made."""
        return cls(folder, json.loads((Path(folder) / "config.json").read_text()))

    def _is_another(self, path: Path) -> bool:
        """Whether another configuration stands there. One under which something was predicted is refused."""
        try:
            found = json.loads(path.read_text())
            different = sorted(key for key in {*found, *self.config} if found.get(key) != self.config.get(key))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged; choose another out folder, or delete this one") from None
        # Without a folder of predictions the file is somebody else's; with scores it is what made them.
        unused = self.predictions.is_dir() and self.empty and not (self.folder / SCORES).exists()
        if different and not unused:
            key = different[0]
            raise UserError(
                f"{self.folder} holds predictions of another configuration ({key} was {found.get(key)!r}, is now "
                f"{self.config.get(key)!r}); choose another out folder, or delete this one"
            )
        return bool(different)

    @property
    def empty(self) -> bool:
        """Whether no scene was predicted yet."""
        return not any(self.predictions.glob("*.safetensors"))

    def require_own(self) -> None:
        """Refuse to go on where another evaluation took the folder over before anything was predicted.

        Raises:
            ValueError: If the configuration on disk is no longer this one.
        """
        try:
            found = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            found = None
        if found != self.config:
            raise UserError(f"another evaluation writes to {self.folder} now; give each an out folder of its own")

    def sweep(self) -> None:
        """Remove what a killed run left half-written; only while nobody else writes here."""
        for leftover in self.predictions.glob("*.tmp"):
            leftover.unlink()

    def path(self, scene: str) -> Path:
        """File of a scene; a name that is no plain file name gets a hash, so that no two share a file."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in scene)[:100]
        if safe != scene or safe.startswith("."):
            safe = f"{safe.lstrip('.')}-{hashlib.sha256(scene.encode()).hexdigest()[:12]}"
        return self.predictions / f"{safe}.safetensors"

    def __contains__(self, scene: str) -> bool:
        return self.path(scene).exists()

    def write(self, scene: str, prediction: Prediction) -> None:
        """Keep a prediction.

        Raises:
            ValueError: If the folder is another evaluation's by now.
        """
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in vars(prediction.geometry).items()}
        notes = {
            "scene": scene,
            "frames": prediction.frames,
            "transforms": [asdict(transform) for transform in prediction.transforms],
            "effective_ratio": prediction.effective_ratio,
            "photographs": prediction.photographs,
        }
        path = self.path(scene)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, {"notes": json.dumps(notes)})
        self.require_own()
        os.replace(temporary, path)

    def made_from(self, scene: str) -> tuple[tuple[str, ...], Photographs]:
        """The frames and photographs of a prediction, from the head of its file.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(scene)
        try:
            with safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
            return tuple(notes["frames"]), _photographs(notes)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _damaged(path, error) from None

    def remove(self, scene: str) -> None:
        """Let a prediction go."""
        self.path(scene).unlink(missing_ok=True)

    def read(self, scene: str) -> Prediction:
        """Read a prediction back.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(scene)
        try:
            with safe_open(path, "pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = json.loads(file.metadata()["notes"])
            transforms = [ImageTransform(**{k: tuple(v) for k, v in t.items()}) for t in notes["transforms"]]
            geometry = Geometry(**tensors)
            frames, photographs = tuple(notes["frames"]), _photographs(notes)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _damaged(path, error) from None
        return Prediction(geometry, frames, transforms, notes["effective_ratio"], photographs)


def _photographs(notes: Mapping[str, Any]) -> Photographs:
    # Predictions of earlier versions do not say; those of photographs are made anew.
    return tuple((size, changed) for size, changed in notes.get("photographs", ()))


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged ({error}); delete it and run again")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either complete or not there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
