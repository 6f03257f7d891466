"""Where datasets are registered: a reader is a function with ``@reader("name")`` in a file of this package."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

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


OWN_SETTINGS = {
    **{"root": "data.root", "scenes": "data.scenes", "num_frames": "data.frames"},
    **{"replay": "data.rule=replay", "need_poses": "fidelity=true"},
}
"""What readers take that is no option, and the setting that it has."""
_NOT_OPTIONS = (*OWN_SETTINGS, "on_skip")

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
        @functools.wraps(read)
        def checked(root: str | Path | None, **options) -> Iterator[EvalScene]:
            check_options(read, options)
            return read(root, **options)

        return DATASETS.register(name, checked)

    return decorate


def check_options(read: Callable[..., Iterator[EvalScene]], options: Mapping[str, Any]) -> None:
    """Refuse options that a reader does not have, and values that are none of an option, so that it need not look.

    Raises:
        UserError: Naming the first, and what there is.
    """
    taken = inspect.signature(read).parameters
    for option, given in options.items():
        if option in taken:
            _check_kind(option, given, taken[option])
        elif not any(known.kind is known.VAR_KEYWORD for known in taken.values()):
            allowed = [known for known in taken if known not in _NOT_OPTIONS]
            raise UserError(unknown("data option", option, allowed))


def _check_kind(option: str, given: Any, parameter: inspect.Parameter) -> None:
    """The word `no` would count as true, and a list of names is no name."""
    kinds = {kind.strip() for kind in inspect.formatannotation(parameter.annotation).strip("'").split("|")}
    if "bool" in kinds and kinds <= {"bool", "None"} and not isinstance(given, bool | None):
        raise UserError(f"data.options.{option}={given}: give true or false")
    numbers = (int, float) if "Path" in kinds else ()  # a folder may be called 2024
    is_text = isinstance(given, str | Path) or (isinstance(given, numbers) and not isinstance(given, bool))
    text_alone = "str" in kinds and kinds <= {"str", "Path", "None"}
    if text_alone and not is_text and (given is not None or "None" not in kinds):
        raise UserError(f"data.options.{option}={given}: give one {'file or folder' if numbers else 'name'}")
