"""Depth Anything 3's transformer: DINOv2 whose later blocks alternate between frame and global attention.

Unlike in the released code, frames are not reordered once the reference is selected: no block depends on their order,
so it is enough that the right frame gets the token that marks the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import ForwardState, Packer
from geoaccel.layout import AttentionKind, TokenLayout
from geoaccel.memory_plan import MemoryPlan
from geoaccel.models.layers.block import Block, blocks_of
from geoaccel.models.layers.encoder import PatchEmbed, normalised
from geoaccel.models.layers.kept_layers import KeptLayer
from geoaccel.models.layers.normalised_frames import NormalisedFrames, embedded, normalised_by
from geoaccel.models.layers.stream import Layers, TokenStream, alternate
from geoaccel.registry import Registry

OFFSET = 0.1
"""Added to the grid size when the position embedding is resized, as in the first release of DINOv2."""


def _saddle_balanced(tokens: Tensor) -> Tensor:
    """The frame closest to the middle in three respects: similarity to the others, norm, and variance over channels."""
    unit = F.normalize(tokens, dim=-1)
    frames = tokens.shape[1]
    likeness = ((unit @ unit.mT).sum(-1) - 1) / (frames - 1)
    measures = torch.stack([likeness, tokens.norm(dim=-1), unit.var(-1)])
    low, high = measures.amin(-1, keepdim=True), measures.amax(-1, keepdim=True)
    return (((measures - low) / (high - low + 1e-8)) - 0.5).abs().sum(0).argmin(-1)


def _saddle_sim_range(tokens: Tensor) -> Tensor:
    """The frame whose similarity to the others has the widest range; two always tie, up to rounding."""
    unit = F.normalize(tokens, dim=-1)
    likeness = unit @ unit.mT - torch.eye(tokens.shape[1], device=tokens.device)
    return (likeness.amax(-1) - likeness.amin(-1)).argmax(-1)


def _number(choose: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    return lambda tokens: torch.full(tokens.shape[:1], choose(tokens.shape[1]), device=tokens.device)


REFERENCES: Registry[Callable[[Tensor], Tensor]] = Registry(
    "choice of the reference view",
    {
        "saddle_balanced": _saddle_balanced,
        "saddle_sim_range": _saddle_sim_range,
        "first": _number(lambda frames: 0),
        "middle": _number(lambda frames: frames // 2),
    },
)
"""By name, functions from one token per frame [B, S, C], float32, to the index of a frame [B]."""


@dataclass
class Features:
    """What the heads read.

    Attributes:
        layers: By block, two outputs concatenated [B, S, P, 2 * C], not normed: of the last frame block, and of the
            block itself.
        reference: Index of the reference frame [B]; None if none is selected.
    """

    layers: dict[int, Tensor | KeptLayer]
    reference: Tensor | None


class AnyView(nn.Module):
    """The transformer, under upstream's names.

    The slot ``memory_plan`` says how the whole forward keeps within a memory limit; only without gradients.

    Args:
        img_size, patch_size: Side in pixels of the square that the position embedding was learned on, and of a patch.
        dim, depth, num_heads: Width, blocks, heads.
        alt_start: The first block with rotary embeddings and normed queries and keys; from it on, odd blocks are
            global.
        rope_frequency: Base of the rotary embedding.
        gated: Whether MLPs are gated.
        layer_scale: Initial factor of the residual branches.
    """

    token_packer: Packer | None
    memory_plan: MemoryPlan | None

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        alt_start: int,
        rope_frequency: float,
        gated: bool,
        layer_scale: float,
    ) -> None:
        super().__init__()
        self.patch_size, self.alt_start, self.rope_frequency = patch_size, alt_start, float(rope_frequency)
        side = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.camera_token = nn.Parameter(torch.empty(1, 2, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, dim))
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, qk_norm=index >= alt_start, norm_eps=1e-6, layer_scale=layer_scale, gated=gated)
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        for token in (self.cls_token, self.camera_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        self.token_packer = None
        self.memory_plan = None

    def kinds(self) -> list[AttentionKind]:
        """The attention kind of each block."""
        start = self.alt_start
        return ["encoder" if index < start else "global" if index % 2 else "frame" for index in range(len(self.blocks))]

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        keep: Collection[int],
        *,
        camera_tokens: Tensor | None = None,  # [B, S, C]
        reference: str = "saddle_balanced",
    ) -> Features:
        """Features after the blocks to keep, none of them before ``alt_start``.

        Args:
            images: Images of one scene.
            keep: Indices of blocks.
            camera_tokens: Made from given cameras; there is then no reference.
            reference: How the reference is selected, a name of ``REFERENCES``; of two frames it is the first.
        """
        choose = REFERENCES[reference]
        stream, chosen = self.encode(self._normalised(images), choose if camera_tokens is None else None)
        if camera_tokens is None:
            # Token 0 belongs to the reference frame, token 1 to all others.
            frames = torch.arange(images.shape[1], device=self.pos_embed.device)
            first = frames == 0 if chosen is None else frames == chosen[:, None]
            camera_tokens = torch.where(first[..., None], self.camera_token[:, :1], self.camera_token[:, 1:])
        special = camera_tokens.expand(*images.shape[:2], -1)[:, :, None].to(stream.x.dtype)
        head_dim = blocks_of(self.blocks)[0].attn.head_dim
        stream = stream.enter(special, head_dim, self.rope_frequency, flat_global=True)
        steps = alternate(stream, self._after_encoder())
        planned = stream.step is not None
        del stream  # otherwise its tokens stay alive while the blocks run
        return Features(self._in_place(steps, set(keep)) if planned else self._side_by_side(steps, set(keep)), chosen)

    def _side_by_side(self, steps: Iterable[TokenStream], keep: Collection[int]) -> dict[int, Tensor | KeptLayer]:
        layers: dict[int, Tensor | KeptLayer] = {}
        within: Tensor | None = None
        for index, step in enumerate(steps, start=self.alt_start):
            glob = index % 2 == 1
            if not glob and not {index, index + 1}.isdisjoint(keep):
                within = step.dense()
            if index in keep:
                own = step.dense() if glob else within
                # Odd blocks are global: the first may have no frame block before it.
                assert own is not None
                layers[index] = torch.cat([own if within is None else within, own], dim=-1)
            if glob:
                within = None
        return layers

    def _in_place(self, steps: Iterable[TokenStream], keep: Collection[int]) -> dict[int, Tensor | KeptLayer]:
        """The same, for a stream that every block changes in place."""
        layers, last = Layers(), len(self.blocks) - 1
        for index, step in enumerate(steps, start=self.alt_start):
            if index % 2 == 0 and index + 1 in keep:
                layers.add(index + 1, step)
            if index in keep:
                # A frame block fills both halves, and so does the first global block.
                for _ in range(1 if index % 2 and index > self.alt_start else 2):
                    layers.add(index, step, last=index == last)
        return dict(layers.done())

    def _normalised(self, images: Tensor) -> Tensor | NormalisedFrames:
        def change(part: Tensor) -> Tensor:
            return normalised(part).to(self.cls_token.dtype)

        return normalised_by(images, change, self.memory_plan, self.pos_embed.device)

    def encode(
        self, images: Tensor | NormalisedFrames, choose: Callable[[Tensor], Tensor] | None
    ) -> tuple[TokenStream, Tensor | None]:
        """Run the frame-only blocks; also the index of the reference frame, selected before the last of them."""
        plan = None if isinstance(images, Tensor) else self.memory_plan
        state = ForwardState(images, plan=plan)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        layout = TokenLayout(images.shape[0], images.shape[1], (height, width), 1)
        # Nothing else may hold the first tokens, otherwise they stay alive while the encoder runs.
        stream = TokenStream(embedded(images, self.embed, plan, layout), layout, state=state)
        chosen = None
        for index, block in enumerate(blocks_of(self.blocks)[: self.alt_start]):
            if index == self.alt_start - 1 and choose is not None and images.shape[1] >= 3:
                chosen = choose(stream.special()[:, :, 0].float())
            stream = stream.through(block, "encoder", index)
            if self.token_packer is not None and index == self.token_packer.layer:
                stream = stream.packed_by(self.token_packer)
        if stream.packing is None:
            state.patches = stream.x[:, :, 1:]
        return stream, chosen

    def _after_encoder(self) -> Iterator[tuple[AttentionKind, Block]]:
        pairs = zip(self.kinds(), blocks_of(self.blocks), strict=True)
        return ((kind, block) for kind, block in pairs if kind != "encoder")

    def embed(
        self,
        images: Tensor,  # [n, 3, H, W]
    ) -> Tensor:  # [n, 1 + h * w, C]
        """Class token and patches, plus the position embedding."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return x + self.position_embedding(height, width).to(x.dtype)

    def position_embedding(self, height: int, width: int) -> Tensor:  # [1, 1 + h * w, C]
        """The learned embedding, resized (bicubic) by factors that a small offset slightly enlarges."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().transpose(1, 2).unflatten(-1, (side, side))
        factors = ((height + OFFSET) / side, (width + OFFSET) / side)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)

    def patches(
        self,
        layer: Tensor,  # [B, S, P, 2 * C] of Features
    ) -> Tensor:  # [B, S, h * w, 2 * C]
        """As the dense head reads them: the block's own output normed, that of the frame block unchanged."""
        within, own = layer[:, :, 1:].chunk(2, dim=-1)
        return torch.cat([within, self.norm(own)], dim=-1)
