"""Train Co-Me's confidence predictor for a checkpoint.

    python scripts/training/train_confidence.py model=vggt-mini out=shipped   # on rendered scenes; a minute on one core
    python scripts/training/train_confidence.py model=facebook/VGGT-1B images=photos out=vggt-1b-come.safetensors
    python scripts/training/train_confidence.py model=yyfz233/Pi3 images=photos frames=16 steps=2000

Use the file with `CoMe(predictor="vggt-1b-come.safetensors")`; predictors of models in the package are found
automatically. The last line on stdout is JSON: Spearman's rank correlation between the predicted and the model's own
confidence over groups of patches, on held-out scenes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from distillation import Lesson, fit, observe, predictions
from geoaccel.errors import UserError, run_program
from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, VALIDATION_SEEDS, checked_seeds, sample_batch
from geoaccel.eval.metrics.confidence import spearman
from geoaccel.images import is_photograph, load_images, natural_key
from geoaccel.merging.confidence import SHIPPED, ConfidencePredictor, Tap, save_predictor
from geoaccel.merging.groups import default_group, group_means
from geoaccel.models.files import list_models
from geoaccel.models.weights import load_model
from geoaccel.runtime import pick_device


def scenes(cfg: DictConfig, model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Seeds or lists of image files, for training and for validation."""
    if cfg.images is None:
        first = FIRST_TRAIN_SEED + (1000 + cfg.seed) * 1_000_000_000
        learn = checked_seeds(range(first, first + cfg.scenes), "train on", "training")
        return learn, checked_seeds(VALIDATION_SEEDS[: cfg.held_out], "judge predictors by", "validation")
    folder = Path(cfg.images).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"images={cfg.images} is not a folder; give one with images or subfolders of images")
    found: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*"), key=natural_key):
        if is_photograph(path):
            found.setdefault(path.parent, []).append(path)
    clips = [files[i : i + cfg.frames] for files in found.values() for i in range(0, len(files), cfg.frames)]
    clips = [clip for clip in clips if len(clip) > 1]
    if len(clips) < 2:
        raise UserError(
            f"images={cfg.images} holds {sum(map(len, found.values()))} images, which make {len(clips)} clips of "
            f"2 to {cfg.frames}; at least 2 clips are needed, one for training and one for validation"
        )
    held_out = clips[::5]
    return [clip for clip in clips if clip not in held_out], held_out


def observed(cfg: DictConfig, model: nn.Module, tap: Tap, chosen: list[Any], what: str) -> Iterator[Lesson]:
    """One lesson per scene."""
    weight = next(model.parameters())
    for scene in tqdm(chosen, desc=what, unit="scene", dynamic_ncols=True):
        if isinstance(scene, int):
            images: Tensor = sample_batch([scene], frames=cfg.frames, size=tuple(cfg.size), device=weight.device).images
        else:
            images = load_images(scene, model.preprocess).images[None]  # type: ignore[arg-type]
        yield observe(model, tap, images.to(weight.device, weight.dtype))


def rank_correlations(predictor: ConfidencePredictor, lessons: list[Lesson]) -> list[float]:
    """Over the groups of each scene."""
    found = []
    for conf, lesson in zip(predictions(predictor, lessons), lessons, strict=True):
        group = default_group((conf.shape[1], conf.shape[2]))
        found.append(spearman(group_means(conf[None], group), group_means(lesson.conf[None], group)))
    return found


def destination(cfg: DictConfig) -> Path:
    """The output file; ``out=shipped`` replaces the one in the package for its model."""
    if cfg.out != "shipped":
        return Path(cfg.out or f"{Path(cfg.model).stem}-come.safetensors").expanduser()
    if cfg.model not in list_models():
        raise UserError(f"out=shipped is only for the models of the package, {', '.join(list_models())}; name a file")
    return SHIPPED / f"{cfg.model}.safetensors"


def train(cfg: DictConfig) -> dict[str, Any]:
    """Record, train, validate and save.

    Raises:
        ValueError: For invalid settings.
    """
    if not cfg.model:
        raise UserError(f"model=null: name a checkpoint: {', '.join(list_models())}, a hub id or a file")
    for name, least in (("scenes", 1), ("frames", 2), ("held_out", 1), ("steps", 1), ("batch", 1), ("pairs", 1)):
        if cfg[name] < least:
            raise UserError(f"{name}={cfg[name]}: give at least {least}")
    out = destination(cfg)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"out={out}: there is no folder {out.parent}; create it first")
    device = pick_device(cfg.device)
    wide = cfg.dtype == "float32" or (cfg.dtype == "auto" and not device.startswith("cuda"))
    model = load_model(cfg.model, device=device, dtype=torch.float32 if wide else torch.bfloat16)
    tap = Tap.of(model, cfg.tap)
    began = time.perf_counter()
    learn, judge = scenes(cfg, model)
    lessons = list(observed(cfg, model, tap, learn, "observing"))
    unseen = list(observed(cfg, model, tap, judge, "held out"))
    torch.manual_seed(cfg.seed)
    predictor = ConfidencePredictor(tap, cfg.hidden).to(device)
    options = {name: cfg[name] for name in ("steps", "pairs", "lr", "final_lr", "weight_decay", "seed")}
    bar = tqdm(fit(predictor, lessons, scenes=cfg.batch, **options), total=cfg.steps, desc="training", unit="step")
    for loss in bar:
        bar.set_postfix_str(f"loss {loss:.3f}")
    correlations = rank_correlations(predictor, unseen)
    report = {
        "model": str(cfg.model),
        "spearman": round(sum(correlations) / len(correlations), 4),
        "spearman_worst": round(min(correlations), 4),
        "scenes": len(lessons),
        "held_out": len(unseen),
        "steps": cfg.steps,
        "parameters": sum(parameter.numel() for parameter in predictor.parameters()),
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    save_predictor(predictor, out, {**report, "torch": torch.__version__})
    return {**report, "out": str(out)}


@hydra.main(version_base="1.3", config_path="pkg://geoaccel.configs", config_name="confidence")
def main(cfg: DictConfig) -> None:
    sys.exit(run_program("train_confidence", lambda: print(json.dumps(train(cfg)))))


if __name__ == "__main__":
    main()
