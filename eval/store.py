"""Predictions on disk: one file a scene, and the configuration that made them.

    run/
      config.json                 what made the predictions; another configuration is refused
      predictions/<scene>.safetensors
      failures.json               scenes that could not be predicted, with the reason

A file appears under its name only when it is complete, so whatever is there counts, and a run that was killed continues
with the scenes that are missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoaccel.backbone import Geometry


@dataclass(frozen=True)
class Prediction:
    """One scene as it was predicted.

    Attributes:
        geometry: With B = 1, float32 on the CPU.
        latency_ms: Time of the forward that made it.
        peak_memory_gib: Largest memory during that forward.
    """

    geometry: Geometry
    latency_ms: float
    peak_memory_gib: float


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
        self.predictions.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        wanted = json.loads(json.dumps(config, sort_keys=True))
        if path.exists():
            found = json.loads(path.read_text())
            different = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            if different:
                key = different[0]
                raise ValueError(
                    f"{self.folder} holds predictions of another configuration ({key} was {found.get(key)!r}, is now "
                    f"{wanted.get(key)!r}); choose another out folder, or delete this one"
                )
        else:
            write_text(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    def path(self, scene: str) -> Path:
        """File of a scene; names with other characters than letters, digits, ``-_.`` get a hash in their place."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in scene)
        if safe != scene or safe.startswith("."):
            safe = f"{safe.lstrip('.')}-{hashlib.sha256(scene.encode()).hexdigest()[:8]}"
        return self.predictions / f"{safe}.safetensors"

    def __contains__(self, scene: str) -> bool:
        return self.path(scene).exists()

    def write(self, scene: str, prediction: Prediction) -> None:
        """Keep a prediction."""
        g = prediction.geometry
        tensors = {
            "cam_from_world": g.cam_from_world,
            "intrinsics": g.intrinsics,
            "depth": g.depth,
            "points_world": g.points_world,
            "conf": g.conf,
        }
        metadata = {
            "scene": scene,
            "latency_ms": repr(prediction.latency_ms),
            "peak_memory_gib": repr(prediction.peak_memory_gib),
        }
        path = self.path(scene)
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)

    def read(self, scene: str) -> Prediction:
        """Read a prediction back.

        Raises:
            ValueError: If the file is damaged.
        """
        try:
            with safe_open(self.path(scene), "pt") as file:
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        except SafetensorError as error:
            raise ValueError(f"{self.path(scene)} is damaged ({error}); delete it and run again") from error
        return Prediction(Geometry(**tensors), float(metadata["latency_ms"]), float(metadata["peak_memory_gib"]))

    def write_failures(self, failures: Mapping[str, str]) -> None:
        """Keep the reasons of the scenes that have no prediction."""
        write_text(self.folder / "failures.json", json.dumps(dict(failures), indent=1, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is either complete or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
