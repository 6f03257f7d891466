"""Visual tokens of a host's batch, from the order of its encoder to the order of their slots.

An encoder processes all images, then all videos. Prompts interleave them, and a plan is per prompt, so everything is
brought into the order of the slots, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.baselines import BASELINES, Baseline, VisionZip3D
from geoaccel.mllm.geometry import GeometryTokens
from geoaccel.mllm.merge3d import Merge3DConfig, plan_merge
from geoaccel.mllm.token_plan import TokenPlan

Method: TypeAlias = Merge3DConfig | Baseline
"""A reduction method: Merge3D, or one of :data:`geoaccel.mllm.BASELINES`, with its knobs."""

Geometry: TypeAlias = Tensor | GeometryTokens
"""[n, C] features, optionally with coordinates, one row per visual token in the order of the slots."""


@dataclass(frozen=True, eq=False)
class VisualSlots:
    """Slots of the visual tokens of a batch.

    Attributes:
        visual: [B, L], True for slots of visual tokens.
        is_image: [n], in the order of the slots: whether the slot belongs to an image rather than a video.
        order: [n], index of each slot's token in the order of the encoder: images first.
    """

    visual: Tensor
    is_image: Tensor
    order: Tensor

    @classmethod
    def of(
        cls,
        input_ids: Tensor,  # [B, L]
        image_id: int,
        video_id: int,
        found: Sequence[int],
    ) -> VisualSlots:
        """Slots of prompts, checked against the rows of the encoder.

        Args:
            input_ids: Prompts.
            image_id, video_id: Ids of placeholders.
            found: Numbers of rows for images and for videos.

        Raises:
            ValueError: If there are none, or the numbers of placeholders and rows differ.
        """
        visual = (input_ids == image_id) | (input_ids == video_id)
        is_image = input_ids[visual] == image_id
        images = int(is_image.sum())
        for what, slots, rows in zip(("image", "video"), (images, len(is_image) - images), found, strict=True):
            if slots != rows:
                raise UserError(
                    f"{slots} {what} placeholders in input_ids but {rows} {what} embeddings; give input_ids and pixels "
                    "from the same call of the processor"
                )
        if len(is_image) == 0:
            raise UserError("these inputs have no image or video, so there is nothing to reduce; generate as usual")
        order = torch.empty(len(is_image), dtype=torch.int64, device=input_ids.device)
        order[is_image] = torch.arange(images, device=order.device)
        order[~is_image] = torch.arange(images, len(order), device=order.device)
        return cls(visual, is_image, order)

    @property
    def cu_seqlens(self) -> Tensor:  # [B + 1]
        """Start of the visual tokens of each prompt."""
        return torch.tensor([0, *accumulate(self.visual.sum(dim=-1).tolist())])

    def arrange(
        self,
        x: Tensor,  # [n, ...], in the order of the encoder
    ) -> Tensor:  # [n, ...]
        """Reorder to the order of the slots."""
        return x.index_select(0, self.order.to(x.device))


def check_method(method: Any) -> None:
    """Refuse what is no method with its knobs, before anything runs or is hooked.

    Raises:
        UserError: Saying what is.
    """
    if not isinstance(method, Merge3DConfig | Baseline):
        raise UserError(
            f"config={method!r}: give a method with its knobs, Merge3DConfig(ratio=0.3) or, of the baselines, "
            f"BASELINES[NAME](ratio=0.3) with NAME one of {', '.join(BASELINES)}"
        )


def frame_numbers(
    grids: Sequence[Sequence[int]],
    merge: int,
) -> Tensor:  # [n], int64
    """Frame index of each token, in the order of the encoder, counted over all images and videos.

    Args:
        grids: (frames, height, width) in patches, of each image, then of each video.
        merge: Patches along the side of a token.
    """
    sizes = [height * width // merge**2 for frames, height, width in grids for _ in range(frames)]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def plan_slots(
    slots: VisualSlots,
    method: Method,
    *,
    scores: Tensor,  # [n], in the order of the encoder
    sem: Tensor,  # [n, ds], in the order of the encoder
    frame_of: Tensor,  # [n], in the order of the encoder
    geometry: Geometry | None,  # n rows, in the order of the slots
) -> TokenPlan:
    """A plan in the order of the slots, one sample for each prompt.

    VisionZip-3D uses the saliency of the geometry encoder if it is available.

    Raises:
        ValueError: If the numbers of rows and slots differ.
    """
    features, xyz = (geometry.features, geometry.xyz) if isinstance(geometry, GeometryTokens) else (geometry, None)
    if not isinstance(features, Tensor | None):
        raise UserError(
            f"geometry is a {type(features).__name__}; give what geometry_features returns, or a tensor [n, C] with "
            "one row a token, in the order of the prompts"
        )
    n, device = len(slots.order), sem.device
    for name, x in (("geometry features", features), ("saliency", scores), ("2D features", sem)):
        if x is not None and len(x) != n:
            raise ValueError(
                f"{len(x)} rows of {name} for {n} visual tokens; give one row per token, in the order of the prompts"
            )
    ranked = slots.arrange(scores.to(device))
    if isinstance(method, VisionZip3D) and isinstance(geometry, GeometryTokens) and geometry.scores is not None:
        ranked = geometry.scores.to(device)
    decide: Callable[..., TokenPlan] = method.plan if isinstance(method, Baseline) else _merge3d(method)
    return decide(
        ranked,
        slots.arrange(sem),
        None if features is None else features.to(device),
        cu_seqlens=slots.cu_seqlens,
        frame_of=slots.arrange(frame_of.to(device)),
        xyz=None if xyz is None else xyz.to(device),
    )


def _merge3d(config: Merge3DConfig) -> Callable[..., TokenPlan]:
    def plan(scores: Tensor, sem: Tensor, geo: Tensor | None, **beside: Tensor | None) -> TokenPlan:
        return plan_merge(scores, sem, geo, config, **beside)

    return plan
