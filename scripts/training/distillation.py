"""Distillation of Co-Me's predictor: a frozen backbone ranks its own patches, and the predictor learns the order.

Every scene passes through the backbone once; the tokens at the tap and the confidence of every patch are stored, and
the predictor trains only on those. The loss compares pairs of patches from anywhere in the scene, so that outputs are
comparable between images.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import DenseMixer, ForwardState
from geoaccel.backbone import Backbone
from geoaccel.errors import UserError
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.confidence import ConfidencePredictor, Tap
from geoaccel.merging.method import MergingMixer


@dataclass(frozen=True)
class Lesson:
    """A training example from one scene; on the CPU.

    Attributes:
        patches: [S, h * w, C], the tokens at the tap.
        conf: [S, h, w], the backbone's confidence, the mean over the pixels of each patch.
    """

    patches: Tensor
    conf: Tensor


class Recorder:
    """Packer that records the patches it sees and merges nothing."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.patches: Tensor | None = None

    def __call__(self, x: Tensor, layout: TokenLayout, state: ForwardState) -> tuple[Tensor, Packing] | None:
        self.patches = x[:, :, layout.num_special :]
        return None


@torch.no_grad()
def observe(
    model: nn.Module,
    tap: Tap,
    images: Tensor,  # [1, S, 3, H, W]
) -> Lesson:
    """Run the backbone densely on one scene and record its tokens and confidence.

    Args:
        model: A backbone; its merging methods are removed during the call.
        tap: Where the predictor will read.
        images: Images of the scene.

    Raises:
        ValueError: If the confidence is not finite.
    """
    backbone: Backbone = model.backbone  # type: ignore[assignment]
    slots: list[Any] = [module for module in model.modules() if hasattr(module, "token_packer")]
    before = [slot.token_packer for slot in slots]
    sites: list[Any] = [site for sites in backbone.sites(model).values() for site in sites]
    merging = [(site, site.mixer) for site in sites if isinstance(site.mixer, MergingMixer)]
    recorder = Recorder(tap.layer)
    size = (images.shape[-2], images.shape[-1])
    try:
        for slot in slots:
            slot.token_packer = recorder
        for site, mixer in merging:
            site.mixer = DenseMixer(mixer.kernel)
        conf = backbone.geometry(model(images), size).conf
    finally:
        for slot, packer in zip(slots, before, strict=True):
            slot.token_packer = packer
        for site, mixer in merging:
            site.mixer = mixer
    if not conf.isfinite().all():
        raise UserError("the backbone's confidence is not finite on this scene; leave it out, or check its images")
    assert recorder.patches is not None
    patch_size = round((conf[0].numel() / recorder.patches[0, ..., 0].numel()) ** 0.5)
    # A copy, which must not keep the whole forward alive.
    patches = torch.empty_like(recorder.patches[0], device="cpu").copy_(recorder.patches[0])
    return Lesson(patches, F.avg_pool2d(conf[0], patch_size).cpu())


def ranking_loss(
    predicted: Tensor,  # [N]
    target: Tensor,  # [N]
    first: Tensor,  # [K], int64
    second: Tensor,  # [K], int64
) -> Tensor:  # []
    """Mean of softplus(-sign(t_a - t_b) * (p_a - p_b)) over pairs (a, b); ties have no gradient."""
    order = (target[first] - target[second]).sign()
    return F.softplus(-order * (predicted[first] - predicted[second])).mean()


def fit(
    predictor: ConfidencePredictor,
    lessons: Sequence[Lesson],
    *,
    steps: int,
    scenes: int = 4,
    pairs: int = 32_768,
    lr: float = 1e-3,
    final_lr: float = 1e-6,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> Iterator[float]:
    """Train in place with AdamW and a cosine schedule; yield the loss of every step.

    Every step samples scenes, and from each a random number of images in random order.

    Args:
        predictor: In float32.
        lessons: Scenes to learn from.
        steps: Steps.
        scenes: Scenes per step.
        pairs: Pairs of patches per scene, at most one for each patch.
        lr, final_lr: First and last learning rate.
        weight_decay: Weight decay of AdamW.
        seed: Seed of all sampling.

    Raises:
        ValueError: If there are no lessons.
    """
    if not lessons:
        raise ValueError("no scenes to learn from; give at least one")
    device = next(predictor.parameters()).device
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps), eta_min=final_lr)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    predictor.train()
    for _ in range(steps):
        losses = []
        for lesson in rng.choices(lessons, k=scenes):
            count = len(lesson.conf)
            frames = torch.randperm(count, generator=generator)[: rng.randint(min(2, count), count)]
            conf = lesson.conf[frames].float().to(device)
            patches = lesson.patches[frames].float().to(device)
            predicted = predictor(patches[None], (conf.shape[1], conf.shape[2])).flatten()
            shape = (2, min(pairs, conf.numel()))
            first, second = torch.randint(conf.numel(), shape, generator=generator).to(device)
            losses.append(ranking_loss(predicted, conf.flatten(), first, second))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield float(loss.detach())
    predictor.eval()


@torch.no_grad()
def predictions(predictor: ConfidencePredictor, lessons: Iterable[Lesson]) -> Iterator[Tensor]:
    """The predictor's output [S, h, w] for each lesson, in float32."""
    weight = next(predictor.parameters())
    for lesson in lessons:
        patches = lesson.patches.to(weight.device, weight.dtype)
        yield predictor(patches[None], (lesson.conf.shape[1], lesson.conf.shape[2]))[0]
