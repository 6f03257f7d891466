"""Peak memory of a forward, from the tensors alive at each point of it.

X is the residual stream. A network allocates a few multiples of it at each of these points:

- from the images to the first tokens;
- in a block: the stream, its norm, queries, keys and values, the mixer, the projection;
- the layers that heads read, together with the last block, and then with the heads.

With a plan (:mod:`geoaccel.memory_plan`) a block holds the stream, queries, keys and values; everything else exists for
a part of the tokens only. Workspace of kernels and overhead of CUDA's allocator are not included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from geoaccel.attention import DenseMixer, Held, Mixer, Tokens
from geoaccel.cost import Trunk
from geoaccel.kernel_memory import kernel_bytes
from geoaccel.layout import TokenLayout
from geoaccel.memory_plan import MemoryPlan
from geoaccel.models.layers.block import MLP_CHUNK_TOKENS

KEPT_BY_LIBRARY = 1.15
"""On a CPU, resident over counted bytes: the C library keeps freed pieces of up to 32 MiB. Measured: vggt-mini at 128
frames with a plan took 504 MiB where 411 are counted."""

PIXEL = 4
"""Bytes per colour channel of a pixel of float32 images."""


@dataclass(frozen=True)
class Forward:
    """One forward over S frames of H x W.

    Attributes:
        trunk: Sizes of the network.
        frames, size: S and (H, W).
        heads: A of the trunk.
        element: Bytes per number in the trunk.
        layers: Number of layers that the heads read.
        cuda: Whether it runs on a CUDA device.
        plan: How it keeps within a memory limit; None: it does not.
        weighed: Whether packed keys are weighted by the number of tokens merged into them.
        rows: Fraction of the tokens that a block sees if each block packs them separately; such blocks take all of
            them at once, even with a plan. None: they do not.
    """

    trunk: Trunk
    frames: int
    size: tuple[int, int]
    heads: int
    element: int
    layers: int
    cuda: bool
    plan: MemoryPlan | None = None
    weighed: bool = False
    rows: float | None = None

    @property
    def tokens(self) -> Tokens:
        """The tokens after the encoder."""
        side = self.trunk.patch_size
        layout = TokenLayout(1, self.frames, (self.size[0] // side, self.size[1] // side), self.trunk.special)
        return Tokens(layout, layout.tokens_per_scene, self.trunk.width, self.heads, self.element, self.cuda)

    @property
    def images(self) -> float:
        """Bytes of the images in float32."""
        return self.frames * 3 * self.size[0] * self.size[1] * PIXEL

    @property
    def part(self) -> Tokens:
        """The tokens that a plan processes at a time."""
        assert self.plan is not None
        whole = self.tokens
        per_frame = whole.layout.tokens_per_frame
        return replace(whole, count=min(self.plan.frames_in_blocks(per_frame) * per_frame, whole.count))

    def peak(self, mixers: Iterable[Mixer], share: float, heads: float) -> float:
        """Bytes without the weights, and on a CPU without the images.

        Args:
            mixers: Mixers of the global attentions.
            share: Fraction of the tokens left after packing; 1: no packing.
            heads: Bytes of the heads without their input.
        """
        stages = [self._images(), self._encoder(share), *(self._block(mixer, share) for mixer in _different(mixers))]
        kept = 1.0 if self.cuda else KEPT_BY_LIBRARY
        return kept * max(*stages, self._heads(heads)) + self._given()

    def _given(self) -> float:
        """Images on the device, if they are moved there."""
        return self.images if self.cuda and self.plan is None else 0.0

    def _images(self) -> float:
        """Images minus the mean, those divided by the deviation, and the first tokens; or those of a few frames."""
        x, normalised = self.tokens.bytes, self.images * self.element / PIXEL
        if self.plan is None:
            return max(2 * self.images + (normalised if self.element < PIXEL else 0), normalised + 3 * x)
        share = self.part.count / self.tokens.count
        return x + share * max(3 * self.images, normalised + 3 * x)

    def _encoder(self, share: float) -> float:
        """Its blocks, and its tokens together with those that enter the trunk."""
        x = self.tokens.bytes
        if self.plan is not None:
            return max(x + _work(self.part), 2 * x, x + (3 * x if share < 1 else 0))
        normalised = self.images * self.element / PIXEL
        block = max(_work(self.tokens, rotated=False), _mlp(self.tokens))
        return normalised + max(block, 3 * x if share < 1 else 0)

    def _block(self, mixer: Mixer, share: float) -> float:
        """The last block, and the layers kept before it."""
        x = self.tokens.bytes
        seen = replace(self.tokens, count=share * self.tokens.count, weighed=self.weighed and share < 1)
        held = mixer.held(seen) if hasattr(mixer, "held") else Held(seen.bytes, seen.bytes)
        kernel = getattr(mixer, "kernel", "sdpa")
        if self.plan is None:
            held = replace(held, inside=held.inside + kernel_bytes(kernel, seen, held))
            # The first half of the last layer is the stream itself, unless packed.
            kept = 2 * (self.layers - 1) * x + (x if share < 1 else 0)
            return kept + max(_work(seen, held), _mlp(seen))
        kept = max(0, 2 * self._layers_on_device() - 1) * x
        if self.rows is not None:
            packed = replace(self.tokens, count=self.rows * self.tokens.count)
            return kept + 2 * x + max(_work(packed), _mlp(packed))
        part = replace(self.part, count=min(self.part.count, seen.count))
        if _in_parts(seen, mixer):  # queries of a part at a time
            held = Held(part.bytes, part.bytes, queries=part.count / seen.count)
        held = replace(held, inside=held.inside + kernel_bytes(kernel, seen, held))
        return kept + _planned(seen, part, mixer, held)

    def _heads(self, work: float) -> float:
        return 2 * self._layers_on_device() * self.tokens.bytes + work

    def _layers_on_device(self) -> int:
        """Layers that are not offloaded; plans are made for all heads, and fewer may run."""
        waiting = self.plan.host_layers if self.plan is not None and self.cuda else 0
        return max(0, self.layers - waiting)


def _different(mixers: Iterable[Mixer]) -> list[Mixer]:
    """One of each kind."""
    return list({(type(mixer), repr(mixer)): mixer for mixer in mixers}.values())


def _work(tokens: Tokens, held: Held | None = None, *, rotated: bool = True) -> float:
    """A block with all of its tokens at once: x, its norm, qkv, q and k rotated, and what follows."""
    x = tokens.bytes
    held = held or Held(x, x)
    before = (7 if rotated else 5) * x
    behind = held.mixed * (3 if held.copied else 2)
    if held.restored:
        behind = max(behind, 2 * held.mixed + x)
    # Except on CUDA, norms and rotations of queries and keys are separate operations.
    rotating = 0 if tokens.cuda or not rotated else 10.5 * x
    return max(before + held.inside, before + behind, rotating)


def _mlp(tokens: Tokens) -> float:
    """The stream before and after the attention, its norm, and the hidden layer of a chunk or all of the output."""
    x, chunk = tokens.bytes, min(1.0, MLP_CHUNK_TOKENS / tokens.count) * tokens.bytes
    return max(3 * x + 8 * chunk + (x - chunk), 5 * x)


def _in_parts(tokens: Tokens, mixer: Mixer) -> bool:
    """Whether a plan lets some of the queries attend at a time."""
    return isinstance(mixer, DenseMixer) and tokens.count == tokens.layout.tokens_per_scene


def _planned(tokens: Tokens, part: Tokens, mixer: Mixer, held: Held) -> float:
    """A block that updates its tokens in place."""
    x = tokens.bytes
    work = max(_work(part), _mlp(part)) + part.bytes
    if _in_parts(tokens, mixer):
        return 4 * x + max(work, held.inside)
    projected = held.mixed + work
    if held.restored:
        projected = max(held.mixed * (3 if held.copied else 2), held.mixed + x, x + work)
    # The caller's queries, keys and values are freed before the projection.
    return x + max(3 * x + work, 3 * x + (x if getattr(mixer, "reads_tokens", True) else 0) + held.inside, projected)
