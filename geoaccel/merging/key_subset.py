"""Selection and gathering of the keys and values that :class:`geoaccel.merging.asymmetric.Asymmetric` keeps."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from geoaccel.kernels import twins
from geoaccel.kernels.fused import fused
from geoaccel.merging.lattice import lattice, phase


@dataclass(frozen=True)
class KeySubset:
    """The keys of one dense scene; they depend only on its layout, and are cached for later forwards.

    Attributes:
        frames: S of the scene.
        grid: Patches of a frame.
        num_special: Special tokens before them.
        stride: One patch in so many is sampled; at least one per frame.
        anchor: All patches of the first frame are keys.
        heads: Number of heads with their own keys; 1: all have the same.
    """

    frames: int
    grid: tuple[int, int]
    num_special: int
    stride: int
    anchor: bool
    heads: int

    @property
    def index(self) -> Tensor:  # [H, M], int64, on the CPU; read-only
        """Key tokens of the scene for each head, or for all heads if H = 1.

        Keys that represent only themselves come first and are the same for all heads, then the sampled patches frame by
        frame, equally many for each.
        """
        return _index(self.frames, self.grid, self.num_special, self.stride, self.anchor, self.heads)

    @property
    def whole(self) -> int:
        """Number of keys that represent only themselves."""
        return self.frames * self.num_special + int(self.anchor) * self.grid[0] * self.grid[1]

    @property
    def sampled(self) -> int:
        """Number of sampled keys."""
        return self.index.shape[1] - self.whole

    @property
    def patches_each(self) -> float:
        """Mean number of patches that each sampled key represents."""
        return (self.frames - int(self.anchor)) * self.grid[0] * self.grid[1] / max(1, self.sampled)

    def on(self, device: torch.device) -> Tensor:  # [H, M]
        """The index on a device, without synchronisation."""
        index = self.index
        if device.type == "cuda" and not isinstance(index, FakeTensor) and not torch.compiler.is_compiling():
            return _pinned(self).to(device, non_blocking=True)
        return index.to(device)


def _index(*made_of: Any) -> Tensor:
    # Under torch.compile, lines outside of a graph would be compiled one by one.
    make = torch.compiler.disable(_places) if "torch._dynamo" in sys.modules else _places
    return torch.from_numpy(make(KeySubset(*made_of)))


# Same as torch.compiler.assume_constant_result, which would import the compiler with the package.
_index._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=32)
def _pinned(subset: KeySubset) -> Tensor:
    index = subset.index
    return torch.empty(index.shape, dtype=index.dtype, device="cpu", pin_memory=True).copy_(index)


@lru_cache(maxsize=32)
def _places(subset: KeySubset) -> np.ndarray:  # [H, M]
    """The index as NumPy numbers, independent of devices and modes of torch."""
    heads, num_special, patches = subset.heads, subset.num_special, subset.grid[0] * subset.grid[1]
    stride, per_frame = min(subset.stride, patches), num_special + patches
    tokens = np.arange(subset.frames * per_frame, dtype=np.int64).reshape(subset.frames, per_frame)
    alone = tokens[:, :num_special].ravel()
    if subset.anchor:
        alone = np.concatenate([tokens[0], tokens[1:, :num_special].ravel()])

    def sampled(frame: int, head: int) -> np.ndarray:
        even = heads > 1 or stride == patches
        return tokens[frame, num_special + lattice(subset.grid, stride, phase(stride, frame, head, heads), even=even)]

    others = range(int(subset.anchor), subset.frames)
    return np.stack([np.concatenate([alone, *(sampled(frame, head) for frame in others)]) for head in range(heads)])


def forget() -> None:
    """Clear the cache."""
    for keeper in (_pinned, _places, lattice):
        keeper.cache_clear()


@lru_cache(maxsize=32)
def packed_subset(frames: tuple[int, ...], num_special: int, stride: int, anchor: bool) -> tuple[tuple[int, ...], int]:
    """Rows that are keys, those that represent only themselves first, and the number of sampled ones.

    Args:
        frames: Rows of each frame of one scene, special tokens included.
        num_special: Special tokens at the start of each frame.
        stride: One row in so many is sampled; the phase differs from frame to frame.
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
    """Keys and values of the tokens of each head, or of all heads if H = 1."""
    run = fused("pick", v if v.requires_grad else k) or twins.pick
    return run(k, v, index)
