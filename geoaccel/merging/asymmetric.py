"""Asymmetric attention, ours: every query attends to a subset of keys and values, chosen by position alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from geoaccel.attention import AttentionContext, Held, Tokens
from geoaccel.attention_kernels import KeyRows, attend, attend_groups, queries_at_once
from geoaccel.errors import UserError
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.gain import Extra, Work
from geoaccel.merging.key_subset import KeySubset, packed_subset, pick
from geoaccel.merging.method import AttentionMerging, MergingMixer, register
from geoaccel.merging.scenes import SceneMixer

FEW, ENOUGH = 8, 24
"""Without a budget, all keys stay up to the first number of frames, and from the second on no layer keeps more than one
patch in 2."""

PROFILE, OF_FEW = (2, 1, 2, 8), (3, 1, 4, 8)
"""By quarter of the layers: factors of the stride, and the strides for frame counts between the two limits. The second
quarter needs most keys, the last fewest."""

BUDGET, SMALL = 16.5, 5
"""For more frames: the key budget in frames, if a stride of at most 5 keeps within it."""

LARGER, GROWTH = 19.6, 1.7
"""Otherwise: the key budget in frames, and its growth with the square root of the number of frames, if that is more."""

OPERATIONS = 5
"""Additional small operations per attention compared with dense, if all queries attend at once."""


@register
@dataclass(frozen=True)
class Asymmetric(AttentionMerging):
    """Every query attends to a fixed subset of the keys and values; no tokens are compared, and none are merged.

    Keys and values are the special tokens of all frames, all patches of the first frame, and of every other frame one
    patch in ``stride``: a lattice whose phase changes from frame to frame, so that neighbouring frames are sampled at
    different places. The logit of a sampled key is raised by the logarithm of the number of patches that it represents
    (log bias). Which keys stay depends only on the number of frames and the grid, so that there is no data-dependent
    synchronisation.

    A method of ours. AVGGT (arXiv 2512.02541), Spark3R (arXiv 2605.06270) and RegimeVGGT (arXiv 2606.18439) leave out
    keys and values by position, too. The evidence for the defaults is two small networks on rendered scenes.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=Asymmetric(keys=8))

    Attributes:
        keys: Key budget, as a number of full frames of patches; the stride is the smallest that keeps within it. None:
            up to 8 frames every key stays, and attention is dense; from 24 frames on at most one patch in 2 and 16.5
            frames' worth stay; from 95 frames on 19.6 frames' worth, or 1.7 times the square root of the number of
            frames if that is more. That is one patch in 2 for 32 frames, in 5 for 64 to 94, in 7 for 128, in 19 for
            1000. Up to 128 frames the rule was chosen by measurement.
        stride: Keep one patch in this many, in all layers and for any number of frames; replaces ``keys``. At least one
            patch of each frame is sampled.
        anchor: All patches of the first frame are keys. VGGT expresses all cameras in the first one and needs it; pi3
            has no reference frame and may do without.
        log_bias: Weight a sampled key by the number of patches that it represents (proportional attention).
        counted_frames: Caps the total weight of the sampled keys at the patches of this many frames. Networks are
            trained with few frames, and with many more, attention to patches drowns out the other keys. Cameras then
            move away from the dense model's, possibly closer to ground truth. None: no cap.
        per_head: Every head samples different patches, so that one head sees what another leaves out. Rows that
            ``come`` or ``alike`` have packed are sampled identically for all heads.
        depth_profile: The stride from ``keys`` applies to the second quarter of the layers; the first and third quarter
            tolerate twice that stride, the last eight times. From 9 to 23 frames, where there is no budget, the second
            quarter keeps every key and the first, third and last one patch in 3, 4 and 8. False: the same stride in all
            layers.
    """

    name: ClassVar[str] = "asymmetric"
    takes_packed: ClassVar[bool] = True
    keys: float | None = None
    stride: int | None = None
    anchor: bool = True
    log_bias: bool = True
    counted_frames: float | None = None
    per_head: bool = True
    depth_profile: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 1 if self.anchor else 0
        if self.keys is not None and self.stride is not None:
            raise UserError(f"{self.name}: keys={self.keys} and stride={self.stride} both set the keys; leave one out")
        if self.keys is not None and not _above(self.keys, least):
            raise UserError(f"{self.name}: keys={self.keys!r} must be a number of frames above {least}")
        if self.counted_frames is not None and not self.log_bias:
            raise UserError(
                f"{self.name}: counted_frames={self.counted_frames} caps what log_bias adds; leave out log_bias=False"
            )
        if self.counted_frames is not None and not _above(self.counted_frames, 0):
            raise UserError(f"{self.name}: counted_frames={self.counted_frames!r} must be a number of frames above 0")
        if self.stride is not None and not self.depth_profile:
            raise UserError(
                f"{self.name}: stride={self.stride} already applies to all layers; leave out depth_profile=False"
            )
        if self.stride is not None and self.stride < 1:
            raise UserError(f"{self.name}: stride={self.stride} is below 1; give 1 (keeps every key) or more")

    def stride_for(self, frames: int, quarter: int = 1) -> int:
        """The stride (one patch in so many is a key) for S frames in one quarter of the layers, from 0."""
        if self.stride is not None:
            return self.stride
        stride = self._by_budget(frames)
        all_stay = stride == 1 and (self.keys is not None or frames <= FEW)
        if all_stay or not self.depth_profile:
            return stride
        return OF_FEW[quarter] if stride == 1 else stride * PROFILE[quarter]

    def _by_budget(self, frames: int) -> int:
        """The smallest stride within the budget; if layers differ, that of the second quarter."""
        whole = 1 if self.anchor else 0

        def within(keys: float) -> int:
            return max(1, math.ceil((frames - whole) / (keys - whole)))

        if self.keys is not None:
            return within(self.keys)
        if frames < ENOUGH:
            return 1
        larger = within(max(LARGER, GROWTH * math.sqrt(frames)))
        return max(2, min(within(BUDGET), max(SMALL, larger)))

    def log_count(self, patches_each: float, frames: int) -> float:
        """Bias on the logits of sampled keys, each of which represents so many patches of S frames."""
        if not self.log_bias or patches_each == 1:  # no patch is left out
            return 0.0
        others = frames - int(self.anchor)
        counted = others if self.counted_frames is None else min(others, self.counted_frames)
        return math.log(patches_each * counted / others)

    def keeps_all(self, frames: int) -> bool:
        """Whether all keys of this many frames stay, in all layers."""
        return self.stride_for(frames, 3) == 1

    def keys_of(self, layout: TokenLayout, tokens: float, quarter: int = 1) -> float:
        """Number of a scene's tokens that are keys in one quarter of the layers; approximate if they are packed.

        Largest in the second quarter.
        """
        frames, special = layout.frames, layout.frames * layout.num_special
        anchored, each = int(self.anchor), (tokens - special) / frames
        sampled = each / self.stride_for(frames, quarter)
        if tokens == layout.tokens_per_scene:
            sampled = max(1, math.floor(sampled) if self.per_head else sampled)
        return special + anchored * each + (frames - anchored) * sampled

    def mean_keys(self, layout: TokenLayout, tokens: float, depth: int) -> float:
        """The same, on average over the layers of a network."""
        return sum(self.keys_of(layout, tokens, quarter) for quarter in quarters(depth)) / depth

    def mixer(self, kernel: str) -> AsymmetricMixer:
        return AsymmetricMixer(self, kernel)

    def mixers(self, kernel: str, depth: int) -> list[MergingMixer]:
        return [AsymmetricMixer(self, kernel, depth, quarter) for quarter in quarters(depth)]


def quarters(depth: int) -> list[int]:
    """The quarter of the network that the middle of each layer lies in, from 0. A single layer is in the second."""
    return [(4 * layer + 1) // depth for layer in range(depth)]


def _above(number: object, least: int) -> bool:
    """Whether a knob is a finite number above `least`."""
    return isinstance(number, Real) and not isinstance(number, bool) and least < float(number) < math.inf


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """The keys of one scene of packed rows.

    Attributes:
        queries: The rows of the scene.
        rows: [M], rows that are keys.
        bias: [M], bias on their logits.
        by_bias: The keys grouped by bias.
    """

    queries: slice
    rows: Tensor
    bias: Tensor
    by_bias: KeyRows


class AsymmetricMixer(SceneMixer):
    """Attends with all queries to a subset of the keys; restores nothing.

    Attributes:
        depth: Layers of the network.
        quarter: Quarter of the network that this layer is in, from 0.
    """

    method: Asymmetric
    refusal = partial(
        UserError, "asymmetric attention needs the tokens of whole scenes, dense or packed, in global attention"
    )

    def __init__(self, method: Asymmetric, kernel: str, depth: int = 1, quarter: int = 1) -> None:
        super().__init__(method, kernel)
        self.depth, self.quarter = depth, quarter

    def why_dense(self, layout: TokenLayout) -> str | None:
        kept = self.method.keeps_all(layout.frames)
        return "one frame" if layout.frames == 1 else "every key of so few frames is kept" if kept else None

    def mix_scenes(
        self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, layout: TokenLayout, packing: Packing | None
    ) -> tuple[Tensor, float, float]:
        stride = self.method.stride_for(layout.frames, self.quarter)
        if packing is not None:
            mixed, keys = self.attend_packed(q, k, v, self.packed_keys(context, layout, packing, stride))
            return mixed, q.shape[2], keys
        if stride == 1:
            return attend(q, k, v, kernel=self.kernel), q.shape[2], q.shape[2]
        subset = self.subset(layout, q.shape[1])
        if k.shape[2] == q.shape[2]:
            index = subset.on(q.device)  # for this layer only: kept, it would add to the peak of memory
            k, v = pick(k, v, index)
        bias = self.method.log_count(subset.patches_each, layout.frames)
        return self.attend(q, k, v, subset, bias), q.shape[2], subset.whole + subset.sampled

    def reads_keys(self, x: Tensor, heads: int, context: AttentionContext) -> Tensor | None:  # x [n, N, C]
        layout = context.layout
        if layout is None or context.packing is not None or x.shape[1] != layout.tokens_per_scene:
            return None
        like = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # the shape, dtype and device of the queries
        why, _ = self.method.verdict(self.why_dense(layout), lambda: self.predicted(layout, like))
        if why is not None or self.method.stride_for(layout.frames, self.quarter) == 1:
            return None
        return self.subset(layout, heads).index

    def work(self, layout: TokenLayout, q: Tensor) -> Work:  # q [n, A, N, D]
        """Work of one attention, averaged over all layers, which act all or none."""
        tokens = q.shape[2] * len(q) / layout.batch  # of one scene; of packed ones on average
        keys, width = self.method.mean_keys(layout, tokens, self.depth), q.shape[1] * q.shape[3]
        extra = Extra(read=2 * keys * width, operations=OPERATIONS)
        if q.device.type == "cpu" and tokens == layout.tokens_per_scene and self.setting is not None:
            # Only these keys and values are computed, from tokens gathered for every head. If the projection is not a
            # plain linear layer all are computed, and a forward takes some 2 % longer than predicted here.
            apart = q.shape[1] if self.method.per_head else 1
            spared = 2 * width**2 * (tokens - keys)
            extra = Extra(read=keys * width * apart, products=-spared, operations=OPERATIONS * (1 + apart))
        return Work(tokens, tokens, keys, extra)

    def held(self, tokens: Tokens) -> Held:
        # The chosen keys and values; on CUDA two outputs are combined by their log-sum-exp, the second in chunks if
        # there are many queries.
        keys = self.method.keys_of(tokens.layout, tokens.count) / tokens.count
        second = queries_at_once(math.ceil(tokens.count)) / tokens.count
        mixed = (1 + second) * tokens.bytes + 16 * tokens.per_head if tokens.cuda else tokens.bytes
        return Held(2 * keys * tokens.bytes + mixed, tokens.bytes, keys=keys)

    def subset(self, layout: TokenLayout, heads: int) -> KeySubset:
        """The keys of a dense scene, on the CPU."""
        heads = heads if self.method.per_head else 1
        stride, anchor = self.method.stride_for(layout.frames, self.quarter), self.method.anchor
        return KeySubset(layout.frames, layout.grid, layout.num_special, stride, anchor, heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, subset: KeySubset, bias: float) -> Tensor:
        """Attention of all queries to the keys of a subset; the bias applies to the logits of the sampled ones."""
        if bias == 0:
            return attend(q, k, v, kernel=self.kernel)
        groups = ((subset.whole, 0.0), (subset.sampled, bias))
        return attend_groups(q, k, v, groups, kernel=self.kernel)

    def packed_keys(
        self, context: AttentionContext, layout: TokenLayout, packing: Packing, stride: int
    ) -> list[PackedKeys]:
        """The keys of every scene of packed rows; the same in all layers of a forward with the same stride."""
        notes, key = context.state.notes, (self.method, packing, stride)
        if key not in notes:
            notes[key] = [
                self.scene_keys(packing, layout, stride, scene, start)
                for scene, start in enumerate(accumulate(packing.scene_lengths[:-1], initial=0))
            ]
        return notes[key]

    def scene_keys(self, packing: Packing, layout: TokenLayout, stride: int, scene: int, start: int) -> PackedKeys:
        """The keys of one scene, whose rows begin at ``start``; the weights of rows enter the bias."""
        device, weights, length = packing.positions.device, packing.log_weight, packing.scene_lengths[scene]
        frames = packing.frame_lengths[scene * layout.frames : (scene + 1) * layout.frames]
        index, sampled = packed_subset(frames, layout.num_special, stride, self.method.anchor)
        rows = torch.tensor(index, device=device) + start
        bias = weights[rows] if weights is not None else torch.zeros(len(rows), dtype=torch.float32, device=device)
        if sampled:
            left_out = length - (len(index) - sampled)
            bias[len(index) - sampled :] += self.method.log_count(left_out / sampled, layout.frames)
        return PackedKeys(slice(start, start + length), rows, bias, KeyRows(bias))

    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, scenes: list[PackedKeys]) -> tuple[Tensor, float]:
        """The same for packed rows, scene by scene, and the keys of all scenes."""
        mixed = [
            attend(
                q[:, :, scene.queries],
                k.index_select(2, scene.rows),
                v.index_select(2, scene.rows),
                key_bias=scene.bias,
                key_rows=scene.by_bias,
                kernel=self.kernel,
            )
            for scene in scenes
        ]
        return torch.cat(mixed, dim=2), float(sum(len(scene.rows) for scene in scenes))
