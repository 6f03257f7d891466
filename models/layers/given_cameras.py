"""Given cameras as input of Depth Anything 3, and the scale of its output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.conditions import Conditions
from geoaccel.errors import UserError

SMALLEST = 0.1
"""Minimum of the distance that poses are divided by: cameras that hardly move are not blown up."""
ROBUST_FROM, SAMPLES, AGREEING = 10, 50, 3.0
"""Minimum frames for a robust fit; samples of three frames; maximum residual of an inlier over the median residual."""


def normalised(
    cam_from_world: Tensor,  # [S, 4, 4]
) -> Tensor:  # [S, 4, 4]
    """Poses relative to the first camera, scaled to a median distance of 1 from it."""
    relative = cam_from_world @ invert_rigid(cam_from_world[:1])
    distance = invert_rigid(relative)[:, :3, 3].norm(dim=-1).median().clamp(min=SMALLEST)
    scaled = torch.cat([relative[:, :3, :3], relative[:, :3, 3:] / distance], dim=-1)
    return torch.cat([scaled, relative[:, 3:]], dim=1)


def scale_between(
    source: Tensor,  # [S, 3]
    target: Tensor,  # [S, 3]
) -> Tensor:  # scalar
    """Scale of the similarity transform between two point sets (Umeyama, 1991); 1 if they have no extent.

    With ten points or more, it is fitted to the inliers of the best of several samples of three.
    """
    source, target = source.double(), target.double()
    kept = torch.arange(len(source), device=source.device)
    if len(source) >= ROBUST_FROM:
        generator = torch.Generator().manual_seed(0)
        samples = torch.rand(SAMPLES, len(source), generator=generator).argsort(-1)[:, :3].to(source.device)
        residuals = torch.stack([_similarity(source, target, sample)[1] for sample in samples])
        best = residuals[residuals.median(-1).values.argmin()]
        kept = (best <= AGREEING * best.median() + 1e-9).nonzero()[:, 0]
    return _similarity(source, target, kept)[0]


def _similarity(source: Tensor, target: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Scale fitted to some of the points, and the residuals of all points."""
    mean, aim = source[kept].mean(0), target[kept].mean(0)
    spread = (source[kept] - mean).square().sum()
    u, strength, vh = torch.linalg.svd((target[kept] - aim).T @ (source[kept] - mean))
    sign = torch.ones_like(strength)
    sign[2] = torch.det(u @ vh).sign()
    scale = (strength * sign).sum() / spread if spread > 1e-12 else torch.ones_like(spread)
    scale = torch.where(scale > 1e-6, scale, 1.0)
    moved = scale * (source - mean) @ (u * sign @ vh).T + aim
    return scale, (moved - target).norm(dim=-1)


def arguments(conditions: Conditions) -> dict[str, Tensor]:
    """Cameras of one scene under upstream's names.

    Raises:
        UserError: For poses without intrinsics, or cameras for only some frames.
    """
    if set(conditions.given) != {"poses", "intrinsics"}:
        raise UserError(
            f"da3 takes poses together with intrinsics and nothing else; got {' and '.join(conditions.given)}"
        )
    for kind in conditions.given:
        known = conditions.known(kind)
        if known is not None and not known.all():
            raise UserError(f"da3 takes {kind} for all frames or for none; frame {int((~known).nonzero()[0])} has none")
    assert conditions.poses is not None
    assert conditions.intrinsics is not None
    return {"extrinsics": normalised(conditions.poses)[None], "intrinsics": conditions.intrinsics[None]}


def settle(found: Geometry, conditions: Conditions) -> Geometry:
    """The given cameras, with the depth in their scale."""
    assert conditions.poses is not None
    assert conditions.intrinsics is not None
    device = found.depth.device
    poses, intrinsics = (t.to(device).float()[None] for t in (conditions.poses, conditions.intrinsics))
    centres = (invert_rigid(cameras)[0, :, :3, 3] for cameras in (poses, found.cam_from_world))
    depth = found.depth / scale_between(*centres).float()
    points = unproject_depth(depth, intrinsics, poses)
    return replace(found, cam_from_world=poses, intrinsics=intrinsics, depth=depth, points_world=points)
