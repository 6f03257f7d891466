"""How much a forward computes, by part: what merging can save at most, before anything is timed.

A multiply-add counts 2. Only matrix products and convolutions count; norms, softmax, rotary embeddings and copies are
bound by memory and left out, so times follow these numbers where sequences are long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

ENCODER, FRAME, GLOBAL, PRODUCTS, HEADS = "encoder", "frame", "global", "global products", "heads"


@dataclass(frozen=True)
class Trunk:
    """Sizes of a backbone without its heads.

    Attributes:
        width: C.
        patch_size: Side in pixels.
        encoder_blocks: Blocks of the image encoder.
        frame_blocks, global_blocks: Blocks of alternating attention.
        encoder_special, special: Special tokens of a frame, in the encoder and after it.
    """

    width: int
    patch_size: int
    encoder_blocks: int
    frame_blocks: int
    global_blocks: int
    encoder_special: int
    special: int

    def cost(self, frames: int, size: tuple[int, int], *, heads: float = 0.0) -> Cost:
        """FLOPs of one dense forward.

        Args:
            frames: S, photographs of one scene.
            size: (H, W) in pixels.
            heads: FLOPs of all heads, which are added as they are.
        """
        patches = (size[0] // self.patch_size) * (size[1] // self.patch_size)
        encoded, tokens = patches + self.encoder_special, patches + self.special
        embedding = 2 * 3 * self.patch_size**2 * self.width * patches * frames
        parts = {
            ENCODER: embedding + self.encoder_blocks * frames * self._block(encoded),
            FRAME: self.frame_blocks * frames * self._block(tokens),
            GLOBAL: self.global_blocks * self._linears(frames * tokens),
            PRODUCTS: self.global_blocks * self._products(frames * tokens),
            HEADS: heads,
        }
        return Cost(frames * tokens, {name: float(value) for name, value in parts.items()})

    def _linears(self, tokens: int) -> int:
        """qkv 3, projection 1, MLP 8 matrices of C x C."""
        return 2 * 12 * self.width**2 * tokens

    def _products(self, tokens: int) -> int:
        """Scores and values."""
        return 2 * 2 * self.width * tokens**2

    def _block(self, tokens: int) -> int:
        return self._linears(tokens) + self._products(tokens)


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward.

    Attributes:
        tokens: N of a global attention.
        parts: ``encoder`` (patch embedding included), ``frame``, ``global`` (linear layers), ``global products``
            (scores and values of global attention) and ``heads``.
    """

    tokens: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        """One part over the total."""
        return self.parts[part] / self.total

    @property
    def limit(self) -> float:
        """The speedup if the products of global attention cost nothing; merging there alone gets no further."""
        return 1 / (1 - self.share(PRODUCTS))

    def limit_share(self, speedup: float) -> float:
        """How much of the time that could be saved was saved: (1 - 1 / speedup) / (1 - 1 / limit).

        1 is the limit, 0 no gain, and below 0 a loss. Above 1 where a method saves elsewhere too, or where the kernel
        is slower than the linear layers around it.
        """
        return (1 - 1 / speedup) / (1 - 1 / self.limit)

    def merged(self, queries: float, keys: float, *, matching: float = 0.0) -> Cost:
        """The same with fewer tokens inside global attention.

        Args:
            queries, keys: Shares that are kept.
            matching: FLOPs of finding out which.
        """
        products = self.parts[PRODUCTS] * queries * keys + matching
        return replace(self, parts={**self.parts, PRODUCTS: products})

    def packed(self, kept: float) -> Cost:
        """The same with a share of the tokens everywhere after the encoder, heads apart."""
        linear, quadratic = (FRAME, GLOBAL), (PRODUCTS,)
        factors = {name: kept if name in linear else kept**2 if name in quadratic else 1.0 for name in self.parts}
        parts = {name: value * factors[name] for name, value in self.parts.items()}
        return Cost(round(self.tokens * kept), parts)
