"""Depth and confidence of a network whose cameras are finished: only its dense heads go on learning.

The losses are those of :mod:`scored_losses`.

VGGT's confidence comes out of the head of its depth, which therefore learns too, in the cameras' unit of length. pi3's
has a decoder of its own, so that points stay what the whole network made of them: learning on alone they came no closer
(pi3-mini, 320 steps: AbsRel from 0.054 to 0.057).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.models.pi3 import Pi3
from geoaccel.models.vggt import VGGT
from geoaccel.registry import Registry
from losses import Targets
from objectives import Weights, use_kernel, with_total
from scored_losses import graded_confidence_loss, relative_depth_losses


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

    def parts(self, model: VGGT, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        features, start = model.aggregator(images, keep=model.config.dpt_layers)
        depth, conf = model.depth_head(features, images, start, None)
        return relative_depth_losses(depth[..., 0].float(), conf.float(), targets)


class Pi3Refinement(Refinement):
    """Confidence alone: how right each point is expected to be."""

    heads = ("conf_decoder", "conf_head")

    def parts(self, model: Pi3, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        found = model(images)
        depth, logits = found["local_points"][..., 2].float(), found["conf"][..., 0].float()
        return {"loss_conf": graded_confidence_loss(depth, logits, targets)}


REFINEMENTS: Registry[type[Refinement]] = Registry("refinement", {"vggt": VGGTRefinement, "pi3": Pi3Refinement})
