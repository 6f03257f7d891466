"""Arguments and outputs of a host's modules, whatever their names and positions.

transformers renames arguments: a cache was ``past_key_values`` and is ``cache`` since 5.24. Nothing here checks a
version. Values are looked up by name, also if passed by position, and a cache is recognised by its methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from geoaccel.errors import UserError

CACHES = ("cache", "past_key_values")
"""Names of a cache, the current one first."""

TRIED = "tested with transformers 5.20 to 5.24"


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``module`` by name.

    Raises:
        UserError: If there are more positional arguments than ``forward`` names.
    """
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        raise UserError(
            f"{type(module).__name__}.forward got {len(args)} positional arguments but names only {len(names)}; pass "
            "them by name"
        )
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def wanted(given: Mapping[str, Any], name: str, module: nn.Module) -> Any:
    """The argument ``name`` of a call of ``module``.

    Raises:
        UserError: If it is missing or None.
    """
    if given.get(name) is None:
        there = ", ".join(key for key, value in given.items() if value is not None)
        raise UserError(f"{type(module).__name__} got no {name}, only {there or 'nothing'}; {TRIED}")
    return given[name]


def handed_cache(given: Mapping[str, Any], owner: object) -> Any:
    """The cache among arguments by name, or None.

    Args:
        given: By name; see :data:`CACHES`.
        owner: Module or output that they belong to, for messages.

    Raises:
        UserError: If there are two caches, one has another name, or an argument with such a name is not a cache.
    """
    who = type(owner).__name__
    known = {name: given[name] for name in CACHES if given.get(name) is not None}
    for name, value in given.items():
        if name not in CACHES and _is_cache(value):
            raise UserError(
                f"{who} has a cache in {name}, but a patch expects {' or '.join(CACHES)} ({TRIED}); remove the patch "
                "and use reduce_for_generate"
            )
    for name, value in known.items():
        if not _is_cache(value):
            raise UserError(
                f"{name} of {who} is a {type(value).__name__} without get_seq_length(); give transformers' DynamicCache"
            )
    if len({id(value) for value in known.values()}) > 1:
        raise UserError(f"{who} has two caches, one in each of {' and '.join(CACHES)}; give one of them")
    return next(iter(known.values()), None)


def returned_cache(output: Any) -> Any:
    """The cache in the output of a host, of its language model or of ``generate``; None if there is none.

    Raises:
        UserError: As :func:`handed_cache`.
    """
    if isinstance(output, tuple | list):
        return next(filter(_is_cache, output), None)
    # Items and not attributes: transformers warns about old names on access.
    return handed_cache(dict(output) if isinstance(output, Mapping) else getattr(output, "__dict__", {}), output)


def pooled(output: Any, encoder: object) -> Any:
    """Visual tokens in the output of a 2D encoder: the output itself if it is a tensor, else its ``pooler_output``.

    Raises:
        UserError: If it has none.
    """
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "pooler_output", None)
    if found is None:
        raise UserError(f"{type(encoder).__name__} returned a {type(output).__name__} without pooler_output; {TRIED}")
    return found


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], slots: tuple[int, int], module: nn.Module) -> None:
    """Refuse unknown arguments parallel to a prompt [B, L], which would not be shortened.

    Args:
        given: Arguments of ``module`` by name.
        known: Those that are shortened, or need not be.
        slots: (B, L).
        module: For messages.

    Raises:
        UserError: Naming the argument.
    """
    along = (slots, (slots[1], slots[1]))
    for name in (name for name in given if name not in known):
        for value in given[name] if isinstance(given[name], tuple | list) else (given[name],):
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if slots[1] > 1 and (shape == slots[1:] or shape[:2] == slots or shape[-2:] in along):
                raise UserError(
                    f"{type(module).__name__} got {name} {list(shape)} with a prompt {list(slots)}, and a patch cannot "
                    f"shorten it ({TRIED}); remove the patch and use reduce_for_generate"
                )


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None))
