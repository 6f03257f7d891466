"""AVGGT: early layers within frames, later ones with keys on a grid (Sun et al., CVPR 2026, arXiv 2512.02541)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, FrameOnly, Held, Restore, Tokens
from geoaccel.attention_kernels import attend_with_own
from geoaccel.errors import UserError
from geoaccel.kept import kept
from geoaccel.layout import TokenLayout
from geoaccel.merging.gain import Extra, Work
from geoaccel.merging.joint import dense_layout
from geoaccel.merging.method import AttentionMerging, Effect, MergingMixer, register

FRAME_LAYERS, PUBLISHED_DEPTH = 9, 24

OPERATIONS = 30
"""Additional small operations per attention compared with dense, approximately."""


@register
@dataclass(frozen=True)
class AVGGT(AttentionMerging):
    """Turns early global layers into frame attention, and keeps one key in ``stride`` x ``stride`` in the others.

    In the first 9 of 24 layers every query attends to its own frame alone. In the others all queries stay, and attend
    to the special tokens of all frames, the patches of a grid that is the same in every frame, their own key, and the
    mean of the keys and values that are left out, all in one softmax. Nothing is compared; needs no training.

    Networks with four global layers, such as the minis, are no fair test of the rule for early layers: their first
    layer is already needed.

    Differs from the paper in:
        - The authors' code is not public. Our grid starts at the centre of its first cell; the paper's offset is not
          known.
        - The mean is one key, not weighted by the number of patches that it represents (``log_bias`` adds that weight):
          the part of the paper that gives its weight was not available to us.
        - For networks of another depth the same fraction of layers, rounded, is turned into frame attention.
        - A single frame, or input with too little to gain, is left dense (``bypass=False``: only a single frame is).

    Attributes:
        stride: Keys are the patches in every stride-th row and column.
        frame_layers: How many of the first global layers become frame attention; None: 9 of 24.
        log_bias: Weight the mean by the number of patches that it represents.
    """

    name: ClassVar[str] = "avggt"
    own_keys: ClassVar[bool] = True
    stride: int = 4
    frame_layers: int | None = None
    log_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UserError(f"avggt: stride={self.stride} is below 1; give 1 (keeps every key) or more")
        if self.frame_layers is not None and self.frame_layers < 0:
            raise UserError(f"avggt: frame_layers={self.frame_layers} must be a number of layers, 0 or more")

    def frame_layers_of(self, depth: int) -> int:
        """Number of frame-attention layers among ``depth`` global layers.

        Raises:
            ValueError: If there are fewer layers than requested.
        """
        if self.frame_layers is None:
            return math.ceil(FRAME_LAYERS * depth / PUBLISHED_DEPTH - 0.5)
        if self.frame_layers > depth:
            raise UserError(f"avggt: frame_layers={self.frame_layers}, but this network has only {depth} global layers")
        return self.frame_layers

    def mixer(self, kernel: str) -> GridMixer:
        return GridMixer(self, kernel)

    def mixers(self, kernel: str, depth: int) -> list[MergingMixer]:
        early = self.frame_layers_of(depth)
        kinds = [EarlyMixer if layer < early else GridMixer for layer in range(depth)]
        return [kind(self, kernel, early / depth) for kind in kinds]


class AVGGTMixer(MergingMixer):
    """Base of both kinds of layers: decides whether the method acts, identically in all layers.

    Args:
        method: The method with its knobs.
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
        early: Fraction of the layers that are frame attention.
    """

    reads_tokens = False
    method: AVGGT

    def __init__(self, method: AVGGT, kernel: str, early: float = 0.0) -> None:
        super().__init__(method, kernel)
        self.early = early

    def grid_keys(self, layout: TokenLayout) -> int:
        """Number of keys common to all queries in the later layers."""
        return layout.frames * (layout.num_special + kept_patches(layout.grid, self.method.stride)) + 2

    def predicted(self, layout: TokenLayout, q: Tensor) -> float:  # q [n, A, N, D]
        """Predicted speedup from frame attention in early layers and the grid in the others."""
        width, tokens = q.shape[1] * q.shape[3], layout.tokens_per_scene
        grid = self.grid_keys(layout)
        keys = self.early * layout.tokens_per_frame + (1 - self.early) * grid
        # Keys are gathered; each query also attends to its own key and the mean, whose outputs are combined.
        read = (1 - self.early) * width * (2 * grid + 8 * tokens)
        return self.gain(Work(tokens, tokens, keys, Extra(read=read, operations=OPERATIONS)), layout, q)


class EarlyMixer(AVGGTMixer):
    """Attends within frames."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = dense_layout(self.method, q, context)
        why = "one frame" if layout.frames == 1 else None
        why, gain = self.method.verdict(why, lambda: self.predicted(layout, q))
        if why is not None:
            return self.dense(q, k, v, x, context, why, gain)
        self.effect = Effect(q.shape[2], q.shape[2], layout.tokens_per_frame, gain=gain)
        return FrameOnly(self.kernel)(q, k, v, x, context)

    def held(self, tokens: Tokens) -> Held:
        return FrameOnly(self.kernel).held(tokens)


