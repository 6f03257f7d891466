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

SEQUENCES: set[str] = set()
"""Datasets of which the frames of a scene are those of a video, in their order, so that windows can go along it."""
RENDERED: set[str] = set()
"""Datasets of which scenes are made of seeds, in as many frames as are asked for; nothing is on disk."""


def reader(
    name: str, *, is_sequence: bool = False, is_rendered: bool = False
) -> Callable[[Callable[..., Iterator[EvalScene]]], Reader]:
    """Register a function that reads a dataset, which then refuses options that it does not have; a decorator.

    Args:
        name: Of the dataset.
        is_sequence: It is one of `SEQUENCES`.
        is_rendered: It is one of `RENDERED`; the reader takes ``seeds`` and ``num_frames``.
    """
    SEQUENCES.update([name] if is_sequence else [])
    RENDERED.update([name] if is_rendered else [])

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
