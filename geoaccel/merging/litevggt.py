"""LiteVGGT: geometry-aware cached token merging (Shu et al., CVPR 2026, arXiv 2512.04939)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.attention import AttentionContext, Frames
from geoaccel.errors import UserError
from geoaccel.kept import kept
from geoaccel.knobs import whole_numbers
from geoaccel.layout import TokenLayout
from geoaccel.merging import released
from geoaccel.merging.gain import Extra
from geoaccel.merging.joint import JointMerging, JointMixer
from geoaccel.merging.method import MergingMixer, register
from geoaccel.merging.partition import Partition, highest, lowest_of_cells, num_cells, random_of_cells, scene_mask

Targets = Literal["lowest", "random"]

PUBLISHED_DEPTH = 24
REFRESH = (0, 6, 12, 18)
PROJECTED_CHANNELS = 32
WINDOW = 3
GRADIENT_SHARE = 0.7
GAMMA = 1.4
LUMA = (0.299, 0.587, 0.114)
CHUNK_FRAMES = 8
"""Number of frames whose importance is computed at a time."""

PATCH_NUMBERS = 5000
"""Numbers read for the gradients and the ranking of a patch of 14 x 14 pixels."""


@register
@dataclass(frozen=True)
class LiteVGGT(JointMerging):
    """Keeps edges, merges the rest into the flattest patch of each cell, and reuses the matching over several layers.

    A map of geometric importance (image gradient, and variance of the encoder's tokens among neighbours) ranks the
    patches of each frame. The highest tenth stays unmerged; targets are all tokens of the first frame, the special
    tokens of all frames, and the lowest patch of every 2 x 2 cell; all others (the sources) join the most similar
    target, by the attention's input. Matching runs at every sixth layer only. The authors fine-tune the network for it
    and run it in FP8; merging alone needs neither.

    Differs from the paper in:
        - We do not know the paper's weights for the two parts of the map; 0.3 and 0.7 are from the published code.
        - A target among the highest tenth stays a target; the next highest patch of the frame is then protected
          instead, so that every frame protects equally many.
        - For networks without 24 layers, matching is recomputed at the same relative depths.
        - Odd grids have smaller cells at their edges; the paper does not mention them.
        - pi3, which the paper does not cover, has no reference frame: the first one is the anchor there too, unless
          ``anchor=False``.
        - A single frame, or so few tokens that merging would gain too little, is left dense (``bypass=False``: only a
          single frame is).

    ``targets="random"`` is ours: a random patch of each cell absorbs the others. It cost less camera accuracy than the
    paper's choice on 64 rendered scenes with two small networks (docs/results/merging.md); large networks and
    photographs have not been tried.

    Where the published code differs is documented in :mod:`geoaccel.merging.released`; ``released_code`` reproduces it,
    for the authors' fine-tuned weights.

    Example:
        >>> model = geoaccel.accelerate(geoaccel.load_model("vggt-mini"), merging=LiteVGGT(protect=0.2))

    Attributes:
        refresh: Layers, out of 24, at which matching is recomputed; the first layer always is. None: 0, 6, 12 and 18;
            with ``released_code`` those of the published code.
        targets: Which patch of a cell absorbs the others: the ``lowest`` in importance, or a ``random`` one.
        seed: For the projection of the tokens, which is random in the published code, and for random targets.
    """

    name: ClassVar[str] = "litevggt"
    refresh: tuple[int, ...] | None = None
    targets: Targets = "lowest"
    seed: int = 33

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh is not None:
            refresh = whole_numbers(self.refresh)
            if refresh is None or not all(0 <= layer < PUBLISHED_DEPTH for layer in refresh):
                raise UserError(
                    f"litevggt: refresh={self.refresh} must be layers from 0 to {PUBLISHED_DEPTH - 1}: they are "
                    f"counted out of {PUBLISHED_DEPTH}, whatever the depth of the model"
                )
            object.__setattr__(self, "refresh", refresh)
        if self.released_code and self.targets != "lowest":
            raise UserError("litevggt: the released code chooses its own targets; leave out released_code or targets")

    @property
    def refresh_layers(self) -> tuple[int, ...]:
        """Layers, out of 24, at which matching is recomputed."""
        if self.refresh is not None:
            return self.refresh
        return released.LITEVGGT_REFRESH if self.released_code else REFRESH

    def mixers(self, kernel: str, depth: int) -> list[MergingMixer]:
        renewed = sorted({0, *(layer * depth // PUBLISHED_DEPTH for layer in self.refresh_layers)})
        shared = {"matchings": len(renewed), "depth": depth}
        sources = [max(layer for layer in renewed if layer <= index) for index in range(depth)]
        return [JointMixer(self, kernel, layer=index, source=source, **shared) for index, source in enumerate(sources)]

    def preparation(self, layout: TokenLayout, width: int) -> Extra:
        patches = layout.frames * layout.num_patches
        return Extra(read=patches * PATCH_NUMBERS, products=patches * width * PROJECTED_CHANNELS)

    def partition(self, context: AttentionContext, layout: TokenLayout, device: torch.device) -> Partition:
        """A partition of each scene, by the importance of its patches."""
        images, tokens = context.state.images, context.state.patches
        assert images is not None, "read in prepare, when images are still available"
        assert tokens is not None, "read in prepare, where tokens are dense"
        projection = orthogonal(tokens.shape[-1], PROJECTED_CHANNELS, self.seed).to(device)
        score = importance(images.flatten(0, 1), tokens.flatten(0, 1), layout.grid, projection)
        score = score.unflatten(0, (layout.batch, layout.frames))
        if self.released_code:
            return released.litevggt_partition(score, layout, self.protect)
        if self.targets == "random":
            patches = random_of_cells(layout, self.seed).to(device).expand(layout.batch, -1, -1)
        else:
            patches = lowest_of_cells(score)
        count = max(int(self.protect > 0), int(self.protect * layout.num_patches))
        count = min(count, layout.num_patches - num_cells(layout.grid))
        protected = highest(score.flatten(-2).masked_fill(patches, -1.0), count)
        targets = scene_mask(patches, layout, special=True, anchor=True if self.anchor else None)
        return Partition.from_masks(targets, scene_mask(protected, layout, special=False))


def importance(
    images: Tensor | Frames,  # [F, 3, H, W], normalised
    tokens: Tensor,  # [F, h * w, C]
    grid: tuple[int, int],
    projection: Tensor,  # [C, c]
) -> Tensor:  # [F, h, w]
    """Geometric importance of every patch, in [0, 1] within its frame (the paper's Psi_GA)."""
    parts = [
        GRADIENT_SHARE * stretch(gradient(image_chunk.float(), grid))
        + (1 - GRADIENT_SHARE) * stretch(variance(token_chunk.float(), grid, projection))
        for image_chunk, token_chunk in zip(images.split(CHUNK_FRAMES), tokens.split(CHUNK_FRAMES), strict=True)
    ]
    return stretch(torch.cat(parts)) ** GAMMA


@kept
def luma(dtype: torch.dtype, device: torch.device) -> Tensor:  # [3]
    """Weights of red, green and blue in grey; kept, as numbers of the host would make it wait at every call."""
    return torch.tensor(LUMA, dtype=dtype, device=device)


def gradient(
    images: Tensor,  # [F, 3, H, W]
    grid: tuple[int, int],
) -> Tensor:  # [F, h, w]
    """Mean Sobel magnitude of the grey image in each patch, zeros around the image."""
    # As a matrix product: einsum would copy the images to move the channels last.
    grey = (luma(images.dtype, images.device)[None] @ images.flatten(2)).view(-1, *images.shape[-2:])
    grey = F.pad(grey, (1, 1, 1, 1))

    def smooth(y: Tensor, dim: int) -> Tensor:
        inner = y.narrow(dim, 1, y.shape[dim] - 2)
        return (inner + inner).add_(y.narrow(dim, 0, inner.shape[dim])).add_(y.narrow(dim, 2, inner.shape[dim]))

    # Six passes over the image in place: a single-channel convolution took two to seven times as long on a CPU. One
    # direction after the other, so that few temporaries are alive at once.
    across = smooth(grey, 1)
    slope_x = across[..., 2:] - across[..., :-2]
    del across
    down = smooth(grey, 2)
    del grey
    slope_y = down[:, 2:] - down[:, :-2]
    magnitude = slope_x.square_().addcmul_(slope_y, slope_y).add_(1e-12).sqrt_()
    return F.adaptive_avg_pool2d(magnitude, grid)


def variance(
    tokens: Tensor,  # [F, h * w, C]
    grid: tuple[int, int],
    projection: Tensor,  # [C, c]
) -> Tensor:  # [F, h, w]
    """Variance of the projected tokens among 3 x 3 neighbours, summed over channels."""
    x = (tokens @ projection).transpose(1, 2).unflatten(-1, grid)

    def neighbours(y: Tensor) -> Tensor:
        return F.avg_pool2d(y, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)

    return (neighbours(x.square()) - neighbours(x).square()).clamp(min=0).sum(1)


def stretch(
    score: Tensor,  # [F, h, w]
) -> Tensor:  # [F, h, w]
    """Scale each frame's scores to [0, 1]."""
    low, high = score.amin((1, 2), keepdim=True), score.amax((1, 2), keepdim=True)
    return (score - low) / (high - low + 1e-8)


def orthogonal(dim: int, channels: int, seed: int) -> Tensor:  # [dim, min(channels, dim)]
    """Random orthonormal columns; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(dim, min(channels, dim), generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(noise).Q
