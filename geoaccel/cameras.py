"""Pinhole cameras: rigid transforms, projection, unprojection.

Conventions of the whole package: poses are ``cam_from_world`` with OpenCV axes (x right, y down, z forward), and the
centre of the top-left pixel lies at (0.5, 0.5), so an image of width W spans the interval [0, W].
All functions are batched over leading dimensions and differentiable.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_homogeneous(
    transform: Tensor,  # [..., 3, 4] or [..., 4, 4]
) -> Tensor:  # [..., 4, 4]
    """Append the row (0, 0, 0, 1) where it is missing."""
    if transform.shape[-2:] == (4, 4):
        return transform
    if transform.shape[-2:] != (3, 4):
        raise ValueError(f"expected transforms [..., 3, 4] or [..., 4, 4], got {list(transform.shape)}")
    last_row = torch.zeros_like(transform[..., :1, :])
    last_row[..., 3] = 1
    return torch.cat([transform, last_row], dim=-2)


def invert_rigid(
    transform: Tensor,  # [..., 3, 4] or [..., 4, 4], rotation and translation
) -> Tensor:  # [..., 4, 4]
    """Invert a rigid transform in closed form: ``world_from_cam`` from ``cam_from_world`` and back."""
    rotation, translation = transform[..., :3, :3], transform[..., :3, 3:]
    inverse_rotation = rotation.transpose(-1, -2)
    return to_homogeneous(torch.cat([inverse_rotation, -inverse_rotation @ translation], dim=-1))


def transform_points(
    transform: Tensor,  # [..., 3, 4] or [..., 4, 4]
    points: Tensor,  # [..., N, 3]; the leading dimensions are those of `transform`
) -> Tensor:  # [..., N, 3]
    """Apply a rigid or affine transform to points."""
    return points @ transform[..., :3, :3].transpose(-1, -2) + transform[..., None, :3, 3]


def pixel_grid(
    height: int,
    width: int,
    *,
    pixel_center: float = 0.5,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [H, W, 2]
    """Coordinates (u, v) of every pixel's centre."""
    v = torch.arange(height, device=device, dtype=dtype) + pixel_center
    u = torch.arange(width, device=device, dtype=dtype) + pixel_center
    return torch.stack([u.expand(height, width), v[:, None].expand(height, width)], dim=-1)


def unproject_depth(
    depth: Tensor,  # [..., H, W], z-depth
    intrinsics: Tensor,  # [..., 3, 3], pixels
    cam_from_world: Tensor | None = None,  # [..., 3|4, 4]
    *,
    pixel_center: float = 0.5,
) -> Tensor:  # [..., H, W, 3]
    """Lift every pixel to a 3D point: world coordinates with a pose, camera coordinates without.

    Args:
        depth: Distance along the optical axis, in the unit of the pose's translation.
        intrinsics: Focal lengths and principal point; skew is ignored.
        cam_from_world: Pose of each camera.
        pixel_center: Coordinate of the top-left pixel's centre: 0.5 in this package; VGGT's released unprojection
            counts from 0.0 although its principal point is at W/2.
    """
    height, width = depth.shape[-2:]
    pixels = pixel_grid(height, width, pixel_center=pixel_center, device=depth.device, dtype=depth.dtype)
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[..., None, None, :]
    rays = (pixels - intrinsics[..., None, None, :2, 2]) / focal
    points = torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) * depth[..., None]
    if cam_from_world is None:
        return points
    flat = transform_points(invert_rigid(cam_from_world), points.flatten(-3, -2))
    return flat.unflatten(-2, (height, width))


def unproject_frames(
    depth: Tensor,  # [S, H, W], z-depth
    intrinsics: Tensor,  # [S, 3, 3], pixels
    cam_from_world: Tensor,  # [S, 3|4, 4]
) -> Tensor:  # [S, H, W, 3]
    """World points of many frames as of `unproject_depth`, without gradients; frame by frame, as intermediate tensors
    take several times the memory of the points."""
    points = depth.new_empty(*depth.shape, 3)
    with torch.no_grad():
        for i in range(len(depth)):
            one = slice(i, i + 1)
            points[one] = unproject_depth(depth[one], intrinsics[one], cam_from_world[one])
    return points


def scene_size(
    points: Tensor,  # [..., N, 3]
) -> Tensor:  # [...]
    """Twice the RMS distance of points from their centroid; distances are reported relative to it."""
    centred = points - points.mean(dim=-2, keepdim=True)
    return (2 * centred.square().sum(-1).mean(dim=-1).sqrt()).clamp(min=1e-12)


def project_points(
    points_world: Tensor,  # [..., N, 3]
    intrinsics: Tensor,  # [..., 3, 3]
    cam_from_world: Tensor,  # [..., 3|4, 4]
) -> tuple[Tensor, Tensor]:  # [..., N, 2], [..., N]
    """Project points into an image.

    Returns:
        Pixel coordinates, and z-depth. Pixels are meaningful only where the depth is positive.
    """
    points_cam = transform_points(cam_from_world, points_world)
    depth = points_cam[..., 2]
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[..., None, :]
    pixels = points_cam[..., :2] / depth[..., None] * focal + intrinsics[..., None, :2, 2]
    return pixels, depth


def quaternion(
    rotation: np.ndarray | Tensor,  # [3, 3]
) -> np.ndarray:  # [4]
    """Quaternion (w, x, y, z) with w >= 0: the eigenvector of Bar-Itzhack's symmetric matrix, stable for any angle."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = np.asarray(rotation, np.float64)
    symmetric = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, yy - xx - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, zz - xx - yy],
        ]
    )
    quaternion = np.linalg.eigh(symmetric)[1][:, -1]
    return -quaternion if quaternion[0] < 0 else quaternion
