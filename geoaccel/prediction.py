"""One forward of a network, as a scene on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoaccel.cameras import unproject_depth, unproject_frames
from geoaccel.conditions import Conditions
from geoaccel.errors import UserError
from geoaccel.inputs import Inputs
from geoaccel.memory import planned
from geoaccel.memory_plan import MemoryPlan
from geoaccel.outliers import name_outliers
from geoaccel.reference import Order, Reference, in_scene, reference_first
from geoaccel.registry import unknown
from geoaccel.scene import Scene
from geoaccel.tracks.follow import check_tracker

if TYPE_CHECKING:
    from geoaccel.backbone import Geometry

logger = logging.getLogger(__name__)

FRAMES_AT_ONCE = 8
"""Frames whose points are computed at a time on a GPU, to use little memory next to the weights."""


def predict(model: Any, inputs: Inputs, heads: Sequence[str], points: str, reference: Reference = "first") -> Scene:
    """The scene that a network predicts, non-finite values masked out, with a note of images unlike the others.

    The arguments, and what is raised, are those of `predict_frames`.
    """
    return name_outliers(*predict_frames(model, inputs, heads, points, reference))


def predict_frames(
    model: Any, inputs: Inputs, heads: Sequence[str], points: str, reference: Reference = "first"
) -> tuple[Scene, Order]:
    """The prediction of a network, and what its encoder saw.

    Args:
        model: On the device where it runs.
        inputs: Images and conditions.
        heads: Heads to run, from `needed_heads`.
        points, reference: As in `geoaccel.reconstruct`.

    Raises:
        ValueError: If no camera, or no depth at all, is finite.
    """
    if inputs.told.given and reference != "first":
        raise UserError(f"reference={reference!r} cannot be combined with conditions; leave out one of the two")
    images = inputs.batch.images
    reference = in_scene(reference, inputs.batch.numbers, inputs.batch.left_out)
    with reference_first(model, reference, len(images)) as order:
        geometry = order.back(_forward(model, images, heads, inputs.told, inputs.plan))
    device = next(model.parameters()).device
    return replace(_from_geometry(geometry, inputs, points, device), unit=_unit(model, inputs.told)), order


def needed_heads(model: Any, points: str) -> list[str]:
    """Heads without those that are not used: tracks, rays, and points of a model that also predicts depth."""
    if points not in ("depth", "head"):
        raise UserError(unknown("source of points", points, ["depth", "head"]))
    if points == "head" and "point" not in model.heads:
        raise UserError(f"points='head' needs a point head; this model has {', '.join(model.heads)}; use 'depth'")
    unused = {"track", "ray"} | ({"point"} if points == "depth" and "depth" in model.heads else set())
    return [head for head in model.heads if head not in unused]


def counted_heads(model: Any, points: str, tracks: str = "auto") -> list[str]:
    """All heads whose memory counts: those of `needed_heads`, and the track head if tracks come from it.

    Raises:
        UserError: If the model has no such head.
    """
    heads = needed_heads(model, points)
    if tracks != "head":
        return heads
    check_tracker(model)
    return [*heads, "track"]


@torch.inference_mode()
def _forward(
    model: Any,
    images: Tensor,  # [S, 3, H, W]
    heads: Sequence[str],
    told: Conditions,
    plan: MemoryPlan | None,
) -> Geometry:
    # The network normalises in float32 and casts afterwards: bfloat16 has fewer than the 8 bits of a pixel.
    device = next(model.parameters()).device
    conditioning = model.backbone.conditions if told.given else None
    given = {} if conditioning is None else conditioning.arguments(told)
    given = {name: value.to(device) for name, value in given.items()}
    if plan is None:
        predictions = model(images[None].to(device=device, dtype=torch.float32), heads=heads, **given)
    else:  # images are copied to the device as needed
        with planned(model, plan):
            predictions = model(images[None].float(), heads=heads, **given)
        # Large outputs have left the device already; small ones must follow.
        predictions = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in predictions.items()}
    geometry = model.backbone.geometry(predictions, tuple(images.shape[-2:]))
    return geometry if conditioning is None else conditioning.settle(geometry, told)


def _from_geometry(geometry: Geometry, inputs: Inputs, points: str, device: torch.device) -> Scene:
    """The single scene of a batch, in float32 on the CPU, with unusable pixels masked out.

    Points are computed on the device of the network.
    """
    batch = inputs.batch
    fields = (geometry.cam_from_world, geometry.intrinsics, geometry.depth, geometry.conf)
    poses, intrinsics, depth, conf = (x[0].detach().to("cpu", torch.float32, copy=True) for x in fields)
    _require_finite_cameras(poses, intrinsics, batch.names)
    poses[:, :3, :3] = _nearest_rotations(poses[:, :3, :3])
    if points == "head":
        points_world = geometry.points_world[0].detach().to("cpu", torch.float32, copy=True)
    else:
        points_world = _unprojected(depth, intrinsics, poses, device)

    finite = depth.isfinite() & conf.isfinite() & points_world.isfinite().all(dim=-1)
    if not finite.any():
        raise UserError(
            "the model predicted no finite depth for any pixel; its weights are damaged or its precision is too low: "
            "try dtype=torch.float32 and the dense model"
        )
    if not finite.all():
        share = 100 * (~finite).float().mean().item()
        logger.warning("%.2f %% of the pixels have no finite prediction and are left out", share)
        depth[~finite], conf[~finite], points_world[~finite] = 0.0, 0.0, 0.0
    return Scene(
        cam_from_world=poses,
        intrinsics=intrinsics,
        depth=depth,
        points_world=points_world,
        conf=conf,
        images=batch.images.detach().to("cpu", torch.float32),
        mask=batch.valid_mask & finite & (depth > 0),
        names=list(batch.names),
        transforms=list(batch.transforms),
        paths=list(batch.paths),
        read_original=batch.original,
        selected=inputs.selected,
        mask_files=inputs.mask_files,
        numbers=list(batch.numbers),
    )


def _unprojected(
    depth: Tensor,  # [S, H, W]
    intrinsics: Tensor,  # [S, 3, 3]
    poses: Tensor,  # [S, 4, 4]
    device: torch.device,
) -> Tensor:  # [S, H, W, 3], on the CPU
    """Points of every pixel. On a CPU a thousand frames take many seconds."""
    if device.type != "cuda":
        return unproject_frames(depth, intrinsics, poses)
    world = depth.new_empty(*depth.shape, 3)
    for at in range(0, len(depth), FRAMES_AT_ONCE):
        part = slice(at, at + FRAMES_AT_ONCE)
        # In float64, which is not affected by TF32 and similar settings.
        given = (x[part].to(device, torch.float64) for x in (depth, intrinsics, poses))
        world[part] = unproject_depth(*given).float().cpu()
    return world


def _unit(model: Any, told: Conditions) -> str:
    conditioning = model.backbone.conditions
    return (conditioning.unit if told.given and conditioning is not None else None) or model.backbone.unit


def _require_finite_cameras(
    cam_from_world: Tensor,  # [S, 4, 4]
    intrinsics: Tensor,  # [S, 3, 3]
    names: Sequence[str],
) -> None:
    finite = cam_from_world.isfinite().flatten(1).all(dim=1) & intrinsics.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        raise UserError(
            f"the model predicted no finite camera (NaN or infinity) for {len(bad)} of {len(names)} images, first "
            f"{bad[0]}; its weights are damaged or its precision too low: try dtype=torch.float32 and the dense model"
        )


def _nearest_rotations(
    matrices: Tensor,  # [S, 3, 3]
) -> Tensor:  # [S, 3, 3]
    """Orthogonalise matrices rounded in low precision: files store quaternions, which are exact rotations."""
    u, _, vt = torch.linalg.svd(matrices.double())
    u[:, :, 2] *= torch.linalg.det(u @ vt)[:, None]
    return (u @ vt).to(matrices.dtype)
