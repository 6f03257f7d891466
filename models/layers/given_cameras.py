"""Given cameras on the way into Depth Anything 3, and the scale of what comes out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.conditions import Conditions
from geoaccel.errors import UserError

SMALLEST = 0.1
"""Of the distance that poses are divided by: cameras that hardly move are not blown up."""
ROBUST_FROM, SAMPLES, AGREEING = 10, 50, 3.0
"""Frames from which on some may be wrong; samples of three; residuals over their median up to which frames agree."""


def normalised(
    cam_from_world: Tensor,  # [S, 4, 4]
) -> Tensor:  # [S, 4, 4]
    """Poses relative to the first camera, the median distance of cameras from it 1."""
    relative = cam_from_world @ invert_rigid(cam_from_world[:1])
    distance = invert_rigid(relative)[:, :3, 3].norm(dim=-1).median().clamp(min=SMALLEST)
    scaled = torch.cat([relative[:, :3, :3], relative[:, :3, 3:] / distance], dim=-1)
    return torch.cat([scaled, relative[:, 3:]], dim=1)


def scale_between(
    source: Tensor,  # [S, 3]
    target: Tensor,  # [S, 3]
) -> Tensor:  # scalar
    """The scale of the similarity that brings points onto others (Umeyama, 1991); 1 where they do not move.

    From ten points on the fit is to those that agree with the best of some samples of three.
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
    """Scale fitted to some of the points, and how far each of all is off then."""
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
        UserError: For poses without intrinsics, or cameras of some frames only.
    """
    if set(conditions.given) != {"poses", "intrinsics"}:
        raise UserError(f"da3 takes poses and intrinsics together, got {' and '.join(conditions.given)} alone")
    for kind in conditions.given:
        known = conditions.known(kind)
        if known is not None and not known.all():
            raise UserError(f"da3 takes {kind} of all frames or of none; frame {int((~known).nonzero()[0])} has none")
    assert conditions.poses is not None
    assert conditions.intrinsics is not None
    return {"extrinsics": normalised(conditions.poses)[None], "intrinsics": conditions.intrinsics[None]}


def settle(found: Geometry, conditions: Conditions) -> Geometry:
    """The given cameras, and the depth in their scale."""
    assert conditions.poses is not None
    assert conditions.intrinsics is not None
    device = found.depth.device
    poses, intrinsics = (t.to(device).float()[None] for t in (conditions.poses, conditions.intrinsics))
    centres = (invert_rigid(cameras)[0, :, :3, 3] for cameras in (poses, found.cam_from_world))
    depth = found.depth / scale_between(*centres).float()
    points = unproject_depth(depth, intrinsics, poses)
    return replace(found, cam_from_world=poses, intrinsics=intrinsics, depth=depth, points_world=points)
