"""Distance of a quantized network's outputs from the dense network's, in the terms of the task; without labels.

The loss of QVGGT's scale search (Pan et al., CVPR 2026, arXiv 2605.31124): cameras, depth, points, and whether depth
and points agree.
Differs from the paper in: targets are the dense model's own outputs, not ground truth; everything is in units of the
dense scene's size and in the frame of its first camera, to suit all backbones; rotation matrices are compared, not
quaternions; distances are not squared, unlike in a Huber loss at small distances, where a camera error of a hundredth
would be negligible next to the pixels; depth and points should agree as well as the dense ones do, no better; pixels
are weighted by the dense model's confidence, as a search could lower the loss through its own; no term for gradients or
confidences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, scene_size, transform_points, unproject_depth
from geoaccel.errors import UserError


@dataclass(frozen=True)
class TaskWeights:
    """Weights of the terms. The paper gives depth and points 1 in its text and 0.1 in its supplement."""

    camera: float = 1.0
    depth: float = 0.1
    point: float = 0.1
    consistency: float = 1.0

    def total(self, terms: Mapping[str, float]) -> float:
        """The weighted sum of :func:`task_terms`."""
        return sum(getattr(self, name) * value for name, value in terms.items())


@torch.no_grad()
def task_terms(quantized: Geometry, dense: Geometry) -> dict[str, float]:
    """The four terms.

    Returns:
        ``camera``: mean over the frames of the Frobenius distance of rotations, the distance of positions over scene
        size, and the difference of the logarithms of focal lengths. The others are means over the pixels, over scene
        size and weighted by the dense confidence over its mean: ``depth`` and ``point`` of the error, ``consistency``
        of the change of the vector from unprojected depth to points.

    Raises:
        ValueError: If the quantized model's outputs are not finite.
    """
    for name, tensor in vars(quantized).items():
        if not tensor.isfinite().all():
            raise UserError(f"the quantized model outputs NaN or infinite numbers in {name}; quantize fewer layers")
    points, cameras = _in_first_camera(dense)
    found, found_cameras = _in_first_camera(quantized)
    size = scene_size(points.flatten(1, 3))
    weight = dense.conf / dense.conf.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    off = found_cameras - cameras
    camera = (
        torch.linalg.matrix_norm(off[..., :3, :3]).mean()
        + (off[..., :3, 3].norm(dim=-1) / size[:, None]).mean()
        + (_log_focal(quantized) - _log_focal(dense)).abs().mean()
    )
    per_pixel = weight / size[:, None, None, None]
    apart = (_disagreement(quantized) - _disagreement(dense)).norm(dim=-1)
    return {
        "camera": float(camera),
        "depth": float(((quantized.depth - dense.depth).abs() * per_pixel).mean()),
        "point": float(((found - points).norm(dim=-1) * per_pixel).mean()),
        "consistency": float((apart * per_pixel).mean()),
    }


def _in_first_camera(geometry: Geometry) -> tuple[Tensor, Tensor]:  # [B, S, H, W, 3], [B, S, 4, 4]
    """Points and cameras; pi3 chooses a new world frame in every forward."""
    first = geometry.cam_from_world[:, 0]
    points = transform_points(first, geometry.points_world.flatten(1, 3)).view_as(geometry.points_world)
    return points, geometry.cam_from_world @ invert_rigid(first)[:, None]


def _log_focal(geometry: Geometry) -> Tensor:  # [B, S, 2]
    return geometry.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2].clamp(min=1e-6).log()


def _disagreement(geometry: Geometry) -> Tensor:  # [B, S, H, W, 3]
    """From unprojected depth to the points, in the camera's own axes."""
    unprojected = unproject_depth(geometry.depth, geometry.intrinsics, geometry.cam_from_world)
    apart = geometry.points_world - unprojected
    return torch.einsum("bsij,bshwj->bshwi", geometry.cam_from_world[..., :3, :3], apart)
