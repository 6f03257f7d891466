"""Geometry features for each visual token of a host, from a backbone of this package.

The geometry encoder is the larger half of the prefill of a 3D multimodal LLM. Ours may run with merged tokens and
quantized weights; the shapes that a host gets stay the same.

    model = geoaccel.accelerate(geoaccel.load_model("facebook/VGGT-1B"), merging="httm", quantization="fp8")
    tokens = geometry_features(model, images, grid=(14, 18), points=True)
    plan = plan_merge(probe.scores, sem, tokens.features, config, frame_of=tokens.frame_of, xyz=tokens.xyz)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import AttentionContext, Mixer, Restore
from geoaccel.backbone import BACKBONES, Backbone
from geoaccel.errors import UserError
from geoaccel.memory import planned
from geoaccel.mllm.saliency import QueriesKeys, received_attention

Pool = Literal["mean", "stack"]

SAMPLES = 8
"""Sample points along each side of a cell."""


@dataclass(frozen=True, eq=False)
class GeometryTokens:
    """One row for each visual token, in the order of a host: scene by scene, frame by frame, cells row by row.

    Attributes:
        features: [n, C].
        frame_of: [n], frame index within the scene (of the group of frames, if several share a token).
        grid: (h, w) cells of a frame.
        cu_seqlens: [B + 1], int32, start of each scene.
        xyz: [n, 3], world coordinates in the backbone's unit: the point of the cell's median depth.
        scores: [n], float32, attention that the tokens of a cell receive in the global attention of their layer.
    """

    features: Tensor
    frame_of: Tensor
    grid: tuple[int, int]
    cu_seqlens: Tensor
    xyz: Tensor | None = None
    scores: Tensor | None = None


@torch.no_grad()
def geometry_features(
    model: nn.Module,
    images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
    *,
    grid: tuple[int, int] | None = None,
    layer: int | None = None,
    pool: Pool = "mean",
    frames_per_token: int = 1,
    points: bool = False,
    saliency: bool = False,
) -> GeometryTokens:
    """Features of a backbone's trunk, one row per visual token, in one forward.

    If the host's grid is that of the backbone's 2 x 2 cells, these are used, and an odd last row or column of patches
    is left out, as in hosts with patches of 14 pixels. Any other grid covers the whole image.

    Args:
        model: A backbone of this package, accelerated or not.
        images: Preprocessed for the backbone; the host sees the same ones.
        grid: (h, w), visual tokens of a frame; None: the 2 x 2 cells.
        layer: Layer of the trunk, counted from 0 or from the end; None: the default of hosts (``Backbone.features``).
        pool: ``mean`` over the patches of a cell, or ``stack`` for a host with its own merger: the four patches
            concatenated, row by row within the cell.
        frames_per_token: Consecutive frames that share a token, as in Qwen's videos; features are their mean, with the
            last frame repeated if one is missing. Points and frame indices are those of the first.
        points: Also return world coordinates.
        saliency: Also return the attention received.

    Raises:
        ValueError: If the model is not a backbone of this package, or a grid or layer does not fit it.
    """
    if pool not in get_args(Pool):
        raise UserError(f"pool={pool!r}; known: {', '.join(get_args(Pool))}")
    if not isinstance(images, Tensor):
        raise UserError(
            f"images is a {type(images).__name__}; give a tensor, as geoaccel.images.load_images(..).images"
        )
    if images.ndim == 4:
        images = images[None]
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"geometry features come from one of {', '.join(sorted(BACKBONES))}, not from a {type(model).__name__}; "
            "load one with geoaccel.load_model, or wrap yours with geoaccel.adopt"
        )
    size = (images.shape[-2], images.shape[-1])
    patch: int = model.preprocess.patch_size  # type: ignore[union-attr, assignment]
    patches = (size[0] // patch, size[1] // patch)
    cells = _Cells.of(patches, grid)
    if pool == "stack" and (not cells.aligned or frames_per_token != 1):
        raise UserError(
            f"pool='stack' needs cells of 2 x 2 patches and one frame per token, got grid={cells.grid} over {patches} "
            f"patches and frames_per_token={frames_per_token}; use pool='mean'"
        )
    index = backbone.features.layer(model, layer)
    with ExitStack() as stack:
        stack.enter_context(planned(model, None))  # features of all tokens are read at once
        listener = stack.enter_context(_listening(backbone.sites(model)["global"][index])) if saliency else None
        features, predictions = backbone.features.read(model, images, index, points)
    per_frame = features[:, :, -patches[0] * patches[1] :]
    rows = cells.stacked(per_frame) if pool == "stack" else cells.mean(per_frame)
    scores = xyz = None
    if listener is not None:
        received = listener.scores(images.shape[:2])[:, :, -patches[0] * patches[1] :]
        scores = _shared(cells.mean(received[..., None]), frames_per_token).flatten()
    if points:
        geometry = backbone.geometry(predictions, size)
        xyz = cells.points(geometry.points_world, geometry.depth, patch)[:, ::frames_per_token].flatten(0, 2)
    rows = _shared(rows, frames_per_token)
    scenes, frames, count, _ = rows.shape
    device = rows.device
    frame_of = torch.arange(frames, device=device).repeat_interleave(count).repeat(scenes)
    edges = torch.arange(scenes + 1, dtype=torch.int32, device=device) * frames * count
    return GeometryTokens(rows.flatten(0, 2), frame_of, cells.grid, edges, xyz, scores)


def _shared(
    rows: Tensor,  # [B, S, cells, C]
    frames: int,
) -> Tensor:  # [B, ceil(S / frames), cells, C]
    """The mean over every few frames."""
    missing = -rows.shape[1] % frames
    rows = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return rows.unflatten(1, (-1, frames)).mean(dim=2)


@dataclass(frozen=True)
class _Cells:
    """Visual tokens of a frame on the backbone's patches.

    Attributes:
        patches: (h, w) patches.
        grid: (h, w) cells.
    """

    patches: tuple[int, int]
    grid: tuple[int, int]

    @classmethod
    def of(cls, patches: tuple[int, int], grid: tuple[int, int] | None) -> _Cells:
        natural = (patches[0] // 2, patches[1] // 2)
        grid = natural if grid is None else grid
        if min(grid) < 1 or grid[0] > patches[0] or grid[1] > patches[1]:
            raise UserError(f"grid={grid} does not fit {patches} patches; the 2 x 2 cells are {natural}")
        return cls(patches, grid)

    @property
    def aligned(self) -> bool:
        return self.grid == (self.patches[0] // 2, self.patches[1] // 2)

    def mean(
        self,
        x: Tensor,  # [B, S, h * w patches, C]
    ) -> Tensor:  # [B, S, h * w cells, C]
        if self.aligned:
            return self._split(x).float().mean(dim=(3, 5)).flatten(2, 3).to(x.dtype)
        planes = x.flatten(0, 1).transpose(1, 2).unflatten(-1, self.patches)
        return F.adaptive_avg_pool2d(planes.float(), self.grid).to(x.dtype).flatten(2).mT.unflatten(0, x.shape[:2])

    def stacked(
        self,
        x: Tensor,  # [B, S, h * w patches, C]
    ) -> Tensor:  # [B, S, h * w cells, 4 * C]
        return self._split(x).transpose(3, 4).flatten(4).flatten(2, 3)

    def points(
        self,
        points: Tensor,  # [B, S, H, W, 3]
        depth: Tensor,  # [B, S, H, W]
        patch: int,
    ) -> Tensor:  # [B, S, h * w cells, 3]
        """The sampled point of median depth in each cell, which lies on a surface, unlike a mean."""
        places = []
        for axis in (0, 1):
            extent = 2 * self.grid[axis] * patch if self.aligned else depth.shape[2 + axis]
            count = self.grid[axis] * SAMPLES
            places.append(((torch.arange(count, device=depth.device) + 0.5) * extent / count).long())

        def sampled(x: Tensor) -> Tensor:  # [B, S, cells, samples, C]
            x = x[:, :, places[0]][:, :, :, places[1]]
            x = x.unflatten(3, (self.grid[1], SAMPLES)).unflatten(2, (self.grid[0], SAMPLES))
            return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

        at = sampled(depth[..., None]).squeeze(-1).argsort(dim=-1, stable=True)[..., (SAMPLES**2 - 1) // 2]
        return sampled(points).gather(3, at[..., None, None].expand(-1, -1, -1, 1, 3)).squeeze(3)

    def _split(self, x: Tensor) -> Tensor:  # [B, S, h, 2, w, 2, C]
        height, width = self.grid
        x = x.unflatten(2, self.patches)[:, :, : 2 * height, : 2 * width]
        return x.unflatten(3, (width, 2)).unflatten(2, (height, 2))


class _Listener(Mixer):
    """A mixer that records how much attention each token receives; another mixer does the work."""

    def __init__(self, mixer: Mixer) -> None:
        self.mixer = mixer
        self.received: Tensor | None = None

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        self.mixer.prepare(heads, head_dim, device, context)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        packing, scale = context.packing, q.shape[-1] ** -0.5
        weight = None if packing is None else packing.weight
        pair = QueriesKeys(q, k, scale, context.lengths, context.log_weight, weight)
        received = received_attention(pair)
        # The attention that a packed row receives belongs to all tokens that it represents.
        self.received = received if packing is None else (received[0] / packing.weight)[packing.owner]
        return self.mixer(q, k, v, x, context)

    def scores(self, scenes: torch.Size) -> Tensor:  # [B, S, P]
        assert self.received is not None
        return self.received.view(*scenes, -1)


@contextmanager
def _listening(site: Any) -> Iterator[_Listener]:
    listener = _Listener(site.mixer)
    site.mixer = listener
    try:
        yield listener
    finally:
        site.mixer = listener.mixer
