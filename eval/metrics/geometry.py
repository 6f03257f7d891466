"""Geometry of evaluation: rotation angles, relative poses, alignment by similarity, scale, or scale and shift.

Everything runs in float64 on the CPU, because errors of 1e-4 degrees have to stay visible next to translations of
hundreds of metres. Functions take tensors, arrays or nested lists. Poses are ``cam_from_world`` as in
`geoaccel.cameras`, which also holds projection and unprojection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.errors import UserError

# Rotations predicted in bfloat16 are orthonormal to about two percent; matrices with a scale in them are not.
ORTHONORMAL_TOLERANCE = 0.05
# Differences that float64 makes by itself when a mean is taken off equal values, relative to the largest of them.
SAME = 1e-12


def as_float64(
    values: Tensor,  # or anything torch.as_tensor takes
) -> Tensor:
    """Copy to a float64 tensor on the CPU, without gradient."""
    return torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64)


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

    The angle comes from its sine and its cosine together, so it is accurate from 1e-14 degrees to 180, and
    two identical matrices give exactly 0 (``acos`` of a trace gives up near 1e-6 degrees).
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
    """Angle between two vectors of any length; 0 where one of them is zero."""
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


@dataclass(frozen=True)
class Similarity:
    """The map ``x -> scale * rotation @ x + translation``, possibly batched."""

    scale: Tensor  # [...]
    rotation: Tensor  # [..., 3, 3]
    translation: Tensor  # [..., 3]

    def matrix(self) -> Tensor:  # [..., 4, 4]
        """As a homogeneous matrix."""
        linear = self.scale[..., None, None] * self.rotation
        return to_homogeneous(torch.cat([linear, self.translation[..., None]], dim=-1))

    def apply_points(
        self,
        points: Tensor,  # [..., N, 3]
    ) -> Tensor:  # [..., N, 3]
        """Map points."""
        rotated = as_float64(points) @ self.rotation.transpose(-1, -2)
        return self.scale[..., None, None] * rotated + self.translation[..., None, :]

    def apply_poses(
        self,
        cam_from_world: Tensor,  # [..., S, 3|4, 4]
    ) -> Tensor:  # [..., S, 4, 4]
        """Move cameras with the world: poses of the same cameras in the mapped world.

        Camera coordinates grow by ``scale``, so images stay as they are and depth is to be multiplied by ``scale``.
        """
        poses = to_homogeneous(as_float64(cam_from_world))
        rotation = poses[..., :3, :3] @ self.rotation[..., None, :, :].transpose(-1, -2)
        moved = (rotation @ self.translation[..., None, :, None])[..., 0]
        translation = self.scale[..., None, None] * poses[..., :3, 3] - moved
        return to_homogeneous(torch.cat([rotation, translation[..., None]], dim=-1))


def umeyama(
    source: Tensor,  # [..., N, 3]
    target: Tensor,  # [..., N, 3], target n corresponds to source n
    *,
    with_scale: bool = True,
    weights: Tensor | None = None,  # [..., N], not negative; zero leaves a point out
) -> Similarity:
    """Least-squares similarity (or rigid) transform from corresponding points (Umeyama 1991).

    Where the points leave something open, nothing is raised: collinear points determine the rotation only up to a
    turn about their line, and coinciding source points leave rotation and scale open (no turn and scale 1 are
    returned). The residual is minimal all the same.

    Args:
        source: Points to be moved.
        target: Where they should land.
        with_scale: False gives a rigid transform, scale 1.
        weights: Weight of each correspondence; uniform by default. Points of weight zero may be NaN.
    """
    source, target = as_float64(source), as_float64(target)
    if source.shape != target.shape or source.shape[-1] != 3 or source.ndim < 2:
        raise ValueError(f"corresponding points [..., N, 3] expected, got {list(source.shape)}, {list(target.shape)}")
    if weights is None:
        weights = source.new_ones(source.shape[:-1])
    weights = as_float64(weights)
    if (weights < 0).any() or (weights.sum(dim=-1) == 0).any():
        raise UserError("no correspondences to align: weights must be non-negative with a positive sum")
    used = (weights > 0)[..., None]
    source, target = source.where(used, 0.0), target.where(used, 0.0)
    if not (source.isfinite().all() and target.isfinite().all()):
        raise UserError("points to align contain NaN or infinite values: mask them out with weights")

    weights = (weights / weights.sum(dim=-1, keepdim=True))[..., None]
    source_mean, target_mean = (weights * source).sum(dim=-2), (weights * target).sum(dim=-2)
    largest = source.abs().amax(dim=(-1, -2))
    source, target = source - source_mean[..., None, :], target - target_mean[..., None, :]
    variance = (weights * source**2).sum(dim=(-1, -2))
    spread = _is_spread(variance, largest)
    source = source.where(spread[..., None, None], 0.0)
    u, singular, vh = torch.linalg.svd((weights * target).transpose(-1, -2) @ source)
    signs = torch.ones_like(singular)
    signs[..., 2] = torch.where(torch.linalg.det(u @ vh) < 0, -1.0, 1.0)
    rotation = u @ (signs[..., None] * vh)
    scale = torch.ones_like(source_mean[..., 0])
    if with_scale:
        scale = torch.where(spread, (singular * signs).sum(dim=-1) / variance, scale)
    translation = target_mean - scale[..., None] * (rotation @ source_mean[..., None])[..., 0]
    return Similarity(scale, rotation, translation)


def median(
    values: Tensor,  # [..., N]
) -> Tensor:  # [...]
    """Median with the mean of the two middle values where N is even (`torch.median` takes the lower one)."""
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
        source: Values to be scaled, depths for example.
        target: What they should be.
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
    """Least-squares scale and shift: ``scale * source + shift`` comes closest to ``target``.

    A constant source leaves the scale open; it is then 1.
    """
    source, target = _checked_pair(source, target)
    source_mean, target_mean = source.mean(dim=-1), target.mean(dim=-1)
    centered = source - source_mean[..., None]
    variance = (centered**2).mean(dim=-1)
    covariance = (centered * (target - target_mean[..., None])).mean(dim=-1)
    scale = torch.where(_is_spread(variance, source.abs().amax(dim=-1)), covariance / variance, 1.0)
    return scale, target_mean - scale * source_mean


def _is_spread(
    variance: Tensor,  # [...]
    largest: Tensor,  # [...], the largest magnitude among the values
) -> Tensor:  # [...], bool
    """Whether values differ at all: equal ones leave a variance of rounding, which no scale may be fitted to."""
    return variance > (SAME * largest) ** 2


def _checked_pair(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    source, target = as_float64(source), as_float64(target)
    if source.shape != target.shape or source.ndim == 0:
        raise ValueError(f"values to align differ in shape: {list(source.shape)} and {list(target.shape)}")
    if source.shape[-1] == 0:
        raise UserError("no values to align: no pixel is valid")
    if not (source.isfinite().all() and target.isfinite().all()):
        raise UserError("values to align contain NaN or infinite values: mask them out")
    return source, target
