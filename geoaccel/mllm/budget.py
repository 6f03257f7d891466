"""Number of visual tokens to keep, and the choice of the most salient ones."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from geoaccel.errors import UserError

Scope = Literal["clip", "frame"]


@dataclass(frozen=True)
class Share:
    """Number of n tokens to keep, regardless of their content.

    Attributes:
        ratio: Fraction to keep, in (0, 1]: floor(ratio n), and at least one. As in the paper; elsewhere in this package
            a ratio is the fraction removed.
        num_tokens: Number to keep, instead of a fraction.
    """

    ratio: float = 0.3
    num_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 < self.ratio <= 1:
            raise UserError(f"ratio={self.ratio!r} is not in (0, 1]; give the fraction of tokens to keep")
        # Also NumPy numbers, by their decimal form: a float32 of 0.29 is slightly less.
        object.__setattr__(self, "ratio", float(Fraction(str(self.ratio))))
        if self.num_tokens is not None and not is_count(self.num_tokens, 1):
            raise UserError(f"num_tokens={self.num_tokens!r} must be a positive integer")
        if self.num_tokens is not None and self.ratio != Share.ratio:
            raise UserError(f"ratio={self.ratio} and num_tokens={self.num_tokens} contradict each other; give one")

    def kept(self, n: int) -> int:
        """K of n tokens, exact for the ratio in decimal form: 0.29 of 100 are 29.

        Raises:
            ValueError: If more are requested than there are.
        """
        if self.num_tokens is None:
            return min(n, max(1, int(Fraction(repr(self.ratio)) * n)))
        if self.num_tokens > n:
            raise UserError(f"num_tokens={self.num_tokens} is more than the {n} tokens; give fewer")
        return self.num_tokens


@dataclass(frozen=True)
class Budget(Share):
    """Number of tokens to keep, in total or per frame.

    Attributes:
        scope: Whether there is one budget for the whole ``clip`` (all frames of a sample) or one for each ``frame``.
        min_per_frame: With a budget for the clip: at least this many of each frame stay, or all if it has fewer.
    """

    scope: Scope = "clip"
    min_per_frame: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in get_args(Scope):
            raise UserError(f"scope={self.scope!r}; known: {', '.join(get_args(Scope))}")
        if not is_count(self.min_per_frame, 0):
            raise UserError(f"min_per_frame={self.min_per_frame!r} must be an integer, 0 or more")

    def most_salient(
        self,
        scores: Tensor,  # [n]
        frame_of: Tensor | None,  # [n], int64
    ) -> Tensor:  # [K], int64
        """Tokens of one sample with the highest scores, ascending; ties go to lower indices.

        Raises:
            ValueError: If the budget is larger than the clip or a frame, or too small for ``min_per_frame``, or frames
                are not given.
        """
        order = scores.sort(descending=True, stable=True).indices
        if self.scope == "clip" and self.min_per_frame == 0:
            return order[: self.kept(len(order))].sort().values
        if frame_of is None:
            raise UserError("scope='frame' and min_per_frame need frame_of, the frame of every token")
        frame = frame_of[order].unique(return_inverse=True)[1]
        sizes = torch.bincount(frame)
        by_frame = frame.argsort(stable=True)  # places in the order, frame by frame, the best of each frame first
        first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        rank = torch.empty_like(order)
        rank[by_frame] = torch.arange(len(order), device=order.device) - first
        if self.scope == "frame":
            allowed = torch.tensor([self.kept(size) for size in sizes.tolist()], device=order.device)
            return order[rank < allowed[frame]].sort().values
        forced, kept = rank < self.min_per_frame, self.kept(len(order))
        if int(forced.sum()) > kept:
            raise UserError(
                f"min_per_frame={self.min_per_frame} over {len(sizes)} frames needs {int(forced.sum())} tokens, but "
                f"the budget is {kept} of {len(order)}; raise the budget or lower min_per_frame"
            )
        return torch.cat([order[forced], order[~forced]])[:kept].sort().values


def is_count(value: object, least: int) -> bool:
    """Whether a knob is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
