"""Compute cost of a forward by part, and the upper bound on what merging can save, without timing anything.

A multiply-add counts 2. Only matrix products and convolutions count; norms, softmax, rotary embeddings and copies are
memory-bound and left out, so times follow these numbers for long sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from geoaccel.errors import UserError

EMBEDDING, HEADS, MATCHING = "patch embedding", "heads", "matching"
ENCODER, FRAME, GLOBAL = "encoder linears", "frame linears", "global linears"
ENCODER_PRODUCTS, FRAME_PRODUCTS, PRODUCTS = "encoder products", "frame products", "global products"


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
            heads: FLOPs of all heads, added as given.
        """
        patches = (size[0] // self.patch_size) * (size[1] // self.patch_size)
        encoded, tokens = patches + self.encoder_special, patches + self.special
        parts = {
            EMBEDDING: 2 * 3 * self.patch_size**2 * self.width * patches * frames,
            ENCODER: self.encoder_blocks * self._linears(frames * encoded),
            ENCODER_PRODUCTS: self.encoder_blocks * frames * self._products(encoded),
            FRAME: self.frame_blocks * self._linears(frames * tokens),
            FRAME_PRODUCTS: self.frame_blocks * frames * self._products(tokens),
            GLOBAL: self.global_blocks * self._linears(frames * tokens),
            PRODUCTS: self.global_blocks * self._products(frames * tokens),
            HEADS: heads,
        }
        return Cost(frames * tokens, {name: float(value) for name, value in parts.items()})

    def _linears(self, tokens: int) -> int:
        """12 matrices of C x C: qkv 3, projection 1, MLP 8."""
        return 2 * 12 * self.width**2 * tokens

    def _products(self, tokens: int) -> int:
        """Scores and values."""
        return 2 * 2 * self.width * tokens**2


@dataclass(frozen=True)
class Cost:
    """FLOPs of a forward.

    Attributes:
        tokens: N of a global attention.
        parts: ``patch embedding``; ``linears`` (qkv, projection, MLP) and ``products`` (scores and values of the
            attention) of the ``encoder``, ``frame`` and ``global`` blocks, as ``frame linears``; ``heads``; and
            ``matching``, if merging added some.
    """

    tokens: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Sum over all parts."""
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        """Fraction of the total in one part."""
        return self.parts[part] / self.total

    @property
    def limit(self) -> float:
        """The speedup if the products of global attention were free: the bound for merging there alone."""
        return self.total / (self.total - self.parts[PRODUCTS])

    def limit_share(self, speedup: float) -> float:
        """Fraction of the possible saving that was achieved: (1 - 1 / speedup) / (1 - 1 / limit).

        1 is the limit, 0 no gain, below 0 a loss. Above 1 if a method also saves elsewhere, or if the kernel is slower
        than the linear layers around it.

        Args:
            speedup: Measured dense over accelerated time; `self` is the cost of the dense model.

        Raises:
            ValueError: If the speedup is not positive, or global attention has no products left to save.
        """
        if not speedup > 0:
            raise UserError(f"speedup={speedup} is not positive; give dense time over accelerated time")
        if self.limit == 1:
            raise UserError("global attention has no products left to save; use the cost of the dense model")
        return (1 - 1 / speedup) / (1 - 1 / self.limit)

    def merged(self, queries: float, keys: float, *, matching: float = 0.0) -> Cost:
        """The same with fewer tokens inside global attention.

        The linears around it stay the same. A method that restores the full length only after the projection
        (FastVGGT, LiteVGGT) also saves up to a twelfth of them.

        Args:
            queries, keys: Fractions kept.
            matching: FLOPs of matching.
        """
        return self._changed({PRODUCTS: queries * keys}, matching)

    def packed(self, kept: float, *, encoder: float = 0.0, matching: float = 0.0) -> Cost:
        """The same with fewer tokens from some block of the encoder on, except in the heads.

        Args:
            kept: Fraction of the tokens kept, the same in every frame. If frames keep different fractions, attention
                within frames costs a little more.
            encoder: Fraction of the encoder's blocks after the packing.
            matching: FLOPs of matching.
        """
        factors = {FRAME: kept, FRAME_PRODUCTS: kept**2, GLOBAL: kept, PRODUCTS: kept**2}
        factors |= {ENCODER: 1 - encoder + encoder * kept, ENCODER_PRODUCTS: 1 - encoder + encoder * kept**2}
        return replace(self._changed(factors, matching), tokens=round(self.tokens * kept))

    def _changed(self, factors: Mapping[str, float], matching: float) -> Cost:
        parts = {name: value * factors.get(name, 1.0) for name, value in self.parts.items()}
        if matching:
            parts[MATCHING] = parts.get(MATCHING, 0.0) + matching
        return replace(self, parts=parts)
