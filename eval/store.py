"""Predictions on disk: one file a scene, and the configuration that made them.

    run/
      config.json                       what made the predictions; another configuration is refused
      predictions/<scene>.safetensors   geometry, frame names, transforms, what merging did

A file appears under its name only when it is complete, so whatever is there counts, and a run that was killed continues
with the scenes that are missing.
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
from geoaccel.images import ImageTransform


@dataclass(frozen=True)
class Prediction:
    """One scene as it was predicted.

    Attributes:
        geometry: B = 1, float32, on the CPU.
        frames: Names of the frames, in order.
        transforms: From the photographs to the network input.
        effective_ratio: 1 - M / N of the merged tokens; None where nothing merges.
    """

    geometry: Geometry
    frames: tuple[str, ...]
    transforms: list[ImageTransform]
    effective_ratio: float | None = None


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
        path = self.folder / "config.json"
        wanted = json.loads(json.dumps(config, sort_keys=True))
        if path.exists():
            self._refuse_another(path, wanted)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no evaluation; choose another out folder")
        self.predictions = self.folder / "predictions"
        self.predictions.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store of a folder that another process has made."""
        return cls(folder, json.loads((Path(folder) / "config.json").read_text()))

    def _refuse_another(self, path: Path, wanted: dict[str, Any]) -> None:
        try:
            found = json.loads(path.read_text())
            different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError):
            raise ValueError(f"{path} is damaged; choose another out folder, or delete this one") from None
        if different:
            key = different[0]
            raise ValueError(
                f"{self.folder} holds predictions of another configuration ({key} was {found.get(key)!r}, is now "
                f"{wanted.get(key)!r}); choose another out folder, or delete this one"
            )

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
        """Keep a prediction."""
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in vars(prediction.geometry).items()}
        notes = {
            "scene": scene,
            "frames": prediction.frames,
            "transforms": [asdict(transform) for transform in prediction.transforms],
            "effective_ratio": prediction.effective_ratio,
        }
        path = self.path(scene)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, {"notes": json.dumps(notes)})
        os.replace(temporary, path)

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
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None
        return Prediction(geometry, tuple(notes["frames"]), transforms, notes["effective_ratio"])


def write_text(path: Path, text: str) -> None:
    """Write a file that is either complete or not there."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
