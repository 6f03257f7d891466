"""Conditions for Pi3X, in the scale and coordinate frame that its network expects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, pixel_grid
from geoaccel.conditions import Conditions, check_depths, check_intrinsics, check_poses
from geoaccel.errors import UserError

STATIC = 0.02
"""Cameras that move less than this, in the unit of the poses, count as static: no scale is taken from them."""


@dataclass(frozen=True)
class Given:
    """Conditions of B scenes of S frames; each is None where no frame has it.

    Attributes:
        depth: [B, S, 2, H, W]: depth in the scene's scale, and a mask that is 1 where it is known.
        has_depth: [B, S], bool.
        rays: [B, S, 2, H, W]: x / z and y / z of every pixel.
        has_rays: [B, S], bool.
        world_from_cam: [B, S, 4, 4], relative to the first frame, in the scene's scale.
        has_pose: [B, S], bool.
    """

    depth: Tensor | None = None
    has_depth: Tensor | None = None
    rays: Tensor | None = None
    has_rays: Tensor | None = None
    world_from_cam: Tensor | None = None
    has_pose: Tensor | None = None


def given(
    shape: tuple[int, int, int, int],  # B, S, H, W
    device: torch.device,
    *,
    depths: Tensor | None = None,  # [B, S, H, W]
    intrinsics: Tensor | None = None,  # [B, S, 3, 3]
    rays: Tensor | None = None,  # [B, S, H, W, 3]
    poses: Tensor | None = None,  # [B, S, 4, 4], world_from_cam
    mask_add_depth: Tensor | None = None,  # [B, S]
    mask_add_ray: Tensor | None = None,  # [B, S]
    mask_add_pose: Tensor | None = None,  # [B, S]
) -> Given:
    """Check and normalise conditions, under upstream's names.

    Masks select the frames for which each is used; by default all. If only one frame of a scene has a pose it is
    ignored, as only relative poses count. Depths are scaled to a mean of 1 over the scene; without depths, distances
    from the first camera are, unless the cameras are static.

    Raises:
        UserError: For impossible conditions, or a mask without its condition.
    """
    lead = shape[:2]
    if intrinsics is not None and rays is not None:
        raise UserError("intrinsics and rays were both given; give one of them")
    directions = intrinsics if rays is None else rays
    masks = []
    for name, mask, values in (
        ("mask_add_depth", mask_add_depth, depths),
        ("mask_add_ray", mask_add_ray, directions),
        ("mask_add_pose", mask_add_pose, poses),
    ):
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != lead):
            raise UserError(f"{name} is {mask.dtype} {list(mask.shape)}; expected bool {list(lead)}")
        if mask is not None and values is None and mask.any():
            raise UserError(f"{name} was given without its condition; give both, or leave the mask out")
        full = torch.full(lead, values is not None, device=device)
        masks.append(full if mask is None else mask.to(device))
    check_depths(depths, shape, mask_add_depth)
    check_intrinsics(intrinsics, lead, mask_add_ray)
    check_poses(poses, lead, mask_add_pose)
    if rays is not None and (tuple(rays.shape) != (*shape, 3) or not rays.isfinite().all()):
        raise UserError(f"got rays {list(rays.shape)}; expected finite directions {[*shape, 3]}")
    has_depth, has_rays, has_pose = masks
    has_pose = has_pose & (has_pose.sum(1, keepdim=True) != 1)

    scale = torch.ones(lead[0], device=device)
    depth = None
    if depths is not None:
        depth = depths.to(device).float()
        valid = depth > 0
        count = valid.flatten(1).sum(1)
        mean = depth.masked_fill(~valid, 0).flatten(1).sum(1) / count.clamp(min=1)
        scale = torch.where(count > 0, mean, scale)
        depth = torch.stack([depth / (scale + 1e-8)[:, None, None, None], valid.float()], dim=2)
    return Given(
        depth if has_depth.any() else None,
        has_depth,
        _directions(intrinsics, rays, has_rays, shape[2:]) if has_rays.any() else None,
        has_rays,
        _relative(poses.to(device).float(), scale, has_depth.any(1)) if poses is not None and has_pose.any() else None,
        has_pose,
    )


def _directions(
    intrinsics: Tensor | None,  # [B, S, 3, 3]
    rays: Tensor | None,  # [B, S, H, W, 3]
    known: Tensor,  # [B, S]
    size: tuple[int, int],
) -> Tensor:  # [B, S, 2, H, W]
    if intrinsics is not None:
        pixels = pixel_grid(*size, device=known.device)
        pixels = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
        matrices = intrinsics.to(known.device).float()
        # Placeholders of unknown frames may not be invertible.
        matrices = torch.where(known[..., None, None], matrices, torch.eye(3, device=known.device))
        flat = pixels.flatten(0, 1) @ torch.linalg.inv(matrices).mT
        slopes = flat[..., :2].unflatten(2, size)
    else:
        assert rays is not None
        rays = rays.to(known.device).float()
        slopes = rays[..., :2] / (rays[..., 2:] + 1e-6)
    return slopes.permute(0, 1, 4, 2, 3)


def _relative(
    world_from_cam: Tensor,  # [B, S, 4, 4]
    scale: Tensor,  # [B]
    measured: Tensor,  # [B], bool: the scale is that of depths
) -> Tensor:  # [B, S, 4, 4]
    """Poses relative to the first camera, in the scale of the scene."""
    poses = invert_rigid(world_from_cam[:, :1]) @ world_from_cam
    shift = poses[..., :3, 3] / scale[:, None, None]
    if shift.shape[1] > 1:
        distance = shift[:, 1:].norm(dim=-1)
        still = distance.amax(1) < STATIC
        own = torch.where(measured | still, torch.ones_like(scale), distance.mean(1) + 1e-8)
        shift = shift / own[:, None, None]
    rigid = torch.cat([poses[..., :3, :3], shift[..., None]], dim=-1)
    return torch.cat([rigid, poses[..., 3:, :]], dim=-2)


def arguments(conditions: Conditions) -> dict[str, Tensor]:
    """Conditions of one scene under upstream's names; each may cover only some frames."""
    given: dict[str, Tensor] = {}
    masks = {"poses": "mask_add_pose", "intrinsics": "mask_add_ray", "depths": "mask_add_depth"}
    for kind in conditions.given:
        values, known = getattr(conditions, kind), conditions.known(kind)
        if known is not None:
            # Masked frames are not used; they get the values of the first frame with this condition.
            first = values[known][:1] if known.any() else values[:1]
            values = torch.where(known.view(-1, *[1] * (values.ndim - 1)), values, first if kind != "depths" else 0.0)
            given[masks[kind]] = known[None]
        given[kind] = (invert_rigid(values) if kind == "poses" else values)[None]
    return given
