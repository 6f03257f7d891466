"""What a small backbone is trained to do: one objective a backbone, on batches with exact ground truth.

An objective owns the throw-away parts (patch-level linear heads, correspondence mixers) that help a small network and
are not part of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import DenseMixer
from geoaccel.models.layers.block import Attention
from geoaccel.models.layers.camera_head import encode_pose
from geoaccel.models.losses import (
    CorrespondenceLoss,
    Targets,
    camera_loss,
    confident_regression_loss,
    correspondences,
    gradient_loss,
)
from geoaccel.models.vggt import VGGT


@dataclass(frozen=True)
class Weights:
    """Factors of the parts of an objective; a part of weight 0 is not computed.

    Attributes:
        camera: Pose encoding.
        patch: World point and depth of each patch from a linear layer.
        correspondence: Attention from patches to the patches that see the same surface.
        dense: Per-pixel depth and points with confidence.
        dense_frames: Frames of each scene that the dense heads run on.
    """

    camera: float = 5.0
    patch: float = 1.0
    correspondence: float = 1.0
    dense: float = 1.0
    dense_frames: int = 2


class VGGTObjective(nn.Module):
    """Camera, depth and points as upstream trains them, with the two aids above.

    Args:
        model: The network; its first global attentions get correspondence mixers.
        blocks: How many of them.
        heads: Attention heads supervised in each.
        kernel: Attention kernel of the training.
    """

    def __init__(self, model: VGGT, *, blocks: int = 2, heads: int = 2, kernel: str = "sdpa") -> None:
        super().__init__()
        self.patch_head = nn.Linear(2 * model.config["embed_dim"], 4)
        for module in model.modules():
            if isinstance(module, Attention):
                module.mixer = DenseMixer(kernel)
        self.mixers = [CorrespondenceLoss(heads, kernel) for _ in range(blocks)]
        for block, mixer in zip(model.aggregator.global_blocks, self.mixers, strict=False):
            block.attn.mixer = mixer

    def forward(
        self,
        model: VGGT,
        images: Tensor,  # [B, S, 3, H, W]
        targets: Targets,
        weights: Weights,
        *,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Weighted parts of the loss under ``loss_*``, their sum as ``loss``, and ``match`` (accuracy)."""
        size = images.shape[-2:]
        patch_size = model.config["patch_size"]
        matches = correspondences(targets, patch_size) if weights.correspondence else None
        for mixer in self.mixers:
            mixer.targets, mixer.loss, mixer.accuracy = matches, None, None
        device = images.device.type
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            features, start = model.aggregator(images, keep={*model.config["dpt_layers"], model.aggregator.depth - 1})
        parts: dict[str, Tensor] = {}
        stages = model.camera_head(features)
        pose = encode_pose(targets.cam_from_world, targets.intrinsics, (size[0], size[1]))
        parts["loss_camera"] = weights.camera * camera_loss(stages, pose)
        if weights.patch:
            last = features[-1]
            assert last is not None
            parts["loss_patch"] = weights.patch * self.patch_loss(last[:, :, start:].float(), targets, patch_size)
        if matches is not None:
            losses = [mixer.loss for mixer in self.mixers if mixer.loss is not None]
            parts["loss_match"] = weights.correspondence * torch.stack(losses).mean()
            parts["match"] = torch.stack([mixer.accuracy for mixer in self.mixers if mixer.accuracy is not None])[-1]
        if weights.dense:
            with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
                parts |= self.dense_loss(model, features, images, start, targets, weights)
        parts["loss"] = torch.stack([value for name, value in parts.items() if name.startswith("loss_")]).sum()
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
        # Far ground would drown the scene: an error counts relative to its distance.
        point_error = point_error / (1 + point.norm(dim=-1))
        return ((point_error + 0.5 * depth_error) * valid).sum() / valid.sum().clamp(min=1)

    def dense_loss(
        self,
        model: VGGT,
        features: list[Tensor | None],
        images: Tensor,
        start: int,
        targets: Targets,
        weights: Weights,
    ) -> dict[str, Tensor]:
        """Depth and points of the first few frames (the order of frames is random already)."""
        n = min(weights.dense_frames, images.shape[1])
        chosen = [None if feature is None else feature[:, :n] for feature in features]
        valid = targets.valid[:, :n]
        depth, depth_conf = model.depth_head(chosen, images[:, :n], start, None)
        target_depth = targets.depth[:, :n, ..., None]
        loss_depth = confident_regression_loss(depth.float(), depth_conf.float(), target_depth, valid)
        loss_depth = loss_depth + gradient_loss(depth.flatten(0, 1), target_depth.flatten(0, 1), valid.flatten(0, 1))
        parts = {"loss_depth": weights.dense * loss_depth}
        if "point" in model.heads:
            points, conf = model.point_head(chosen, images[:, :n], start, None)
            loss_point = confident_regression_loss(points.float(), conf.float(), targets.points[:, :n], valid)
            parts["loss_point"] = weights.dense * loss_point
        return parts
