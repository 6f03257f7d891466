"""Predictions for one window of a sequence, and the folder that stores them during a run.

A window is on disk as soon as it is predicted, so that a killed run resumes after it. Depth is stored in float16
relative to the window's median, confidence as 255 ranks, and pixels as network input, so that frames shared with the
next window or a loop are not decoded again.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoaccel.atomic import write_tensors, write_text
from geoaccel.cameras import unproject_depth
from geoaccel.claims import resolve
from geoaccel.fingerprint import difference
from geoaccel.images import ImageTransform
from geoaccel.images.read import one_line
from geoaccel.manifest import UNFINISHED
from geoaccel.windows.identity import of_old

logger = logging.getLogger(__name__)

RANKS = 255
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Frame:
    """One frame of a sequence.

    Attributes:
        name: Name of its image.
        picture: Index of its image among those given.
        transform: From the image to the network input.
    """

    name: str
    picture: int
    transform: ImageTransform


@dataclass(frozen=True, eq=False)
class Window:
    """The F frames of one forward: consecutive, or the two halves of a loop.

    Attributes:
        start: Index of its first frame in the sequence.
        frames: Its new frames.
        pixels: Network input [F, 3, H, W], uint8.
        valid: True where it shows the image [F, H, W].
        cam_from_world: [F, 4, 4], in the window's own world.
        intrinsics: [F, 3, 3].
        depth: [F, H, W].
        rank: Rank of every pixel by confidence [F, H, W], uint8 from 1 to 255; 0 for unusable pixels.
        features: Encoder features [F, C]; None if the network gives none.
        unit: Unit of lengths.
        left_out: Images that would have been new in it, and why each cannot be used.
    """

    start: int
    frames: list[Frame]
    pixels: Tensor
    valid: Tensor
    cam_from_world: Tensor
    intrinsics: Tensor
    depth: Tensor
    rank: Tensor
    features: Tensor | None
    unit: str
    left_out: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def stop(self) -> int:
        """Index of the frame after its last one."""
        return self.start + len(self)

    @property
    def size(self) -> float:
        """Size of its scene, in its own unit: the median depth."""
        seen = self.depth[self.rank > 0]
        return float(seen.median()) if len(seen) else 1.0

    def points(self, rows: slice | list[int]) -> Tensor:  # [f, H, W, 3]
        """World points of some of its frames."""
        return unproject_depth(self.depth[rows], self.intrinsics[rows], self.cam_from_world[rows])

    def weights(self, rows: slice | list[int], least: float) -> Tensor:  # [f, H, W], in [0, 1]
        """Confidence of their pixels, by rank; 0 for the least confident fraction `least` of the window."""
        weights = self.rank[rows].float() / RANKS
        return weights.where(weights > least, 0.0)


def ranked(
    conf: Tensor,  # [F, H, W]
    mask: Tensor,  # [F, H, W]
) -> Tensor:  # [F, H, W], uint8
    """Confidence as `Window.rank`: its rank among the usable pixels."""
    rank = torch.zeros(conf.shape, dtype=torch.uint8)
    values = conf[mask]
    places = torch.empty(len(values), dtype=torch.long)
    places[values.argsort(stable=True)] = torch.arange(len(values))
    rank[mask] = (1 + places * RANKS // max(1, len(values))).to(torch.uint8)
    return rank


class Store:
    """The folder of one run: its settings, and a file for every window and every loop that was tried.

    Args:
        out: The output folder of the run, locked by the caller (`geoaccel.claims.claimed`).
        settings: Settings of the run, as plain data. Windows of an earlier run with other settings are removed.

    Attributes:
        discarded: The setting that differs, if something was removed.
    """

    def __init__(self, out: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = unfinished_folder(resolve(out))
        self.discarded: str | None = None
        settings = json.loads(json.dumps(settings))
        before, damaged = self._before()
        if damaged is not None:
            self.discarded = f"{damaged} is damaged"
        if before is not None and (changed := difference(of_old(before, settings), settings)):
            self.discarded, before = changed, None
        if before is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        if before != settings:
            write_text(self.folder / SETTINGS, json.dumps(settings, indent=1))

    def _before(self) -> tuple[dict[str, Any] | None, str | None]:
        """Settings of an earlier run, None if there is nothing to resume; and a damaged file, if any."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                found[path.name] = json.loads(path.read_text())
            except ValueError:  # windows are useless without their settings or lengths
                return None, path.name
        return found.get(SETTINGS), None

    def note(self, name: str, value: Any) -> Any:
        """A value chosen by the first run, for all runs that resume it."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_text(path, json.dumps(value))
        return json.loads(path.read_text())

    def has(self, name: str) -> bool:
        """Whether this window or loop exists; one that cannot be read is removed, to be predicted again."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:  # which checks the length of the file
                json.loads(file.metadata()["window"])
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s is damaged (%s) and will be predicted again", path, one_line(error))
            path.unlink(missing_ok=True)
            return False
        return True

    def write(self, name: str, window: Window) -> None:
        """Store a window atomically."""
        size = window.size
        tensors = {
            "pixels": window.pixels,
            "valid": window.valid,
            "cam_from_world": window.cam_from_world,
            "intrinsics": window.intrinsics,
            "depth": (window.depth / size).clamp(max=6e4).half(),
            "rank": window.rank,
            **({} if window.features is None else {"features": window.features}),
        }
        about = {"start": window.start, "size": size, "unit": window.unit, "frames": [asdict(f) for f in window.frames]}
        about["left_out"] = window.left_out
        write_tensors(self._path(name), tensors, {"window": json.dumps(about)})

    def about(self, name: str) -> tuple[list[Frame], Tensor | None, int, int]:
        """New frames of a window, the features of all its frames, and its first and last + 1 frame."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            about = json.loads(file.metadata()["window"])
            named = "features" in file.keys()  # noqa: SIM118 (no mapping)
            # A copy: the tensor itself would keep the whole file mapped.
            features = file.get_tensor("features").clone() if named else None
            count = file.get_slice("rank").get_shape()[0]
        return _frames(about["frames"]), features, about["start"], about["start"] + count

    def read(self, name: str) -> Window:
        """A stored window, from this run or an earlier one."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            about = json.loads(file.metadata()["window"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        depth = tensors.pop("depth").float() * about["size"]
        features = tensors.pop("features", None)
        frames = _frames(about["frames"])
        tensors |= {"depth": depth, "features": features}
        return Window(about["start"], frames, unit=about["unit"], left_out=about["left_out"], **tensors)

    def left_out(self, name: str) -> dict[str, str]:
        """Images that were left out where a window was made, and why."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            return dict(json.loads(file.metadata()["window"])["left_out"])

    def own_poses(self, name: str) -> tuple[int, Tensor]:
        """First frame of a window, and its poses in its own world [F, 4, 4]."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            return json.loads(file.metadata()["window"])["start"], file.get_tensor("cam_from_world").clone()

    def pixels(self, name: str, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Network input of some frames of a window, and where it shows the image; nothing else is read."""
        from safetensors import safe_open

        with safe_open(self._path(name), framework="pt") as file:
            pixels, valid = file.get_slice("pixels"), file.get_slice("valid")
            own = [(pixels[row : row + 1].clone(), valid[row : row + 1].clone()) for row in rows]
        return torch.cat([one for one, _ in own]), torch.cat([one for _, one in own])

    def remove(self) -> None:
        """Remove everything, once the result is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def unfinished_folder(out: Path) -> Path:
    """The folder of the windows of an unfinished run: in the output folder if that exists, else next to it."""
    inside, beside = out / UNFINISHED, out.parent / f".{out.name}{UNFINISHED}"
    if os.path.lexists(beside):  # the output folder was created since
        return beside
    return inside if out.is_dir() else beside


def _frames(rows: Sequence[Mapping[str, Any]]) -> list[Frame]:
    def pair(values: Sequence[Any]) -> tuple[Any, Any]:
        return values[0], values[1]

    return [
        Frame(row["name"], row["picture"], ImageTransform(**{k: pair(v) for k, v in row["transform"].items()}))
        for row in rows
    ]


def reader(store: Store, names: Sequence[str]) -> Callable[[int], Window]:
    """Reader of windows by number; the last few stay in memory."""

    @functools.lru_cache(maxsize=3)
    def read(number: int) -> Window:
        return store.read(names[number])

    return read
