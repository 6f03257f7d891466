"""Where datasets are registered: a reader is a function with ``@reader("name")`` in a file of this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Protocol

from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene, OnSkip
from geoaccel.registry import Registry, unknown


class Reader(Protocol):
    """How a dataset is read: ``read(root, scenes=None, on_skip=None, **options)``.

    Args:
        root: Folder of the dataset; it holds one folder a scene where the reader says nothing else.
        scenes: Only these scenes.
        on_skip: Called with each scene that is left out.
        options: Of the dataset.
    """

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

DATASETS: Registry[Reader] = Registry("dataset", package=__package__)
"""Names of datasets to their readers.

Example:
    >>> for scene in DATASETS["seven_scenes"](root, on_skip=print):
    ...     scene.image_paths, scene.cam_from_world, scene.depth()
"""


def reader(name: str) -> Callable[[Callable[..., Iterator[EvalScene]]], Reader]:
    """Register a function that reads a dataset, which then refuses options that it does not have; a decorator."""

    def decorate(read: Callable[..., Iterator[EvalScene]]) -> Reader:
        taken = inspect.signature(read).parameters

        @functools.wraps(read)
        def checked(root: str | Path | None, **options) -> Iterator[EvalScene]:
            for option in options:
                if option not in taken:
                    allowed = [known for known in taken if known not in _NOT_OPTIONS]
                    raise UserError(unknown("data option", option, allowed))
            return read(root, **options)

        return DATASETS.register(name, checked)

    return decorate
