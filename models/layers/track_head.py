"""VGGT's track head: dense features from aggregator layers, then the point tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.models.layers.dpt_head import dpt_numbers
from geoaccel.models.layers.outputs import HEAD_FRAMES, HeadBytes
from geoaccel.models.layers.tracker import STRIDE, VIRTUAL_TRACKS, Tracker

QUERIES = 512
"""Query points assumed in memory estimates: as many as `geoaccel.tracks` follows."""


class TrackHead(nn.Module):
    """Tracks query points of frame 0 through all frames.

    Args:
        feature_extractor: Called with (layers, images, patch_start_idx, frames at a time); returns feature maps
            [B, S, features, H / stride, W / stride].
        tracker: Works on those maps.
    """

    def __init__(self, feature_extractor: nn.Module, tracker: Tracker) -> None:
        super().__init__()
        self.feature_extractor = feature_extractor
        self.tracker = tracker

    def forward(
        self,
        layers: Mapping[int, Tensor] | Sequence[Tensor | None],  # what the feature extractor reads
        images: Tensor,  # [B, S, 3, H, W]
        patch_start_idx: int,
        query_points: Tensor,  # [B, N, 2], or [N, 2] where B is 1; pixels of frame 0
        frames_chunk_size: int = HEAD_FRAMES,
        iters: int | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:  # iters x [B, S, N, 2], [B, S, N], [B, S, N]
        """Positions in pixels after each iteration, visibility and confidence in (0, 1)."""
        query_points = batched_queries(query_points, images.shape[0])
        maps = self.feature_extractor(layers, images, patch_start_idx, frames_chunk_size)
        return self.tracker(query_points, maps, iters)


def batched_queries(
    query_points: Tensor,  # [B, N, 2] or [N, 2]
    batch: int,
) -> Tensor:  # [B, N, 2]
    """Check the shape of the query points, and add a batch dimension if the batch is a single scene."""
    given = list(query_points.shape)
    if query_points.ndim == 2 and batch == 1:
        query_points = query_points[None]
    if query_points.ndim != 3 or query_points.shape[0] != batch or query_points.shape[2] != 2:
        alternative = " or [N, 2]" if batch == 1 else ""
        raise UserError(
            f"query_points have shape {given}; expected [{batch}, N, 2]{alternative}: "
            "pixel coordinates (x, y) in frame 0 for each of the scenes in the batch"
        )
    if query_points.shape[1] == 0:
        raise UserError(f"query_points have shape {given}: they are empty; give at least one point")
    return query_points


def track_bytes(
    size: tuple[int, int],
    sizes: Any,
    tokens: int,
) -> HeadBytes:
    """Memory for tracking `QUERIES` points in float32, in frames of H x W.

    First the maps of all frames exist together with their norm and its copy; then with their norm, its pyramid, which
    is a third of it, and the tokens of one iteration: the update transformer holds some sixteen times its width for
    each point, including virtual ones.

    Args:
        size: (H, W).
        sizes: A configuration: ``patch_size``, ``track_features``, ``track_hidden_size``, ``track_dpt_out_channels``.
        tokens: Numbers that the feature extractor reads per patch.
    """
    features, channels = sizes.track_features, sizes.track_dpt_out_channels
    work = dpt_numbers(size, sizes.patch_size, features, channels, tokens, predicts=False)
    maps = 4 * features * (size[0] // STRIDE) * (size[1] // STRIDE)
    iteration = 4 * 16 * sizes.track_hidden_size * (QUERIES + VIRTUAL_TRACKS)
    return HeadBytes(4 * work, 0, 2 * maps, read_at_once=max(3 * maps, 7 / 3 * maps + iteration), stays=maps)
