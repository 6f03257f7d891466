"""Depth and confidence of a network whose cameras are finished: only its dense heads go on learning.

Two things differ from the losses that trained the whole network. Errors count relative to the distance, as depth is
scored; far ground would drown the scene. And confidence learns the error that is left after one scale for the scene,
which is what it is judged by: an error that all pixels share tells none of them from another.

VGGT's confidence comes out of the head of its depth, which therefore learns too, in the cameras' unit of length. pi3's
has a decoder of its own, so that points stay what the whole network made of them: learning on alone they came no closer
(pi3-mini, 320 steps: AbsRel from 0.054 to 0.057).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.models.losses import Targets, gradient_loss
from geoaccel.models.objectives import Weights, use_kernel, with_total
from geoaccel.models.pi3 import Pi3
from geoaccel.models.vggt import VGGT
from geoaccel.registry import Registry


class Refinement(nn.Module):
    """What both backbones share.

    Args:
        model: Everything but its dense heads is frozen.
        kernel: Attention kernel of the training.
    """

    heads: tuple[str, ...]
    """Modules that learn."""

    def __init__(self, model: Any, *, kernel: str = "sdpa") -> None:
        super().__init__()
        use_kernel(model, kernel)
        model.requires_grad_(False)
        for name in self.heads:
            model.get_submodule(name).requires_grad_(True)

    def forward(
        self,
        model: Any,
        images: Tensor,  # [B, S, 3, H, W]
        targets: Targets,
        weights: Weights,
        *,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """Parts of the loss under ``loss_*``, and their sum as ``loss``; of ``weights`` only ``dense`` counts."""
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            parts = self.parts(model, images, targets)
        return with_total({name: weights.dense * part for name, part in parts.items()})

    def parts(self, model: Any, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        raise NotImplementedError


class VGGTRefinement(Refinement):
    """Depth and its confidence, as upstream ties them together."""

    heads = ("depth_head",)
    alpha = 0.2

    def parts(self, model: VGGT, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        features, start = model.aggregator(images, keep=model.config["dpt_layers"])
        depth, conf = model.depth_head(features, images, start, None)
        depth, certainty = depth[..., 0].float(), conf.float()[targets.valid]
        near = nearness(targets)
        error = ((depth - targets.depth).abs() * near)[targets.valid]
        left = scaled_error(depth, targets)[targets.valid]
        flat = ((depth * near).flatten(0, 1)[..., None], targets.valid.flatten(0, 1))
        edges = gradient_loss(flat[0], flat[1].float()[..., None], flat[1])
        return {
            "loss_depth": 2 * error.mean() + 0.3 * edges,
            "loss_conf": (left * certainty - self.alpha * certainty.log()).mean(),
        }


class Pi3Refinement(Refinement):
    """Confidence alone: how right each point is expected to be."""

    heads = ("conf_decoder", "conf_head")
    half_right = 0.05
    """Relative error of a point that is half right."""

    def parts(self, model: Pi3, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        predictions, valid = model(images), targets.valid
        right = 1 / (1 + scaled_error(predictions["local_points"][..., 2].float(), targets)[valid] / self.half_right)
        doubt = F.binary_cross_entropy_with_logits(predictions["conf"][..., 0].float()[valid], right)
        return {"loss_conf": doubt}


def nearness(targets: Targets) -> Tensor:  # [B, S, H, W]
    """One over the depth, 0 where there is none."""
    return torch.where(targets.valid, 1 / targets.depth.clamp(min=1e-3), 0.0)


@torch.no_grad()
def scaled_error(
    depth: Tensor,  # [B, S, H, W]
    targets: Targets,
) -> Tensor:  # [B, S, H, W]
    """Relative error of depth after the median scale of each scene."""
    pairs = zip(depth, targets.depth, targets.valid, strict=True)
    scale = torch.stack([(truth[valid] / own[valid]).median() for own, truth, valid in pairs])
    return (scale[:, None, None, None] * depth - targets.depth).abs() * nearness(targets)


REFINEMENTS: Registry[type[Refinement]] = Registry("refinement", {"vggt": VGGTRefinement, "pi3": Pi3Refinement})
