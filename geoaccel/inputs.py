"""Inputs of a network: images at its input size, masks, and known conditions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from geoaccel.backbone import Conditioning, Preprocess
from geoaccel.conditions import Conditions
from geoaccel.errors import UserError, UserTypeError
from geoaccel.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from geoaccel.images import ImageBatch
    from geoaccel.images.tensors import TensorBatch
    from geoaccel.memory import Limit

LARGEST_SIZE = 8
"""Largest allowed size, as a multiple of the model's own."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a network for one scene.

    Attributes:
        batch: The images.
        known: Known conditions.
        told: The conditions that the network gets as input.
        selected: Pixels that masks keep [S, H, W]; None: all.
        mask_files: The mask of each image, if there are masks.
        plan: Memory plan; None: everything at once.
    """

    batch: ImageBatch | TensorBatch
    known: Conditions
    told: Conditions
    selected: Tensor | None = None
    mask_files: list[Path] | None = None
    plan: MemoryPlan | None = None


def read_inputs(
    source: Any,
    model: nn.Module,
    *,
    size: int | None = None,
    mode: str | None = None,
    masks: str | Path | None = None,
    conditions: Conditions | Mapping[str, Any] | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    recursive: bool = False,
    skip_bad: bool = False,
    progress: bool = False,
    limit: Limit | None = None,
) -> Inputs:
    """Read images, masks and conditions, after a check that a forward over all of them fits into memory.

    Args:
        source, fps, max_frames, recursive, skip_bad, progress: As :func:`geoaccel.images.load_images` takes them; a
            tensor [S, 3, H, W] too.
        model: The model that they are for.
        size, mode: Instead of the model's own, as in `fitted_to`.
        masks: Folder with a mask for each image.
        conditions: As :func:`geoaccel.reconstruct` takes them.
        limit: Memory limit; None: what is free.

    Raises:
        FileNotFoundError, ValueError: In one line.
    """
    from geoaccel.images import ImageBatch, find_masks, load_conditions, load_images, load_masks
    from geoaccel.images.tensors import tensor_batch
    from geoaccel.memory import check_memory

    network: Any = model
    limits: dict[str, Any] = {} if limit is None else {"limit": limit}
    batch: ImageBatch | TensorBatch
    if isinstance(source, ImageBatch | Tensor):
        if size is not None or mode is not None:
            raise UserError("size and mode apply to files only; leave them out, and resize these images yourself")
        batch = source if isinstance(source, ImageBatch) else tensor_batch(source, fps=fps, max_frames=max_frames)
    else:
        options: Any = {"fps": fps, "max_frames": max_frames, "recursive": recursive, "skip_bad": skip_bad}
        fits = partial(check_memory, model, unread=True, **limits)
        preprocess = fitted_to(network.preprocess, size, mode)
        batch = load_images(source, preprocess, **options, progress=progress, fits=fits)
    frames, _, height, width = batch.images.shape
    plan = check_memory(model, frames=frames, size=(height, width), unread=False, **limits)
    known = conditions if isinstance(conditions, Conditions) else load_conditions(batch, **(conditions or {}))
    known.check(frames, (height, width))
    selected, files = None, None
    if masks is not None:
        selected, files = load_masks(masks, batch), find_masks(masks, batch.names)
        if not selected.any() and getattr(model, "sharing", None) is None:  # other processes have other images
            raise UserError(f"the masks in {masks} keep no pixel of any image; white keeps a pixel, so invert them")
    return Inputs(batch, known, _told(known, network.backbone.conditions), selected, files, plan)


def fitted_to(preprocess: Preprocess, size: int | None, mode: str | None) -> Preprocess:
    """A model's preprocessing with another size or mode.

    Args:
        preprocess: That of the model.
        size: Width or long side in pixels, a multiple of the patch size; for ``budget`` the side of a square with as
            many pixels.
        mode: ``crop``, ``pad``, ``budget`` or ``long``.

    Raises:
        ValueError: If they do not fit the model.
    """
    fields: dict[str, Any] = {} if mode is None else {"mode": mode}
    if size is None:
        return replace(preprocess, **fields)
    patch, made_for = preprocess.patch_size, preprocess.size
    check_size(size)
    size = int(size)
    if size > LARGEST_SIZE * made_for:
        raise UserError(
            f"size={size} (--size) is more than {LARGEST_SIZE} times the model's own size {made_for}; "
            f"give at most {LARGEST_SIZE * made_for // patch * patch}"
        )
    if size < patch or size % patch:
        raise UserError(
            f"size={size} (--size) is not a multiple of the patch size {patch}; try {max(1, size // patch) * patch}"
        )
    return replace(preprocess, **fields, size=size, max_pixels=size**2)


def check_size(size: int | None) -> None:
    """Refuse sizes that are wrong for any model."""
    if size is not None and (not isinstance(size, Integral) or size < 1):
        raise UserError(
            f"size={size!r} (--size) is not allowed; give the width or long side in pixels, a positive multiple of the "
            "model's patch size such as 224, or leave it out for the model's own"
        )


def check_path(name: str, value: object) -> None:
    """Refuse anything but a path or None.

    Raises:
        TypeError: In one line.
    """
    if value is not None and not isinstance(value, str | os.PathLike):
        raise UserTypeError(f"{name} is a {type(value).__name__}; give the path of a file or folder")


def check_takes(model: nn.Module, kinds: Iterable[str]) -> None:
    """Refuse conditions that a backbone does not accept. Intrinsics are accepted for any: they adjust the result.

    Raises:
        UserError: For a kind that does not exist, or that this backbone does not take.
    """
    from geoaccel.images.given import check_names

    network: Any = model
    backbone, kinds = network.backbone, list(kinds)
    taken: Sequence[str] = () if backbone.conditions is None else backbone.conditions.takes
    check_names(dict.fromkeys(kinds))
    if refused := [kind for kind in kinds if kind not in (*taken, "intrinsics")]:
        others = ", ".join(taken) or "none"
        raise UserError(f"{backbone.name} does not accept {refused[0]} (accepted conditions: {others}); leave them out")


def _told(known: Conditions, conditioning: Conditioning | None) -> Conditions:
    """All known conditions, without intrinsics if the backbone takes none, or takes none alone."""
    takes = () if conditioning is None else conditioning.takes
    alone = known.given == ("intrinsics",) and conditioning is not None and conditioning.together
    if "intrinsics" in takes and not alone:
        return known
    return replace(known, intrinsics=None, has_intrinsics=None)