class GridMixer(AVGGTMixer):
    """Attends with all queries to keys on a grid, to their own key and to the mean of the others."""

    def held(self, tokens: Tokens) -> Held:
        # Keys and values on the grid; the output, and products with the own keys or the combined output.
        chosen = 2 * self.grid_keys(tokens.layout) / tokens.count * tokens.bytes
        return Held(chosen + 2 * tokens.bytes + 20 * tokens.per_head, tokens.bytes)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout, method = dense_layout(self.method, q, context), self.method
        subset = on_grid(layout.frames, layout.grid, layout.num_special, method.stride, q.device)
        left_out = layout.tokens_per_scene - len(subset.index)
        # Mean over queries: for those on the grid, their own key is among the others.
        seen = len(subset.index) + 1 + left_out / layout.tokens_per_scene
        why = "one frame" if layout.frames == 1 else "every key is kept" if not left_out else None
        why, gain = method.verdict(why, lambda: self.predicted(layout, q))
        if why is not None:
            return self.dense(q, k, v, x, context, why, gain)
        mean_key, mean_value = (subset.mean.to(t.dtype) @ t for t in (k, v))
        mixed = attend_with_own(
            q,
            k.index_select(2, subset.index),
            v.index_select(2, subset.index),
            shared=(mean_key, mean_value, math.log(left_out) if method.log_bias else 0.0),
            own=(k, v, subset.own),
            kernel=self.kernel,
        )
        self.effect = Effect(q.shape[2], q.shape[2], seen, gain=gain)
        return mixed, None


def kept_patches(grid: tuple[int, int], stride: int) -> int:
    """Number of patches per frame that are keys for all queries."""
    return math.prod(int(_chosen(side, stride).sum()) for side in grid)


@dataclass(frozen=True, eq=False)
class Grid:
    """The keys of one scene.

    Attributes:
        index: [M], tokens of the scene that are keys for all queries: special ones and the grid.
        mean: [1, N], weight of each token in the mean of those left out.
        own: [N], added to the logit of each query's own key: minus infinity if that is in `index`.
    """

    index: Tensor
    mean: Tensor
    own: Tensor


@kept
def on_grid(frames: int, grid: tuple[int, int], num_special: int, stride: int, device: torch.device) -> Grid:
    """The keys of a scene; they depend only on its layout, and are cached for later forwards."""
    rows, columns = (_chosen(side, stride) for side in grid)
    in_frames = np.ones((frames, num_special + grid[0] * grid[1]), dtype=bool)
    in_frames[:, num_special:] = (rows[:, None] & columns).ravel()
    seen = in_frames.ravel()
    own = np.where(seen, -np.inf, 0).astype(np.float32)
    mean = (~seen[None] / max(1, (~seen).sum())).astype(np.float32)
    return Grid(*(torch.from_numpy(numbers).to(device) for numbers in (np.flatnonzero(seen), mean, own)))


def _chosen(side: int, stride: int) -> np.ndarray:  # [side], bool
    """One row in ``stride``, from the middle of the first cell on; a shorter side keeps one."""
    first = min((stride - 1) // 2, (side - 1) // 2)
    return (np.arange(side) - first) % stride == 0
