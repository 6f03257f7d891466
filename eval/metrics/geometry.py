"""Geometry of evaluation: rotation angles, relative poses, alignment by scale, or scale and shift.

Alignment by similarity is in `geoaccel.alignment`.

Everything runs in float64 on the CPU, because errors of 1e-4 degrees must remain visible next to translations of
hundreds of metres. Functions take tensors, arrays or nested lists. Poses are ``cam_from_world`` as in
`geoaccel.cameras`, which also has projection and unprojection.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from geoaccel.alignment import as_float64, is_spread
from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.errors import UserError

# Rotations predicted in bfloat16 are orthonormal to about two percent; matrices with a scale in them are not.
ORTHONORMAL_TOLERANCE = 0.05


def as_poses(
    cam_from_world: Tensor,  # [..., S, 3|4, 4]
    name: str = "poses",
) -> Tensor:  # [..., S, 4, 4], float64
    """Check rigid poses and convert them to float64.

    Raises:
        ValueError: On a wrong shape, non-finite entries, or a 3x3 block that is not a rotation.
    """
    poses = to_homogeneous(as_float64(cam_from_world))
    if poses.ndim < 3:
        raise ValueError(f"{name} must be [S, 4, 4] or [S, 3, 4], got {list(poses.shape)}")
    finite = poses.isfinite().flatten(-2).all(dim=-1)
    if not finite.all():
        bad = (~finite).nonzero()[:, -1].unique().tolist()
        raise UserError(f"{name} has NaN or infinite entries in frames {bad}: leave these frames out on both sides")
    rotation = poses[..., :3, :3]
    deviation = (rotation.transpose(-1, -2) @ rotation - torch.eye(3, dtype=torch.float64)).abs().amax(dim=(-1, -2))
    if (deviation > ORTHONORMAL_TOLERANCE).any() or (
        torch.linalg.vecdot(torch.linalg.cross(rotation[..., 0], rotation[..., 1]), rotation[..., 2]) < 0
    ).any():
        raise UserError(
            f"{name} are not rigid: some 3x3 block is no rotation (R^T R - 1 up to {float(deviation.max()):.3g}). "
            "Expected cam_from_world with scale 1 and no mirroring"
        )
    return poses


def rotation_angle_deg(
    a: Tensor,  # [..., 3, 3]
    b: Tensor,  # [..., 3, 3]
) -> Tensor:  # [...], 0 to 180
    """Angle of the rotation that takes ``a`` to ``b``.

    The angle is computed from both its sine and its cosine, so it is accurate from 1e-14 degrees to 180, and two
    identical matrices give exactly 0 (``acos`` of a trace fails near 1e-6 degrees).
    """
    a, b = as_float64(a), as_float64(b)

    def entry(i: int, j: int) -> Tensor:  # of a^T b; summed in one fixed order, so that a = b is exactly symmetric
        return a[..., 0, i] * b[..., 0, j] + a[..., 1, i] * b[..., 1, j] + a[..., 2, i] * b[..., 2, j]

    axis = torch.stack([entry(2, 1) - entry(1, 2), entry(0, 2) - entry(2, 0), entry(1, 0) - entry(0, 1)], dim=-1)
    trace = entry(0, 0) + entry(1, 1) + entry(2, 2)
    return torch.rad2deg(torch.atan2(axis.norm(dim=-1), trace - 1))


def direction_angle_deg(
    a: Tensor,  # [..., 3]
    b: Tensor,  # [..., 3]
) -> Tensor:  # [...], 0 to 180
    """Angle between two vectors of any length; 0 if one of them is zero."""
    a, b = as_float64(a), as_float64(b)
    # Products are rounded before they are subtracted (torch.cross may fuse them), so that a = b is exactly 0.
    (ax, ay, az), (bx, by, bz) = a.unbind(-1), b.unbind(-1)
    cross = torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=-1)
    return torch.rad2deg(torch.atan2(cross.norm(dim=-1), (a * b).sum(dim=-1)))


def pair_indices(num_frames: int) -> tuple[Tensor, Tensor]:  # [P], [P] with P = S (S - 1) / 2
    """All pairs i < j, ordered by i, then j."""
    i, j = torch.triu_indices(num_frames, num_frames, offset=1)
    return i, j


def relative_poses(
    cam_from_world: Tensor,  # [..., S, 3|4, 4]
    *,
    direction: Literal["i_from_j", "j_from_i"] = "i_from_j",
) -> Tensor:  # [..., P, 4, 4]
    """Relative pose of every pair i < j.

    Args:
        cam_from_world: Poses of the frames.
        direction: ``i_from_j`` is T_i T_j^-1, as VGGT evaluates; ``j_from_i`` is T_j T_i^-1, as pi3 does.
    """
    poses = as_poses(cam_from_world)
    i, j = pair_indices(poses.shape[-3])
    if direction == "j_from_i":
        i, j = j, i
    elif direction != "i_from_j":
        raise UserError(f"direction={direction!r} is unknown. Known: i_from_j, j_from_i")
    return poses[..., i, :, :] @ invert_rigid(poses)[..., j, :, :]


def camera_centers(
    cam_from_world: Tensor,  # [..., S, 3|4, 4]
) -> Tensor:  # [..., S, 3], world coordinates
    """Positions of the cameras."""
    return invert_rigid(as_poses(cam_from_world))[..., :3, 3]


def median(
    values: Tensor,  # [..., N]
) -> Tensor:  # [...]
    """Median; for even N the mean of the two middle values (`torch.median` takes the lower one)."""
    count = values.shape[-1]
    if count == 0:
        raise UserError("the median of no values is undefined")
    low = values.kthvalue((count + 1) // 2, dim=-1).values
    return low if count % 2 else (low + values.kthvalue(count // 2 + 1, dim=-1).values) / 2


def fit_scale(
    source: Tensor,  # [..., N]
    target: Tensor,  # [..., N]
    *,
    method: Literal["median", "least_squares"] = "median",
) -> Tensor:  # [...]
    """Scale that takes ``source`` to ``target``.

    Args:
        source: Values to be scaled, such as depths.
        target: Target values.
        method: ``median`` is median(target) / median(source); ``least_squares`` minimises the squared error.
    """
    source, target = _checked_pair(source, target)
    if method == "median":
        numerator, denominator = median(target), median(source)
    elif method == "least_squares":
        numerator, denominator = (source * target).sum(dim=-1), (source**2).sum(dim=-1)
    else:
        raise UserError(f"method={method!r} is unknown. Known: median, least_squares")
    if (denominator == 0).any():
        raise UserError(f"no scale can be fitted ({method}): the values to be scaled are zero")
    return numerator / denominator


def fit_scale_shift(
    source: Tensor,  # [..., N]
    target: Tensor,  # [..., N]
) -> tuple[Tensor, Tensor]:  # [...], [...]
    """Least-squares scale and shift: ``scale * source + shift`` is closest to ``target``.

    With a constant source the scale is undetermined and set to 1.
    """
    source, target = _checked_pair(source, target)
    source_mean, target_mean = source.mean(dim=-1), target.mean(dim=-1)
    centered = source - source_mean[..., None]
    variance = (centered**2).mean(dim=-1)
    covariance = (centered * (target - target_mean[..., None])).mean(dim=-1)
    scale = torch.where(is_spread(variance, source.abs().amax(dim=-1)), covariance / variance, 1.0)
    return scale, target_mean - scale * source_mean


def _checked_pair(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    source, target = as_float64(source), as_float64(target)
    if source.shape != target.shape or source.ndim == 0:
        raise ValueError(f"values to align differ in shape: {list(source.shape)} and {list(target.shape)}")
    if source.shape[-1] == 0:
        raise UserError("no values to align: no pixel is valid")
    if not (source.isfinite().all() and target.isfinite().all()):
        raise UserError("values to align contain NaN or infinite values: mask them out")
    return source, target
