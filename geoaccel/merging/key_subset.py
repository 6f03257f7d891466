"""Which keys and values of a scene :class:`geoaccel.merging.asymmetric.Asymmetric` keeps, and their gathering."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from geoaccel.kernels import twins
from geoaccel.kernels.fused import fused
from geoaccel.merging.lattice import lattice, phase


@dataclass(frozen=True, eq=False)
class KeySubset:
    """The keys of one scene, as plain numbers: they are kept, whatever device or mode of torch they were made in.

    Attributes:
        places: [H, M], int64, tokens of the scene that each head sees, or all heads where H = 1; those that stand for
            themselves alone come first and are the same for all, then the sampled patches of one frame after the other,
            as many of each.
        whole: How many stand for themselves.
        patches_each: How many patches each of the others stands for, on average.
    """

    places: np.ndarray
    whole: int
    patches_each: float

    @property
    def sampled(self) -> int:
        """How many do not."""
        return self.places.shape[1] - self.whole

    @property
    def index(self) -> Tensor:  # [H, M]
        """The places on the CPU, where they are; to read."""
        return torch.from_numpy(self.places)

    @cached_property
    def _pinned(self) -> Tensor:  # [H, M]
        return torch.empty(self.places.shape, dtype=torch.int64, device="cpu", pin_memory=True).copy_(self.index)

    def on(self, device: torch.device) -> Tensor:  # [H, M]
        """The index on a device; the host does not wait for what that has to do before."""
        index = self.index
        if device.type == "cuda" and not isinstance(index, FakeTensor):
            return self._pinned.to(device, non_blocking=True)
        return index.to(device)


@lru_cache(maxsize=32)
def dense_subset(
    frames: int,
    grid: tuple[int, int],
    num_special: int,
    stride: int,
    anchor: bool,
    heads: int,
) -> KeySubset:
    """The keys of a dense scene; they depend on its layout alone, and are kept for the forwards that follow.

    Args:
        frames: S, of the scene.
        grid: Patches of a frame.
        num_special: Special tokens in front of them.
        stride: One patch in so many is sampled; one of a frame where it has fewer.
        anchor: All patches of the first frame are keys.
        heads: How many heads have keys of their own; 1: all have the same.
    """
    patches = grid[0] * grid[1]
    stride, per_frame = min(stride, patches), num_special + patches
    tokens = np.arange(frames * per_frame, dtype=np.int64).reshape(frames, per_frame)
    alone = tokens[:, :num_special].ravel()
    if anchor:
        alone = np.concatenate([tokens[0], tokens[1:, :num_special].ravel()])

    def sampled(frame: int, head: int) -> np.ndarray:
        chosen = lattice(grid, stride, phase(stride, frame, head, heads), even=heads > 1 or stride == patches)
        return tokens[frame, num_special + chosen]

    others = range(int(anchor), frames)
    places = np.stack([np.concatenate([alone, *(sampled(frame, head) for frame in others)]) for head in range(heads)])
    left = tokens.size - len(alone)
    return KeySubset(places, len(alone), left / max(1, places.shape[1] - len(alone)))


@lru_cache(maxsize=32)
def packed_subset(frames: tuple[int, ...], num_special: int, stride: int, anchor: bool) -> tuple[tuple[int, ...], int]:
    """Rows that are keys, those that stand for themselves first, and how many are sampled.

    Args:
        frames: Rows of each frame of one scene, special tokens included.
        num_special: Special tokens at the start of each frame.
        stride: One row in so many is sampled; the first one differs from frame to frame.
        anchor: All rows of the first frame are keys.
    """
    alone: list[int] = []
    sampled: list[int] = []
    start = 0
    for frame, rows in enumerate(frames):
        fixed = rows if anchor and frame == 0 else num_special
        alone += range(start, start + fixed)
        if fixed < rows:
            sampled += range(start + num_special + frame % stride, start + rows, stride)
        start += rows
    return (*alone, *sampled), len(sampled)


def pick(
    k: Tensor,  # [n, A, N, D]
    v: Tensor,  # [n, A, N, D]
    index: Tensor,  # [H, M]
) -> tuple[Tensor, Tensor]:  # [n, A, M, D] each
    """Keys and values of the tokens that every head sees, or all of them where H = 1."""
    run = fused("pick", v if v.requires_grad else k) or twins.pick
    return run(k, v, index)
