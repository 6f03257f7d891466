"""VGGT's alternating-attention aggregator (arXiv 2503.11651, section 3.2)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from geoaccel.layout import AttentionKind
from geoaccel.models.layers.block import Block, blocks_of
from geoaccel.models.layers.encoder import DinoEncoder, check_images, normalised
from geoaccel.models.layers.kept_layers import KeptLayer
from geoaccel.models.layers.stream import Layers, TokenStream, alternate


class Aggregator(nn.Module):
    """Computes the features of every alternating-attention layer from images.

    Layer i is one frame block and one global block; its feature is both outputs concatenated. The first frame's special
    tokens have separate parameters, which is all that makes it the reference view.
    """

    def __init__(
        self,
        encoder: DinoEncoder,
        *,
        depth: int,
        num_heads: int,
        num_register_tokens: int,
        rope_frequency: float,
        layer_scale: float,
    ) -> None:
        super().__init__()
        embed_dim = encoder.pos_embed.shape[-1]
        self.patch_size = encoder.patch_size
        self.num_heads = num_heads
        self.rope_frequency = float(rope_frequency)
        self.holds_reference = True  # the first frame of the input is the first of the scene
        self.patch_embed = encoder
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, embed_dim))
        self.register_token = nn.Parameter(torch.empty(1, 2, num_register_tokens, embed_dim))
        nn.init.normal_(self.camera_token, std=1e-6)
        nn.init.normal_(self.register_token, std=1e-6)

        def block() -> Block:
            return Block(embed_dim, num_heads, qk_norm=True, layer_scale=layer_scale)

        self.frame_blocks = nn.ModuleList(block() for _ in range(depth))
        self.global_blocks = nn.ModuleList(block() for _ in range(depth))

    @property
    def depth(self) -> int:
        """Number of layers, each a frame block and a global block."""
        return len(self.frame_blocks)

    @property
    def patch_start_idx(self) -> int:
        """Number of special tokens, where the patches of a frame begin."""
        return 1 + self.register_token.shape[2]

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        keep: Collection[int] | None = None,
    ) -> tuple[list[Tensor | KeptLayer | None], int]:  # depth x [B, S, P, 2 * C]
        """Features of every layer, as upstream returns them.

        Args:
            images: Images; H and W are multiples of the patch size.
            keep: Layers to return (all by default). The others are None in the list, and never stored: at 300
                frames of 518 x 392 pixels all 24 layers of VGGT-1B take 61 GB in float32, the four that its heads
                read take 10.

        Returns:
            The list of features, and the index at which patch tokens start.
        """
        check_images(images, self.patch_size)
        wanted = range(self.depth) if keep is None else keep
        features: list[Tensor | KeptLayer | None] = []
        stream = self.tokenize(images)
        steps = alternate(stream, self._in_order())
        if stream.step is not None:
            del stream
            return self._in_place(steps, wanted), self.patch_start_idx
        del stream  # otherwise its tokens stay alive while the blocks run
        for layer, after_frame in enumerate(steps):
            # The frame block's output is read again only if the layer is kept.
            frame_feature = after_frame.dense() if layer in wanted else None
            del after_frame
            after_global = next(steps)
            features.append(None if frame_feature is None else torch.cat([frame_feature, after_global.dense()], dim=-1))
            del frame_feature, after_global  # otherwise they stay alive during the next block
        return features, self.patch_start_idx

    def _in_place(self, steps: Iterator[TokenStream], wanted: Collection[int]) -> list[Tensor | KeptLayer | None]:
        """The same, for a stream that every block changes in place."""
        layers = Layers()
        for number, step in enumerate(steps):
            layer = number // 2
            if layer in wanted:
                layers.add(layer, step, last=number == 2 * self.depth - 1)
        kept = layers.done()
        return [kept.get(layer) for layer in range(self.depth)]

    def _in_order(self) -> Iterator[tuple[AttentionKind, Block]]:
        for frame, glob in zip(blocks_of(self.frame_blocks), blocks_of(self.global_blocks), strict=True):
            yield "frame", frame
            yield "global", glob

    def tokenize(self, images: Tensor) -> TokenStream:
        """Encode every image and prepend the special tokens."""
        dtype = self.camera_token.dtype
        encoded = self.patch_embed(self.patch_embed.normalised(images, lambda part: normalised(part).to(dtype)))
        special = torch.cat([self.camera_token, self.register_token], dim=2)  # [1, 2, 1 + R, C]
        # Slot 0 belongs to the reference frame, slot 1 to all others.
        first, others = special[:, :1], special[:, 1:]
        own = int(self.holds_reference)
        special = torch.cat([first[:, :own], others.expand(-1, images.shape[1] - own, -1, -1)], dim=1)
        special = special.expand(len(images), -1, -1, -1).to(encoded.x.dtype)
        return encoded.enter(special, special.shape[-1] // self.num_heads, self.rope_frequency)
