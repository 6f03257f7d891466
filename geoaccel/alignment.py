"""Similarity transforms between corresponding points: by least squares, and robust to outliers.

Everything runs in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from geoaccel.cameras import to_homogeneous
from geoaccel.errors import UserError

# Float64 rounding error of equal values minus their mean, relative to the largest.
SAME = 1e-12

SAMPLES = 2000
"""Most triples that a robust fit tries."""
AGREEING = 2.5
"""Inlier threshold of a robust fit, in standard deviations."""
BIWEIGHT = 4.0
"""Median residuals from which a point has weight zero; chosen on predicted cameras of validation scenes."""
ROUNDS = 30
COLLINEAR = 1e-3
"""Points lie on a line if their lateral extent is below this fraction of their longest extent."""


def as_float64(
    values: Tensor,  # or anything torch.as_tensor takes
) -> Tensor:
    """Copy to a float64 tensor on the CPU, without gradient."""
    return torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64)


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

        Camera coordinates are multiplied by ``scale``, and so must be depth; images do not change.
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

    Degenerate points raise no error: collinear points leave the rotation about their line undetermined, and coinciding
    source points leave rotation and scale undetermined (identity and scale 1 are returned). The residual is minimal in
    either case.

    Args:
        source: Points to transform.
        target: Corresponding points.
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
    spread = is_spread(variance, largest)
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


@dataclass(frozen=True)
class RobustFit:
    """A similarity, and how well points agree with it.

    Attributes:
        similarity: Fitted to the inliers.
        agrees: Inliers [N], bool.
        residuals: Distance of each transformed point from its target [N].
        on_a_line: All points lie on a line, which leaves the rotation about it undetermined; the smallest was taken.
    """

    similarity: Similarity
    agrees: Tensor
    residuals: Tensor
    on_a_line: bool


def robust_similarity(
    source: Tensor,  # [N, 3]
    target: Tensor,  # [N, 3], target n corresponds to source n
) -> RobustFit:
    """The similarity that most corresponding points agree on, with up to nearly half of them outliers.

    Starts from least median of squares over triples (Rousseeuw 1984) and least squares over its inliers. Tukey's
    biweight (Beaton and Tukey 1974), scaled by the median residual, then finds outliers that triples, which follow the
    noise of three points, miss. With four points no outlier can be identified: all count as inliers.

    Raises:
        ValueError: If there are fewer than three points, or they coincide.
    """
    source, target = as_float64(source), as_float64(target)
    count = len(source)
    if count < 3:
        raise UserError(f"{count} corresponding points do not determine a similarity transform; give at least three")
    for points, whose in ((source, "predicted"), (target, "given")):
        if not is_spread((points - points.mean(0)).square().sum(-1).mean(), points.abs().amax()):
            raise UserError(f"all {whose} positions are equal, which determines no similarity; give distinct ones")
    agrees = torch.ones(count, dtype=torch.bool)
    if count > 4:
        half = count // 2 + 2  # of least median of squares in three dimensions
        fits = umeyama(source[_triples(count)], target[_triples(count)])
        residuals = (fits.apply_points(source.expand(len(fits.scale), -1, -1)) - target).norm(dim=-1)
        spread = residuals.kthvalue(half, dim=-1).values
        best = int(spread.argmin())
        # The standard deviation of which this is the median, for few points (Rousseeuw and Leroy 1987, p. 202).
        deviation = 1.4826 * (1 + 5 / (count - 3)) * float(spread[best])
        agrees = residuals[best] <= AGREEING * max(deviation, SAME**0.5 * float(target.abs().amax()))
    similarity, on_a_line = _fit(source[agrees], target[agrees])
    if count > 4 and not on_a_line:
        similarity, agrees = _reweighted(similarity, agrees, source, target)
    residuals = (similarity.apply_points(source) - target).norm(dim=-1)
    return RobustFit(similarity, agrees, residuals, on_a_line)


def _reweighted(
    similarity: Similarity, agrees: Tensor, source: Tensor, target: Tensor
) -> tuple[Similarity, Tensor]:  # and [N] bool
    """Least squares with Tukey's biweight, and the points of nonzero weight; the input if half have zero weight."""
    half = len(source) // 2 + 1
    least = SAME**0.5 * float(target.abs().amax())
    for _ in range(ROUNDS):
        residuals = (similarity.apply_points(source) - target).norm(dim=-1)
        limit = BIWEIGHT * max(float(residuals.kthvalue(half).values), least)
        weights = (1 - (residuals / limit).square()).clamp(min=0).square()
        if int((weights > 0).sum()) < half:
            break
        similarity, agrees = umeyama(source, target, weights=weights), weights > 0
    return similarity, agrees


def _triples(count: int) -> Tensor:  # [K, 3]
    """All triples of indices, or a random selection that is always the same."""
    if count * (count - 1) * (count - 2) // 6 <= SAMPLES:
        return torch.tensor(list(combinations(range(count), 3)))
    generator = torch.Generator().manual_seed(0)
    return torch.rand(SAMPLES, count, generator=generator).argsort(-1)[:, :3]


def _fit(source: Tensor, target: Tensor) -> tuple[Similarity, bool]:
    """Least squares; the smallest rotation, and True, where points lie on a line."""
    means = source.mean(0), target.mean(0)
    _, strength, rows = torch.linalg.svd(source - means[0], full_matrices=False)
    _, other, aims = torch.linalg.svd(target - means[1], full_matrices=False)
    if min(strength[1] / strength[0], other[1] / other[0]) > COLLINEAR:
        return umeyama(source, target), False
    along, aim = rows[0], aims[0]
    places, aimed = (source - means[0]) @ along, (target - means[1]) @ aim
    aim = aim * torch.sign(places @ aimed)
    rotation = _smallest_rotation(along, aim)
    scale = (places @ aimed).abs() / places.square().sum()
    return Similarity(scale, rotation, means[1] - scale * rotation @ means[0]), True


def _smallest_rotation(
    start: Tensor,  # [3], of length one
    end: Tensor,  # [3], of length one
) -> Tensor:  # [3, 3]
    """The smallest rotation of one direction onto another, as two reflections."""
    helper = torch.eye(3, dtype=start.dtype)[start.abs().argmin()]
    across = torch.linalg.cross(start, helper)
    across = across / across.norm()
    halfway = start + end
    halfway = halfway / halfway.norm() if halfway.norm() > 1e-9 else across
    turn = torch.eye(3, dtype=start.dtype) - 2 * torch.outer(halfway, halfway)
    flip = torch.eye(3, dtype=start.dtype) - 2 * torch.outer(start, start)
    return turn @ flip


def is_spread(
    variance: Tensor,  # [...]
    largest: Tensor,  # [...], the largest magnitude among the values
) -> Tensor:  # [...], bool
    """Whether values differ at all: the variance of equal ones is rounding error, and no scale may be fitted to it."""
    return variance > (SAME * largest) ** 2
