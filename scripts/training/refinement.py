"""Refinement of depth and confidence: only the dense heads of a trained network are trained further.

The losses are those of :mod:`scored_losses`.

VGGT's confidence comes from the depth head, which is therefore trained, too, in the cameras' unit of length. pi3's has
a separate decoder, so its points are frozen: trained further on their own they did not improve (pi3-mini, 320 steps:
AbsRel from 0.054 to 0.057).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoaccel.models.pi3 import Pi3
from geoaccel.models.vggt import VGGT
from geoaccel.registry import Registry
from losses import Targets
from objectives import Narrow, Objective, Parts, Weights, use_kernel
from scored_losses import graded_confidence_loss, relative_depth_losses


class Refinement(Objective):
    """Refinement common to both backbones.

    Args:
        model: Everything except its dense heads is frozen.
        kernel: Attention kernel of the training.
    """

    heads: tuple[str, ...]
    """Trainable modules."""

    def __init__(self, model: Any, *, kernel: str = "sdpa") -> None:
        super().__init__()
        use_kernel(model, kernel)
        model.requires_grad_(False)
        for name in self.heads:
            model.get_submodule(name).requires_grad_(True)

    def parts(self, model: Any, images: Tensor, targets: Targets, weights: Weights, narrow: Narrow) -> Parts:
        """Of ``weights`` only ``dense`` counts."""
        with narrow():
            return {name: weights.dense * part for name, part in self.dense_losses(model, images, targets).items()}

    def dense_losses(self, model: Any, images: Tensor, targets: Targets) -> Parts:
        """Losses of the trainable heads."""
        raise NotImplementedError


class VGGTRefinement(Refinement):
    """Depth and its confidence, coupled as upstream."""

    heads = ("depth_head",)

    def dense_losses(self, model: VGGT, images: Tensor, targets: Targets) -> Parts:
        features, start = model.aggregator(images, keep=model.config.dpt_layers)
        depth, conf = model.depth_head(features, images, start, None)
        return relative_depth_losses(depth[..., 0].float(), conf.float(), targets)


class Pi3Refinement(Refinement):
    """Only confidence: the expected accuracy of each point."""

    heads = ("conf_decoder", "conf_head")

    def dense_losses(self, model: Pi3, images: Tensor, targets: Targets) -> Parts:
        found = model(images)
        depth, logits = found["local_points"][..., 2].float(), found["conf"][..., 0].float()
        return {"loss_conf": graded_confidence_loss(depth, logits, targets)}


REFINEMENTS: Registry[type[Refinement]] = Registry("refinement", {"vggt": VGGTRefinement, "pi3": Pi3Refinement})
