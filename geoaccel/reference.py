"""Choice of the frame that comes first in the network: VGGT's reference view, the anchor of merging methods.

A black, blurred or foreign first image ruins VGGT's predictions for all others; later in the sequence it does little
harm. ``auto`` takes the frame that is most like the others by features of the network's own encoder
(:func:`likeness`). The encoder runs once: its slot ``reference`` moves that frame to the front, and predictions are
returned in the order of the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.frame_matches import FrameMatches, averaged, evenly_spread, frame_matches
from geoaccel.model_lock import locked

Reference = int | Literal["auto", "first"]

MOST_PATCHES = 256
"""Patches of a frame that are matched; if there are more, neighbours are averaged."""


class Chooser(Protocol):
    """Content of an encoder's slot ``reference``."""

    def __call__(
        self,
        patches: Tensor,  # [B, S, h * w, C], the encoder's
        grid: tuple[int, int],
    ) -> Tensor | None:  # [S]
        """The order in which the trunk sees the frames; None: unchanged."""
        ...


@dataclass
class Order:
    """The order in which a network saw the frames of one forward.

    Attributes:
        order: [S], index of the frame at each position; None: as given.
        alike: [S], similarity of each frame to the others, in the order of the scene; None if no reference was chosen
            by it.
        matches: How well frames match each other, in the order of the scene; None if unknown.
        features: [S, C], mean encoder features of each frame's patches, in the order of the scene, on the CPU; None if
            unknown.
    """

    order: Tensor | None = None
    alike: Tensor | None = None
    matches: FrameMatches | None = None
    features: Tensor | None = None

    @property
    def first(self) -> int:
        """The frame that came first."""
        return 0 if self.order is None else int(self.order[0])

    def back(self, geometry: Geometry) -> Geometry:
        """Predictions [B, S, ...] in the order of the scene."""
        if self.order is None:
            return geometry
        places = self.order.argsort()
        changed = {f.name: getattr(geometry, f.name) for f in fields(geometry)}
        return replace(geometry, **{name: x[:, places.to(x.device)] for name, x in changed.items()})


def check_reference(reference: Any, frames: int | None = None) -> None:
    """Refuse anything that does not name a frame.

    Raises:
        UserError: Saying what is allowed.
    """
    if reference in ("auto", "first"):
        return
    number = isinstance(reference, Integral) and not isinstance(reference, bool)
    if not number or reference < 0 or (frames is not None and reference >= frames):
        last = "from 0" if frames is None else f"0 to {frames - 1}"
        raise UserError(f"reference={reference!r} is not a frame; give auto, first or the number of an image, {last}")


def in_scene(reference: Reference, numbers: Sequence[int], left_out: Mapping[str, str]) -> Reference:
    """A reference by its number among the frames of the scene, which is another where images were left out.

    Args:
        reference: By its number among the images given.
        numbers: Of each frame among the images given; empty where none was left out.
        left_out: Images that were left out, in order, and why.

    Raises:
        UserError: That image was left out, or there is none.
    """
    if not numbers or isinstance(reference, str):
        return reference
    check_reference(reference, len(numbers) + len(left_out))
    if reference in numbers:
        return numbers.index(reference)
    name, why = list(left_out.items())[reference - sum(number < reference for number in numbers)]
    raise UserError(f"reference={reference} (--reference) names {name}, which was left out: {why}; name another image")


@contextmanager
def reference_first(model: nn.Module, reference: Reference, frames: int) -> Iterator[Order]:
    """While one scene is predicted, inspect its encoder features and move the reference to the front.

    Other threads that predict with the same model wait.

    Args:
        model: A geoaccel model. Depth Anything 3 has no slot and chooses its own reference.
        reference: ``auto``, ``first`` (as given) or a number from 0.
        frames: S.

    Yields:
        The order, known after the forward.

    Raises:
        UserError: For a frame that does not exist, or a model whose reference cannot be chosen.
    """
    check_reference(reference, frames)
    found = Order()
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "reference")]
    if getattr(model, "sharing", None) is not None:
        if reference not in ("first", 0):
            raise UserError(
                f"reference={reference}: with several processes the first image is the reference; put yours first"
            )
        owners = []  # each process sees some of the frames
    elif not owners and isinstance(reference, Integral) and reference:
        raise UserError(f"reference={reference}: this network chooses its own reference; give auto or first")

    def choose(patches: Tensor, grid: tuple[int, int]) -> Tensor | None:
        if len(patches) != 1:
            raise ValueError(f"got {len(patches)} scenes; a reference is chosen for one at a time")
        found.matches = frame_matches(patches[0], grid)
        found.features = patches[0].detach().float().mean(dim=1).cpu()
        if reference == "auto":
            found.alike = likeness(patches[0], grid)
            first = int(found.alike.argmax())
        else:
            first = 0 if reference == "first" else reference
        found.order = _in_front(first, frames) if first else None
        return found.order

    with locked(model):
        for owner in owners:
            owner.reference = choose
        try:
            yield found
        finally:
            for owner in owners:
                owner.reference = None


@torch.no_grad()
def likeness(
    patches: Tensor,  # [S, h * w, C]
    grid: tuple[int, int],
) -> Tensor:  # [S], on the CPU
    """Similarity of a frame to the others: the mean cosine of its patches with their best match in each of them.

    The mean over all frames at each position is subtracted first, which removes the position embedding. Matches count
    in both directions.
    """
    frames = len(patches)
    x, _ = averaged(patches, grid, MOST_PATCHES)
    x = F.normalize(x - x.mean(dim=0, keepdim=True), dim=-1)
    spread = evenly_spread(frames)
    others, place = x[spread.to(x.device)], {frame: i for i, frame in enumerate(spread.tolist())}
    # Similarity is symmetric: each pair within `others` is compared once.
    found, again = [], x.new_zeros(len(others))
    for frame in range(frames):
        after = place.get(frame, -1) + 1
        cosines = (others[after:].flatten(0, 1) @ x[frame].T).unflatten(0, (-1, x.shape[1]))  # [j, q, p]
        both = (cosines.amax(dim=2).mean(dim=1) + cosines.amax(dim=1).mean(dim=1)) / 2
        found.append(both.sum())
        if frame in place:
            again[after:] += both
    sums, compared = torch.stack(found).cpu(), torch.full((frames,), float(len(others)))
    sums[spread] += again.cpu()
    compared[spread] -= 1
    return sums / compared.clamp(min=1)


def _in_front(frame: int, frames: int) -> Tensor:  # [S]
    """One frame moved to the front, the others in order."""
    return torch.tensor([frame, *(other for other in range(frames) if other != frame)])
