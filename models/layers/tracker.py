"""VGGT's point tracker: CoTracker's iterative refinement (arXiv 2307.07635) on VGGT's features.

A track starts as its query point repeated in every frame. Each iteration compares the track's feature with a window of
the feature maps around its present position, at several scales, and moves it.

Positions (x, y) are measured in cells of the feature maps, cell centres at integers; a query in pixels is divided by
``stride``. That is the released network's convention, half a pixel off the one of :mod:`geoaccel.cameras`.

The refinement is sensitive to rounding: a displacement enters as sines at up to 1000 radians per cell, so with random
weights each iteration amplifies a difference in the last bit about a hundred times. Therefore operations follow the
released network's order: float32 outputs are bit-identical to its own if both run on the same kernels and no map has
more than ``VOLUME_CELLS``; in float64 positions agree to 1e-10. Between CPUs the outputs of either code differ, by up
to 8e-3 with random weights.

Shape letters of this file: N points, T = B * S feature maps, R = B * S * N rows (point and frame), K = 2 * radius + 1
the side of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from geoaccel.errors import UserError
from geoaccel.models.layers.block import Mlp
from geoaccel.models.layers.tracker_former import UpdateFormer
from geoaccel.precision import own_precision

# Elements of products with whole maps, or of gathered window features, at a time: 128 MiB in float32.
CHUNK_ELEMENTS = 2**25
# Maps of at most this many cells are correlated in full. On a CPU, with 128 channels and windows of 9 x 9, that is 14
# times as fast as reading windows at 192 cells, as fast at 5,500, a tenth as fast at 50,000.
VOLUME_CELLS = 4096
STRIDE = 2  # pixels of a cell
VIRTUAL_TRACKS = 64


class Tracker(nn.Module):
    """Follows the query points of frame 0 through all frames.

    Computes in float32 (float64 with float64 weights), also under autocast and with half-precision weights, which are
    upcast during the call: bfloat16 represents a position near cell 500 only to within 2 cells.

    Args:
        features: Channels C of the feature maps and of a track's feature.
        hidden_size: Width of the update transformer.
        corr_levels: Scales of the correlation pyramid; each halves the last.
        corr_radius: Half side of the correlation window, in cells of its scale.
        depth: Layers of the update transformer.
        num_heads: Attention heads A.
        num_virtual_tracks: Virtual tracks of the update transformer.
        iterations: Refinements.
        stride: Pixels per cell of the feature maps.
        max_scale: Displacements, in cells, are divided by this before the network sees them.
    """

    def __init__(
        self,
        *,
        features: int = 128,
        hidden_size: int = 384,
        corr_levels: int = 7,
        corr_radius: int = 4,
        depth: int = 6,
        num_heads: int = 8,
        num_virtual_tracks: int = VIRTUAL_TRACKS,
        iterations: int = 4,
        stride: int = STRIDE,
        max_scale: float = 518.0,
    ) -> None:
        super().__init__()
        if features % 4:
            raise UserError(f"the tracker needs a multiple of 4 feature channels, got {features}")
        self.corr_levels = corr_levels
        self.corr_radius = corr_radius
        self.iterations = iterations
        self.stride = stride
        self.max_scale = max_scale
        token_dim = 3 * features + 4
        self.corr_mlp = Mlp(corr_levels * (2 * corr_radius + 1) ** 2, hidden_size, features)
        self.query_ref_token = nn.Parameter(torch.randn(1, 2, token_dim))  # frame 0, every other frame
        self.updateformer = UpdateFormer(
            token_dim,
            hidden_size,
            features + 2,
            depth=depth,
            num_heads=num_heads,
            num_virtual_tracks=num_virtual_tracks,
        )
        self.fmap_norm = nn.LayerNorm(features)
        self.ffeat_norm = nn.GroupNorm(1, features)  # on rows: a LayerNorm in the released network's arithmetic
        self.ffeat_updater = nn.Sequential(nn.Linear(features, features), nn.GELU())
        self.vis_predictor = nn.Sequential(nn.Linear(features, 1))
        self.conf_predictor = nn.Sequential(nn.Linear(features, 1))

    def forward(
        self,
        query_points: Tensor,  # [B, N, 2], pixels of frame 0
        feature_maps: Tensor,  # [B, S, C, H / stride, W / stride]
        iterations: int | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:  # iterations x [B, S, N, 2], [B, S, N], [B, S, N]
        """Positions in pixels after each iteration, visibility and confidence in (0, 1).

        Frame 0 of every prediction is the query itself. Queries outside the image start from the feature of the nearest
        cell. Gradients reach the feature maps, not the query points, and do not cross iterations through positions.
        """
        narrow = {n: p.float() for n, p in self.named_parameters() if p.dtype in (torch.bfloat16, torch.float16)}
        if narrow:
            return functional_call(self, narrow, (query_points, feature_maps, iterations))
        with own_precision(feature_maps.device):
            return self.track(query_points, feature_maps, self.iterations if iterations is None else iterations)

    def track(self, query_points: Tensor, feature_maps: Tensor, iterations: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """The forward, in the dtype of the parameters."""
        if iterations < 1:
            raise UserError(f"iterations={iterations}: a track needs at least one refinement")
        dtype = self.query_ref_token.dtype
        maps = self.fmap_norm(feature_maps.to(dtype).movedim(2, -1))  # [B, S, H, W, C]
        pyramid = mean_pyramid(maps.flatten(0, 1), self.corr_levels)
        frames, size = maps.shape[1], maps.shape[2:4]
        query = query_points.detach().to(maps) / self.stride

        # A token's input besides its track: where in the image the query is, and whether this is its frame.
        reference, others = self.query_ref_token.split(1, dim=1)
        role = torch.cat([reference, others.expand(-1, frames - 1, -1)], dim=1)  # [1, S, D]
        place = encode_position(query, size, role.shape[-1])[:, :, None]  # [B, N, 1, D]

        coords = query[:, None].expand(-1, frames, -1, -1)
        tracks = sample_features(maps[:, 0], query)[:, None].expand(-1, frames, -1, -1)
        predictions = []
        for _ in range(iterations):
            coords = coords.detach()
            step, tracks = self.refine(pyramid, coords, tracks, place, role)
            coords = torch.cat([query[:, None], coords[:, 1:] + step[:, 1:]], dim=1)
            predictions.append(coords * self.stride)
        visibility = self.vis_predictor(tracks)[..., 0].sigmoid()
        confidence = self.conf_predictor(tracks)[..., 0].sigmoid()
        return predictions, visibility, confidence

    def refine(
        self,
        pyramid: Sequence[Tensor],  # corr_levels x [T, h, w, C]
        coords: Tensor,  # [B, S, N, 2]
        tracks: Tensor,  # [B, S, N, C]
        place: Tensor,  # [B, N, 1, 3 * C + 4]
        role: Tensor,  # [1, S, 3 * C + 4]
    ) -> tuple[Tensor, Tensor]:  # [B, S, N, 2], [B, S, N, C]
        """One iteration: how far each point moves, and its new feature."""
        correlation = self.corr_mlp(correlate(pyramid, tracks, coords, self.corr_radius).transpose(1, 2))
        moved = (coords - coords[:, :1]).transpose(1, 2)  # [B, N, S, 2]
        scaled = moved / self.max_scale
        features = tracks.transpose(1, 2)
        # The scaled displacement really enters twice: the checkpoints were trained so.
        known = [encode_displacement(moved, tracks.shape[-1] // 2), scaled, scaled, correlation, features]
        update = self.updateformer(torch.cat(known, dim=-1) + place + role)
        step, change = update.split([2, tracks.shape[-1]], dim=-1)
        change = self.ffeat_updater(self.ffeat_norm(change.flatten(0, 2))).view_as(change)
        return step.transpose(1, 2), (change + features).transpose(1, 2)


def mean_pyramid(
    maps: Tensor,  # [T, H, W, C]
    levels: int,
) -> list[Tensor]:  # levels x [T, H >> level, W >> level, C]
    """Feature maps at halving resolution."""
    needed = 2 ** (levels - 1)
    if min(maps.shape[1:3]) < needed:
        raise UserError(
            f"feature maps of {maps.shape[1]} x {maps.shape[2]} cells are too small for tracking: {levels} correlation "
            f"levels need {needed} cells a side; use larger images, or a tracker with fewer corr_levels"
        )
    pyramid = [maps]
    for _ in range(levels - 1):
        pyramid.append(F.avg_pool2d(pyramid[-1].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous())
    return pyramid


def correlate(
    pyramid: Sequence[Tensor],  # levels x [T, h, w, C]
    tracks: Tensor,  # [B, S, N, C]
    coords: Tensor,  # [B, S, N, 2], cells of level 0
    radius: int,
) -> Tensor:  # [B, S, N, levels * K * K]
    """Compare each track's feature with the window around its position in its own frame, at every scale.

    On small maps, products with all cells are computed and sampled; on large ones only the cells under a window are
    read. Neither holds more than ``CHUNK_ELEMENTS`` numbers at a time, or those of one point in all frames.
    """
    channels = tracks.shape[-1]
    rows, centers = tracks.flatten(0, 1), coords.flatten(0, 1)
    levels = []
    for level, maps in enumerate(pyramid):
        cells = maps.shape[1] * maps.shape[2]
        read, numbers = (
            (sample_volume, cells) if cells <= VOLUME_CELLS else (read_windows, channels * (2 * radius + 2) ** 2)
        )
        chunk = max(1, CHUNK_ELEMENTS // (len(maps) * numbers))
        pieces = zip(rows.split(chunk, dim=1), (centers / 2**level).split(chunk, dim=1), strict=True)
        levels.append(torch.cat([read(maps, *piece, radius) for piece in pieces], dim=1))
    return torch.cat(levels, dim=-1).unflatten(0, tracks.shape[:2])


def sample_volume(
    maps: Tensor,  # [T, h, w, C]
    rows: Tensor,  # [T, N, C]
    centers: Tensor,  # [T, N, 2], cells of this level
    radius: int,
) -> Tensor:  # [T, N, K * K], x slowest
    """Products of each row with all cells of its map, then bilinear samples at every integer offset from its centre."""
    size = maps.shape[1:3]
    volume = torch.bmm(rows, maps.flatten(1, 2).transpose(1, 2)) / math.sqrt(rows.shape[-1])
    taps = torch.arange(-radius, radius + 1, device=centers.device, dtype=centers.dtype)
    offsets = torch.stack(torch.meshgrid(taps, taps, indexing="ij"), dim=-1)  # [K, K, 2]
    grid = to_grid(centers.flatten(0, 1)[:, None, None] + offsets, size)
    volume = volume.flatten(0, 1).unflatten(-1, size)[:, None]
    return F.grid_sample(volume, grid, padding_mode="zeros", align_corners=True).reshape(*rows.shape[:2], -1)


def read_windows(maps: Tensor, rows: Tensor, centers: Tensor, radius: int) -> Tensor:
    """The samples of :func:`sample_volume`, with its shapes, from only the cells under each window.

    Interpolating dot products is the same as interpolating features, and all offsets share one fraction, so (K + 1)^2
    cells are enough for K * K bilinear samples.
    """
    height, width = maps.shape[1:3]
    x, inside_x, fraction_x = window_taps(centers[..., 0].flatten(), width, radius)
    y, inside_y, fraction_y = window_taps(centers[..., 1].flatten(), height, radius)
    frame = torch.arange(len(maps), device=maps.device).repeat_interleave(rows.shape[1])
    cells = (frame[:, None, None] * height + y[:, None, :]) * width + x[:, :, None]  # [R, K + 1, K + 1]
    window = maps.flatten(0, 2).index_select(0, cells.flatten()).unflatten(0, (len(frame), -1))
    scaled = rows.flatten(0, 1) / math.sqrt(rows.shape[-1])
    dots = torch.bmm(window, scaled[:, :, None]).reshape(cells.shape)
    dots = dots * (inside_x[:, :, None] & inside_y[:, None, :])
    dots = torch.lerp(dots[:, :-1], dots[:, 1:], fraction_x[:, None, None])
    dots = torch.lerp(dots[:, :, :-1], dots[:, :, 1:], fraction_y[:, None, None])
    return dots.reshape(*rows.shape[:2], -1)


def window_taps(
    center: Tensor,  # [R]
    size: int,
    radius: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [R, K + 1], [R, K + 1], [R]
    """Along one axis: indices of the cells under the window, which of them exist, and the common fraction."""
    taps = torch.arange(-radius, radius + 2, device=center.device)
    if size == 1:
        # With aligned corners a single cell has no extent; the released network reads it at every offset.
        index = torch.zeros(len(center), len(taps), dtype=torch.long, device=center.device)
        return index, torch.ones_like(index, dtype=torch.bool), torch.zeros_like(center)
    base = center.floor()
    index = base[:, None] + taps
    inside = (index >= 0) & (index < size)
    # Clamped before and after the conversion: a diverged track must not become an invalid index.
    return index.clamp(0, size - 1).long().clamp(0, size - 1), inside, center - base


def to_grid(
    points: Tensor,  # [..., 2], cells
    size: Sequence[int],  # (H, W), cells
) -> Tensor:  # [..., 2]
    """Coordinates for ``grid_sample`` with aligned corners."""
    return points * points.new_tensor([2 / max(size[1] - 1, 1), 2 / max(size[0] - 1, 1)]) - 1


def sample_features(
    maps: Tensor,  # [B, H, W, C]
    points: Tensor,  # [B, N, 2], cells
) -> Tensor:  # [B, N, C]
    """Bilinear features at the points, with border padding."""
    grid = to_grid(points, maps.shape[1:3])[:, :, None]
    sampled = F.grid_sample(maps.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=True)
    return sampled[..., 0].transpose(1, 2)


def encode_displacement(
    moved: Tensor,  # [..., 2]
    channels: int,
) -> Tensor:  # [..., 2 * channels]
    """Interleaved sines and cosines of x, then of y, at frequencies 0, 2, 4, ... times 1000 / channels."""
    omega = torch.arange(0, channels, 2, device=moved.device, dtype=moved.dtype) * (1000.0 / channels)
    angle = moved[..., None] * omega
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def encode_position(
    points: Tensor,  # [B, N, 2], cells
    size: Sequence[int],  # (H, W), cells
    channels: int,
) -> Tensor:  # [B, N, channels]
    """Sines and cosines of x, then of y, at frequencies 10000^(-i / (channels / 4)).

    Between two cells the codes are interpolated linearly, outside the map they are those of the border. Each half of
    the channels depends on one coordinate alone, so its map is stored along that axis only.
    """
    quarter = channels // 4
    omega = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    halves = []
    for same_along, extent in ((0, size[1]), (1, size[0])):
        # In float64 on the host, as not every device supports it; a few hundred rows.
        angle = torch.arange(extent, dtype=torch.float64, device="cpu")[:, None] * omega
        codes = torch.cat([angle.sin(), angle.cos()], dim=-1).to(points)
        halves.append(sample_features(codes.unsqueeze(same_along).expand(len(points), *size, -1), points))
    return torch.cat(halves, dim=-1)
