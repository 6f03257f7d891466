"""Cameras from predicted rays: for each frame, a robustly fitted homography from the image plane to ray directions.

Rays are six numbers per cell: direction and origin in world coordinates. Ray directions of a pinhole camera are a
homography of its image plane; the orthogonal factor is the rotation, the triangular one has the focal lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid

DRAWS, SAMPLE = 100, 8
CANDIDATES = 0.3
"""Fraction of the cells, the most confident ones, that samples are drawn from."""
TOLERANCE = 0.2
MOST, BEST = 8000, 0.95
"""Maximum inliers of the last fit: if there are more, this many are drawn from the best."""
SMALLEST_Z = 1e-4


def cameras_from_rays(
    ray: Tensor,  # [B, S, h, w, 6]
    conf: Tensor,  # [B, S, h, w]
    size: tuple[int, int],  # (H, W) of the images
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:  # [B, S, 3, 4], [B, S, 3, 3]
    """``cam_from_world`` and intrinsics in pixels.

    Args:
        ray: Direction and origin of each cell.
        conf: Positive.
        size: In pixels.
        seed: Seed of the draws, the same for all frames; torch's global generator is not used.
    """
    height, width = ray.shape[2:4]
    x = (2 * torch.arange(width, device=ray.device) + 1 - width) / width
    y = (2 * torch.arange(height, device=ray.device) + 1 - height) / height
    plane = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1).double()
    generator = torch.Generator().manual_seed(seed)
    count = max(SAMPLE, round(CANDIDATES * len(plane)))
    draws = torch.rand(DRAWS, count, generator=generator).argsort(-1)[:, :SAMPLE].to(ray.device)
    rows = zip(ray.double().flatten(0, 1).flatten(1, 2), conf.double().flatten(0, 1).flatten(1), strict=True)
    found = [_camera(plane, directions, weights, draws, count, generator) for directions, weights in rows]
    world_from_cam, focal, centre = (torch.stack(part).unflatten(0, ray.shape[:2]) for part in zip(*found, strict=True))
    half = focal.new_tensor([size[1] / 2, size[0] / 2])
    intrinsics = torch.diag_embed(torch.cat([focal * half, torch.ones_like(focal[..., :1])], dim=-1))
    intrinsics[..., :2, 2] = centre * half
    return invert_rigid(world_from_cam)[..., :3, :].to(ray.dtype), intrinsics.to(ray.dtype)


def _camera(
    plane: Tensor,  # [N, 2]
    ray: Tensor,  # [N, 6]
    weights: Tensor,  # [N]
    draws: Tensor,  # [draws, 8]
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pose [3, 4]; focal lengths and principal point [2] each on a plane from -1 to 1, the latter from its corner."""
    origin = (ray[:, 3:] * weights[:, None]).sum(0) / weights.sum()
    usable = ray[:, 2].abs() > SMALLEST_Z
    target = ray[:, :2] / torch.where(usable, ray[:, 2], 1.0)[:, None]
    weights = torch.where(usable, weights, 0.0)
    candidates = weights.topk(min(count, len(weights))).indices
    picked = candidates[draws.clamp(max=len(candidates) - 1)]
    trials = _fit(plane[picked], target[picked], weights[picked])
    inlier = _errors(trials, plane, target) < TOLERANCE  # [draws, N]
    best = inlier[(inlier * weights).sum(-1).argmax()]
    chosen = (best & usable).nonzero()[:, 0]
    if len(chosen) > MOST:
        ranked = chosen[weights[chosen].argsort(descending=True)][: int(BEST * len(chosen))]
        chosen = ranked[torch.randperm(len(ranked), generator=generator)[:MOST].to(ranked.device)]
    if len(chosen) < SAMPLE // 2:  # no consensus: use all cells
        chosen = torch.arange(len(plane), device=plane.device)
    matrix = _fit(plane[chosen], target[chosen], weights[chosen])
    matrix = matrix * torch.linalg.det(matrix).sign()
    rotation, lower = _orthogonal_lower(matrix)
    lower = lower / lower[2, 2]
    pose = torch.cat([rotation, origin[:, None]], dim=1)
    return pose, 1 / lower.diagonal()[:2], lower[2, :2] + 1


def _fit(
    source: Tensor,  # [..., N, 2]
    target: Tensor,  # [..., N, 2]
    weights: Tensor,  # [..., N]
) -> Tensor:  # [..., 3, 3]
    """The homography of least weighted algebraic error, its last entry 1."""
    ones = torch.ones_like(source[..., :1])
    point = torch.cat([source, ones], dim=-1)
    zero = torch.zeros_like(point)
    rows = torch.stack(
        [
            torch.cat([-point, zero, target[..., :1] * point], dim=-1),
            torch.cat([zero, -point, target[..., 1:] * point], dim=-1),
        ],
        dim=-2,
    )
    rows = (rows * weights.sqrt()[..., None, None]).flatten(-3, -2)
    # The smallest right singular vector, from a 9 x 9 matrix instead of thousands of rows.
    solution = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., 0]
    return (solution / solution[..., 8:]).unflatten(-1, (3, 3))


def _errors(
    matrices: Tensor,  # [m, 3, 3]
    source: Tensor,  # [N, 2]
    target: Tensor,  # [N, 2]
) -> Tensor:  # [m, N]
    mapped = torch.cat([source, torch.ones_like(source[:, :1])], dim=-1) @ matrices.mT
    z = torch.where(mapped[..., 2:].abs() < 1e-12, 1e-12, mapped[..., 2:])
    return (mapped[..., :2] / z - target).norm(dim=-1)


def _orthogonal_lower(
    matrix: Tensor,  # [3, 3]
) -> tuple[Tensor, Tensor]:
    """An orthogonal times a lower triangular matrix with a positive diagonal."""
    orthogonal, upper = torch.linalg.qr(matrix.flip(-1))
    orthogonal, lower = orthogonal.flip(-1), upper.flip(-2, -1)
    sign = lower.diagonal().sign()
    return orthogonal * sign, sign[:, None] * lower
