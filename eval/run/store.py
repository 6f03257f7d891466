"""Predictions on disk: one file a scene, and the configuration that made them.

    run/
      config.json                       what made the predictions; another configuration is refused
      predictions/<scene>.safetensors   geometry, frame names, transforms, images, what merging did, what made it;
                                        of a sequence in windows the trajectory, in place of the geometry
      windows/<configuration>/<scene>/  windows of a sequence that is not done yet

A file appears under its name only when it is complete, so whatever is there counts, and a run that was killed continues
with the scenes that are missing. Where nothing was predicted yet another configuration takes the folder over: a typo
must not block it. Windows of the one before stay until something is predicted, as it may come back; no other has them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoaccel.atomic import atomic_tensors, write_text
from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.made_by import MADE_BY
from geoaccel.eval.run.sequences import AutoLengths
from geoaccel.eval.run.trajectory import Trajectory
from geoaccel.fingerprint import difference, of_bytes, of_json
from geoaccel.images import ImageTransform

CONFIG = "config.json"
SCORES = "scores.json"
WINDOWS = "windows"

Photographs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prediction:
    """One scene as it was predicted.

    Attributes:
        geometry: B = 1, float32, on the CPU; of a sequence in windows its trajectory.
        frames: Names of the frames, in order.
        transforms: From the images to the network input; none of a sequence in windows.
        effective_ratio: 1 - M / N of the merged tokens; None where nothing merges.
        effective_key_ratio: The same of keys.
        photographs: Size in bytes and time of the last change of each; empty where they are rendered.
        made_by: The code, the machine and the versions, as plain data.
    """

    geometry: Geometry | Trajectory
    frames: tuple[str, ...]
    transforms: list[ImageTransform]
    effective_ratio: float | None = None
    effective_key_ratio: float | None = None
    photographs: Photographs = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)


class Origin(NamedTuple):
    """Origin of a prediction: what it was made from and by; see :class:`Prediction`."""

    frames: tuple[str, ...]
    photographs: Photographs
    made_by: Mapping[str, Any]


class Store:
    """The folder of one evaluation run.

    Args:
        folder: Made if it is not there.
        config: What makes the predictions: everything that changes them, and nothing else.
        auto: Of a run in windows whose length is left to the memory.

    Attributes:
        renewed: Scene to the reason why its prediction was removed.

    Raises:
        ValueError: If the folder holds predictions of another configuration.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], auto: AutoLengths | None = None) -> None:
        self.folder, self.auto = Path(folder), auto
        self.predictions = self.folder / "predictions"
        self.renewed: dict[str, str] = {}
        self.config: dict[str, Any] = json.loads(json.dumps(config, sort_keys=True))
        path = self.folder / CONFIG
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
        return cls(folder, json.loads((Path(folder) / CONFIG).read_text()))

    def _is_another(self, path: Path) -> bool:
        """Whether another configuration stands there. One under which something was predicted is refused."""
        try:
            found = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged; choose another out folder, or delete this one")
        # Without a folder of predictions the file is not ours; with scores it is what made them.
        unused = self.predictions.is_dir() and self.empty and not (self.folder / SCORES).exists()
        different = difference(found, self.config)
        if different is not None and not unused:
            raise UserError(
                f"{self.folder} holds predictions of another configuration ({different}); choose another folder "
                "(out=FOLDER), or delete this one"
            )
        return different is not None

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
            found = json.loads((self.folder / CONFIG).read_text())
        except (OSError, ValueError):
            found = None
        if found != self.config:
            raise UserError(f"another evaluation writes to {self.folder} now; give each an out folder of its own")

    def holds(self, scene: EvalScene, makers: Collection[Mapping[str, Any]]) -> bool:
        """Whether a prediction is there that still counts; one that does not is removed for a new one.

        It must be of the scene's frames, of its images as they are now, and made by one of `makers`
        (:func:`geoaccel.eval.run.made_by.made_by`): the same code, versions and machine. A damaged one counts, as that
        is said when it is read.

        Raises:
            ValueError: If the folder is another evaluation's by now.
        """
        self.require_own()
        if scene.name not in self:
            return False
        with suppress(UserError):
            changed = _change(self.made_from(scene.name), scene, makers)
            if changed is not None:
                self.renewed[scene.name] = changed
                self.remove(scene.name)
        return scene.name in self

    def sweep(self) -> None:
        """Remove what a killed run left half-written; only while no other run writes here."""
        for leftover in self.predictions.glob("*.tmp"):
            leftover.unlink()

    def path(self, scene: str) -> Path:
        """File of a scene."""
        return self.predictions / f"{self.plain_name(scene)}.safetensors"

    def unfinished(self, scene: str) -> Path:
        """Where the windows of a sequence are while they come: no other configuration looks there."""
        return self.folder / WINDOWS / of_json(self.config) / self.plain_name(scene)

    def plain_name(self, scene: str) -> str:
        """Name of a scene for a file; one that is no plain file name gets a hash, so that no two share a file."""
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in scene)[:100]
        if safe != scene or safe.startswith("."):
            safe = f"{safe.lstrip('.')}-{of_bytes(scene.encode())[:12]}"
        return safe

    def __contains__(self, scene: str) -> bool:
        return self.path(scene).exists()

    def write(self, scene: str, prediction: Prediction) -> None:
        """Keep a prediction.

        Raises:
            ValueError: If the folder is another evaluation's by now.
        """
        found = prediction.geometry
        tensors = vars(found)
        if isinstance(found, Geometry):
            tensors = {name: tensor.float().cpu() for name, tensor in tensors.items()}
        notes = {
            "scene": scene,
            "frames": prediction.frames,
            "transforms": [asdict(transform) for transform in prediction.transforms],
            "effective_ratio": prediction.effective_ratio,
            "effective_key_ratio": prediction.effective_key_ratio,
            "photographs": prediction.photographs,
            MADE_BY: prediction.made_by,
        }
        with atomic_tensors(self.path(scene), tensors, {"notes": json.dumps(notes)}):
            self.require_own()
        self._forget_windows(scene)

    def _forget_windows(self, scene: str) -> None:
        """Remove windows of a sequence that is done, and of other configurations: from now on these are refused."""
        own = self.unfinished(scene)
        shutil.rmtree(own, ignore_errors=True)
        for other in (self.folder / WINDOWS).glob("*"):
            if other.name != own.parent.name:
                shutil.rmtree(other, ignore_errors=True)

    def made_from(self, scene: str) -> Origin:
        """Origin of a prediction, from the head of its file.

        Raises:
            ValueError: If the file is damaged.
        """
        with self._reading(scene) as (_, notes):
            return _origin(notes)

    def remove(self, scene: str) -> None:
        """Remove a prediction."""
        self.path(scene).unlink(missing_ok=True)

    def read(self, scene: str) -> Prediction:
        """Read a prediction back.

        Raises:
            ValueError: If the file is damaged.
        """
        with self._reading(scene) as (file, notes):
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            transforms = [ImageTransform(**{k: tuple(v) for k, v in t.items()}) for t in notes["transforms"]]
            origin = _origin(notes)
            ratios = notes["effective_ratio"], notes["effective_key_ratio"]
            kind = Trajectory if "part_poses" in tensors else Geometry
            return Prediction(kind(**tensors), origin.frames, transforms, *ratios, origin.photographs, origin.made_by)

    @contextmanager
    def _reading(self, scene: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The open file of a prediction and its notes; what is wrong with either is one line."""
        path = self.path(scene)
        try:
            with safe_open(path, "pt") as file:
                yield file, json.loads(file.metadata()["notes"])
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and run again") from None


def discard_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused, unless more is in it than its configurations."""
    if all(path.is_dir() or path.name == CONFIG for path in folder.rglob("*")):
        shutil.rmtree(folder, ignore_errors=True)


def photographs(scene: EvalScene) -> Photographs:
    """Size and time of the images, which tell that some were replaced under the same names.

    Raises:
        OSError: If one is not there.
    """
    stats = [path.stat() for path in scene.image_paths]
    return tuple((found.st_size, found.st_mtime_ns) for found in stats)


def _change(origin: Origin, scene: EvalScene, makers: Collection[Mapping[str, Any]]) -> str | None:
    """Why a prediction no longer counts."""
    if not any(difference(origin.made_by, maker) is None for maker in makers):
        return difference(origin.made_by, next(iter(makers), {})) or "it was made elsewhere"
    if origin.frames != tuple(frame.name for frame in scene.frames):
        return "its frames are others"
    with suppress(OSError):  # without images there is nothing to make it anew from
        if origin.photographs != photographs(scene):
            return "its images were replaced"
    return None


def _origin(notes: Mapping[str, Any]) -> Origin:
    stamps = tuple((size, changed) for size, changed in notes.get("photographs", ()))
    return Origin(tuple(notes["frames"]), stamps, notes.get(MADE_BY, {}))
