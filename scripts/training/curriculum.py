"""Curriculum of a training run: the batch and the learning rate of each step."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from omegaconf import DictConfig

from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, OrbitConfig, checked_seeds, sample_batch


def stage_at(cfg: DictConfig, step: int) -> DictConfig:
    """The curriculum stage of a step."""
    return next(stage for stage in cfg.stages if step < stage.until * cfg.steps or stage.until >= 1)


def learning_rate(cfg: DictConfig, step: int) -> float:
    """Linear warm-up, the full rate for a fraction of the run, then a cosine."""
    opt = cfg.optimizer
    if step < opt.warmup:
        return opt.lr * (step + 1) / opt.warmup
    start = max(opt.warmup, opt.hold * cfg.steps)
    done = max(0.0, (step - start) / max(1, cfg.steps - start))
    return opt.final_lr + (opt.lr - opt.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def sample(cfg: DictConfig, step: int, device: torch.device) -> Any:
    """The batch of a step: number of frames, size, span and scenes depend only on the step's index."""
    stage = stage_at(cfg, step)
    rng = random.Random(cfg.seed * 1_000_003 + step)
    height, width = rng.choice(list(stage.sizes))
    patches = (height // 14) * (width // 14)
    least, most = stage.frames
    most = max(least, min(most, stage.tokens // patches))
    allowed = [n for n in stage.get("among") or range(least, most + 1) if least <= n <= most]
    frames = rng.choice(allowed or [least])
    scenes = max(1, stage.tokens // (frames * patches))
    first = FIRST_TRAIN_SEED + cfg.seed * 1_000_000_000 + step * 1024
    return sample_batch(
        checked_seeds(range(first, first + scenes), "train on", "training"),
        frames=frames,
        size=(height, width),
        device=device,
        orbit=OrbitConfig(span_deg=tuple(stage.span)),
        compile=cfg.compile,
    )
