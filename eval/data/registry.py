"""Registry of datasets: a reader is a function with ``@reader("name")`` in a file of this package."""

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
    """Reader of a dataset: ``read(root, scenes=None, on_skip=None, **options)``.

    Args:
        root: Folder of the dataset, with one folder per scene unless the reader says otherwise.
        scenes: Only these scenes.
        on_skip: Called with each scene that is left out.
        options: Options of the dataset.
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
"""Arguments of readers that are not options, and their settings."""
_NOT_OPTIONS = (*OWN_SETTINGS, "on_skip")

DATASETS: Registry[Reader] = Registry("dataset", package=__package__)
"""Readers by the names of the datasets.

Example:
    >>> for scene in DATASETS["seven_scenes"](root, on_skip=print):
    ...     scene.image_paths, scene.cam_from_world, scene.depth()
"""

SEQUENCES: set[str] = set()
"""Datasets whose scenes are videos, with frames in order, so that they can be processed in windows."""
RENDERED: set[str] = set()
"""Datasets whose scenes are rendered from seeds, with any number of frames; nothing is on disk."""


def reader(
    name: str, *, is_sequence: bool = False, is_rendered: bool = False
) -> Callable[[Callable[..., Iterator[EvalScene]]], Reader]:
    """Decorator that registers the reader of a dataset, and makes it reject unknown options.

    Args:
        name: Name of the dataset.
        is_sequence: Whether it is one of `SEQUENCES`.
        is_rendered: Whether it is one of `RENDERED`; the reader takes ``seeds`` and ``num_frames``.
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
    """Reject unknown options of a reader, and values of the wrong type.

    Raises:
        UserError: Naming the first, and what is allowed.
    """
    taken = inspect.signature(read).parameters
    for option, given in options.items():
        if option in taken:
            _check_kind(option, given, taken[option])
        elif not any(known.kind is known.VAR_KEYWORD for known in taken.values()):
            allowed = [known for known in taken if known not in _NOT_OPTIONS]
            raise UserError(unknown("data option", option, allowed))


def _check_kind(option: str, given: Any, parameter: inspect.Parameter) -> None:
    """Reject the word `no`, which would count as true, and a list in place of a name."""
    kinds = {kind.strip() for kind in inspect.formatannotation(parameter.annotation).strip("'").split("|")}
    if "bool" in kinds and kinds <= {"bool", "None"} and not isinstance(given, bool | None):
        raise UserError(f"data.options.{option}={given}: give true or false")
    numbers = (int, float) if "Path" in kinds else ()  # a folder may be called 2024
    is_text = isinstance(given, str | Path) or (isinstance(given, numbers) and not isinstance(given, bool))
    text_alone = "str" in kinds and kinds <= {"str", "Path", "None"}
    if text_alone and not is_text and (given is not None or "None" not in kinds):
        raise UserError(f"data.options.{option}={given}: give one {'file or folder' if numbers else 'name'}")
