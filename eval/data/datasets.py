"""Names of datasets to their readers.

Example:
    >>> for scene in DATASETS["seven_scenes"](root, on_skip=print):
    ...     scene.image_paths, scene.cam_from_world, scene.depth()
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene, OnSkip
from geoaccel.registry import Registry, unknown


class Reader(Protocol):
    """How a dataset is read: ``read(root, scenes=None, on_skip=None, **options)``."""

    def __call__(
        self,
        root: str | Path | None,
        *,
        scenes: Collection[str] | None = None,
        on_skip: OnSkip | None = None,
        **options,
    ) -> Iterator[EvalScene]: ...


# What every reader takes, and what has a setting of its own: data.root, data.scenes, data.frames, data.rule, fidelity
_NOT_OPTIONS = ("root", "scenes", "on_skip", "num_frames", "replay", "need_poses")


def _read_with(module: str, root: str | Path | None, **options) -> Iterator[EvalScene]:
    read = importlib.import_module(module).read
    taken = inspect.signature(read).parameters
    for name in options:
        if name not in taken:
            raise UserError(unknown("data option", name, [known for known in taken if known not in _NOT_OPTIONS]))
    return read(root, **options)


_MODULES = {
    "co3d": "geoaccel.eval.data.co3d_scenes",
    "co3d_lists": "geoaccel.eval.data.co3d_lists",
    "dtu": "geoaccel.eval.data.dtu",
    "eth3d": "geoaccel.eval.data.eth3d",
    "folder": "geoaccel.eval.data.folder",
    "neural_rgbd": "geoaccel.eval.data.neural_rgbd",
    "realestate10k": "geoaccel.eval.data.realestate10k",
    "scannet": "geoaccel.eval.data.scannet",
    "seven_scenes": "geoaccel.eval.data.seven_scenes",
    "synthetic": "geoaccel.eval.data.synthetic_scenes",
    "tum_rgbd": "geoaccel.eval.data.tum_rgbd",
}

DATASETS: Registry[Reader] = Registry("dataset", {name: partial(_read_with, m) for name, m in _MODULES.items()})
"""Names to readers; a reader's module is imported when it is called."""
