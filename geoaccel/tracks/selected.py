"""What a user's masks keep of features and tracks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from geoaccel.scene import Scene
from geoaccel.tracks.features import Features
from geoaccel.tracks.table import Tracks


def selected_tracks(scene: Scene, tracks: Tracks) -> Tracks:
    """Tracks without the observations that masks leave out."""
    if scene.selected is None:
        return tracks
    return tracks.keep(scene.selected[network_pixels(scene, tracks.frame, tracks.pixels)].numpy())[0]


def selected_features(scene: Scene, features: Sequence[Features]) -> Sequence[Features]:
    """Features of each image without those that masks leave out; the pictures stay whole."""
    if scene.selected is None:
        return features
    kept = []
    for i, found in enumerate(features):
        inside = scene.selected[network_pixels(scene, np.full(len(found.pixels), i), found.pixels)].numpy()
        kept.append(replace(found, pixels=found.pixels[inside], descriptors=found.descriptors[inside]))
    return kept


def network_pixels(
    scene: Scene,
    frame: np.ndarray,  # [M]
    pixels: np.ndarray,  # [M, 2], original images
) -> tuple[Tensor, Tensor, Tensor]:  # [M] each
    """Frame, row and column of the pixel of the network input that shows each place, or is nearest to it."""
    height, width = scene.depth.shape[1:]
    scale, offset = (np.array([getattr(t, name) for t in scene.transforms])[frame] for name in ("scale", "offset"))
    at = torch.from_numpy(pixels * scale + offset).long()
    return torch.from_numpy(frame), at[:, 1].clamp(0, height - 1), at[:, 0].clamp(0, width - 1)
