"""Training objectives, one per backbone, on batches with exact ground truth.

An objective owns the auxiliary parts (patch-level linear heads, correspondence mixers) that help train a small network
and are not part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import DenseMixer
from geoaccel.cameras import invert_rigid, to_homogeneous, unproject_depth
from geoaccel.models.layers.block import Attention
from geoaccel.models.layers.camera_head import decode_pose, encode_pose
from geoaccel.models.pi3 import Pi3
from geoaccel.models.robust import weighted_median
from geoaccel.models.vggt import VGGT
from geoaccel.registry import Registry
from losses import (
    CorrespondenceLoss,
    Targets,
    camera_loss,
    confident_regression_loss,
    correspondences,
    first_frames,
    gradient_loss,
    relative_pose_loss,
)
from scored_losses import graded_confidence_loss, relative_depth_losses


@dataclass(frozen=True)
class Weights:
    """Factors of the parts of an objective; a part of weight 0 is not computed.

    Attributes:
        camera: Poses.
        relative: Relative poses as in the evaluation, :func:`losses.relative_pose_loss`.
        relative_knee: Its ``knee``.
        patch: World point and depth of each patch from a linear layer (VGGT).
        correspondence: Attention from patches to the patches that see the same surface.
        dense: Per-pixel depth and points with confidence. pi3's points are as cheap as its cameras, and its scale is
            computed from them: they are always predicted, with at least a tenth of the weight of the cameras.
        dense_frames: Frames per scene on which VGGT's dense heads run.
        scored: VGGT's depth and the confidence of both as in the evaluation, :mod:`scored_losses`, instead of
            ``dense``.
        scored_frames: Frames per scene on which VGGT's depth then runs.
    """

    camera: float = 5.0
    relative: float = 0.0
    relative_knee: float | None = None
    patch: float = 1.0
    correspondence: float = 1.0
    dense: float = 1.0
    dense_frames: int = 2
    scored: float = 0.0
    scored_frames: int = 8


def use_kernel(model: nn.Module, kernel: str) -> None:
    """Put a kernel into every attention."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.mixer = DenseMixer(kernel)


def place_correspondence(model: Any, blocks: int, heads: int, kernel: str) -> list[CorrespondenceLoss]:
    """Put the training kernel everywhere and correspondence mixers into the first global attentions."""
    use_kernel(model, kernel)
    mixers = [CorrespondenceLoss(heads, kernel) for _ in range(blocks)]
    for site, mixer in zip(model.backbone.sites(model)["global"], mixers, strict=False):
        site.mixer = mixer
    return mixers


def set_matches(mixers: Iterable[CorrespondenceLoss], matches: Tensor | None) -> None:
    """Give the mixers the targets of the next forward."""
    for mixer in mixers:
        mixer.targets, mixer.loss, mixer.accuracy = matches, None, None


def match_parts(mixers: Iterable[CorrespondenceLoss], weight: float) -> dict[str, Tensor]:
    """Losses and accuracy of the mixers in the last forward; the accuracy is that of the last block supervised."""
    found = [(mixer.loss, mixer.accuracy) for mixer in mixers if mixer.loss is not None and mixer.accuracy is not None]
    if not found:
        return {}
    return {"loss_match": weight * torch.stack([loss for loss, _ in found]).mean(), "match": found[-1][1]}


def with_total(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the sum of all losses."""
    parts["loss"] = torch.stack([value for name, value in parts.items() if name.startswith("loss_")]).sum()
    return parts


Parts = dict[str, Tensor]
Narrow = Callable[[], AbstractContextManager[Any]]
"""Makes the autocast context in which the network is trained."""


class Objective(nn.Module):
    """The losses of a network on a batch."""

    def forward(
        self,
        model: Any,
        images: Tensor,  # [B, S, 3, H, W]
        targets: Targets,
        weights: Weights,
        *,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Weighted parts of the loss under ``loss_*``, their sum as ``loss``, and other values of :meth:`parts`."""
        narrow = partial(torch.autocast, images.device.type, dtype=autocast, enabled=autocast is not None)
        return with_total(self.parts(model, images, targets, weights, narrow))

    def parts(self, model: Any, images: Tensor, targets: Targets, weights: Weights, narrow: Narrow) -> Parts:
        """Weighted parts of the loss under ``loss_*``; the network itself runs under ``narrow()``."""
        raise NotImplementedError


class VGGTObjective(Objective):
    """Camera, depth and points as trained upstream, with the two auxiliary parts above.

    Args:
        model: The network; its first global attentions get correspondence mixers.
        blocks: How many of them.
        heads: Attention heads supervised in each.
        kernel: Attention kernel of the training.
    """

    def __init__(self, model: VGGT, *, blocks: int = 2, heads: int = 2, kernel: str = "sdpa") -> None:
        super().__init__()
        self.patch_head = nn.Linear(2 * model.config.embed_dim, 4)
        self.mixers = place_correspondence(model, blocks, heads, kernel)

    def parts(self, model: VGGT, images: Tensor, targets: Targets, weights: Weights, narrow: Narrow) -> Parts:
        size = images.shape[-2:]
        patch_size = model.config.patch_size
        set_matches(self.mixers, correspondences(targets, patch_size) if weights.correspondence else None)
        with narrow():
            features, start = model.aggregator(images, keep={*model.config.dpt_layers, model.aggregator.depth - 1})
        parts: dict[str, Tensor] = {}
        stages = model.camera_head(features)
        pose = encode_pose(targets.cam_from_world, targets.intrinsics, (size[0], size[1]))
        parts["loss_camera"] = weights.camera * camera_loss(stages, pose)
        if weights.relative:
            posed = to_homogeneous(decode_pose(stages[-1], (size[0], size[1]))[0])
            loss_relative = relative_pose_loss(posed, targets.cam_from_world, knee=weights.relative_knee)
            parts["loss_relative"] = weights.relative * loss_relative
        if weights.patch:
            last = features[-1]
            assert last is not None
            parts["loss_patch"] = weights.patch * self.patch_loss(last[:, :, start:].float(), targets, patch_size)
        parts |= match_parts(self.mixers, weights.correspondence)
        with narrow():
            parts |= self.dense_losses(model, features, images, start, targets, weights)
        return parts

    def patch_loss(self, tokens: Tensor, targets: Targets, patch_size: int) -> Tensor:
        """L1 of world point and log depth at the centre of every patch."""
        centre = slice(patch_size // 2, None, patch_size)
        predicted = self.patch_head(tokens)  # [B, S, h * w, 4]
        point = targets.points[:, :, centre, centre].flatten(2, 3)
        depth = targets.depth[:, :, centre, centre].flatten(2, 3)
        valid = targets.valid[:, :, centre, centre].flatten(2, 3)
        point_error = F.smooth_l1_loss(predicted[..., :3], point, reduction="none", beta=0.1).sum(-1)
        depth_error = (predicted[..., 3] - depth.clamp(min=1e-3).log()).abs()
        # Far ground would dominate: errors are relative to the distance.
        point_error = point_error / (1 + point.norm(dim=-1))
        return ((point_error + 0.5 * depth_error) * valid).sum() / valid.sum().clamp(min=1)

    def dense_losses(
        self,
        model: VGGT,
        features: list[Tensor | None],
        images: Tensor,
        start: int,
        targets: Targets,
        weights: Weights,
    ) -> dict[str, Tensor]:
        """Depth and points of the first few frames (the order of frames is random already)."""

        def predict(head: nn.Module, frames: int) -> tuple[Tensor, Tensor]:
            chosen = [None if feature is None else feature[:, :frames] for feature in features]
            values, conf = head(chosen, images[:, :frames], start, None)
            return values.float(), conf.float()

        parts = {}
        if weights.scored:
            seen = first_frames(targets, weights.scored_frames)
            depth, conf = predict(model.depth_head, seen.depth.shape[1])
            found = relative_depth_losses(depth[..., 0], conf, seen)
            parts = {name: weights.scored * part for name, part in found.items()}
        if not weights.dense:
            return parts
        seen = first_frames(targets, weights.dense_frames)
        frames, valid = seen.depth.shape[1], seen.valid
        if not weights.scored:
            depth, conf = predict(model.depth_head, frames)
            loss_depth = confident_regression_loss(depth, conf, seen.depth[..., None], valid)
            jumps = gradient_loss(depth.flatten(0, 1), seen.depth[..., None].flatten(0, 1), valid.flatten(0, 1))
            parts["loss_depth"] = weights.dense * (loss_depth + jumps)
        if "point" in model.heads:
            points, conf = predict(model.point_head, frames)
            parts["loss_point"] = weights.dense * confident_regression_loss(points, conf, seen.points, valid)
        return parts


class Pi3Objective(Objective):
    """Losses without a reference view (pi3, arXiv 2507.13347, section 3.3).

    One scale per scene aligns predicted points to the targets; points are compared in each camera's own frame, poses
    over all ordered pairs of frames, confidence with whether a point is right. The losses are invariant to permutations
    of the frames.

    Differs from the paper: no normal loss (the scenes are mostly smooth); rotations are compared by the chordal
    distance instead of the angle, whose gradient is singular at 180 degrees; confidence is trained from the start
    rather than on a frozen network; and the correspondence loss is ours.

    Args:
        model: The network; its first global attentions get correspondence mixers.
        blocks: How many of them.
        heads: Attention heads supervised in each.
        kernel: Attention kernel of the training.
    """

    right_within = 0.05
    """Relative error below which a point counts as right."""

    def __init__(self, model: Pi3, *, blocks: int = 2, heads: int = 2, kernel: str = "sdpa") -> None:
        super().__init__()
        self.mixers = place_correspondence(model, blocks, heads, kernel)

    def parts(self, model: Pi3, images: Tensor, targets: Targets, weights: Weights, narrow: Narrow) -> Parts:
        set_matches(self.mixers, correspondences(targets, model.patch_size) if weights.correspondence else None)
        with narrow():
            predictions = model(images)
        local = unproject_depth(targets.depth, targets.intrinsics)
        predicted = predictions["local_points"]
        near = 1 / targets.depth.clamp(min=1e-3) * targets.valid  # errors are relative to the distance
        scale = align_scale(predicted.detach(), local, near)
        error = (scale[:, None, None, None, None] * predicted - local).abs().sum(-1) * near
        count = targets.valid.sum().clamp(min=1)
        parts = {"loss_point": max(weights.dense, 0.1 * weights.camera) * error.sum() / count}
        parts["loss_camera"] = weights.camera * self.pose_loss(predictions["camera_poses"], targets, scale)
        if weights.relative:
            posed = invert_rigid(predictions["camera_poses"])
            loss_relative = relative_pose_loss(posed, targets.cam_from_world, knee=weights.relative_knee)
            parts["loss_relative"] = weights.relative * loss_relative
        if weights.scored:
            graded = graded_confidence_loss(predicted[..., 2].float(), predictions["conf"][..., 0].float(), targets)
            parts["loss_conf"] = weights.scored * graded
        elif weights.dense:
            right = (error.detach() < self.right_within).float()
            doubt = F.binary_cross_entropy_with_logits(predictions["conf"][..., 0], right, reduction="none")
            parts["loss_conf"] = 0.05 * weights.dense * (doubt * targets.valid).sum() / count
        return parts | match_parts(self.mixers, weights.correspondence)

    def pose_loss(
        self,
        world_from_cam: Tensor,  # [B, S, 4, 4]
        targets: Targets,
        scale: Tensor,  # [B]
    ) -> Tensor:
        """Chordal distance and Huber loss of relative rotations and translations over all ordered pairs."""

        def relative(poses: Tensor) -> Tensor:  # [B, S, S, 4, 4], camera i from camera j
            return invert_rigid(poses)[:, :, None] @ poses[:, None]

        predicted = relative(world_from_cam)
        truth = relative(invert_rigid(targets.cam_from_world))
        rotation = (predicted[..., :3, :3] - truth[..., :3, :3]).square().sum(dim=(-1, -2))
        moved = scale[:, None, None, None] * predicted[..., :3, 3]
        translation = F.huber_loss(moved, truth[..., :3, 3], reduction="none", delta=0.1).sum(-1)
        # Pairs of equal frames cost nothing; their fraction only scales the loss. The square root of a sum keeps the
        # gradient of small errors large.
        return ((rotation + 1e-6).sqrt() + 10 * translation).mean()


def align_scale(
    predicted: Tensor,  # [B, S, H, W, 3]
    target: Tensor,  # [B, S, H, W, 3]
    weight: Tensor,  # [B, S, H, W], not negative
) -> Tensor:  # [B]
    """The scale s that minimises ``sum w |s p - t|``, exactly: the median of t / p weighted by w |p|."""
    p, t = predicted.flatten(1).float(), target.flatten(1).float()
    w = weight[..., None].expand(predicted.shape).flatten(1) * p.abs()
    ratio = t / torch.where(p.abs() < 1e-8, 1e-8, p)
    # A scale must be positive.
    return weighted_median(ratio, w).clamp(min=1e-3)


OBJECTIVES: Registry[Callable[..., Objective]] = Registry("objective", {"vggt": VGGTObjective, "pi3": Pi3Objective})
