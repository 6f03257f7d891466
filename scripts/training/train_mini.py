"""Train a mini checkpoint on procedural scenes.

    python scripts/training/train_mini.py                       # vggt-mini by the recipe of configs/train.yaml
    python scripts/training/train_mini.py network=pi3-mini
    python scripts/training/train_mini.py steps=200 out=runs/try
    python scripts/training/train_mini.py --config-name more init_from=models/checkpoints/vggt-mini.safetensors seed=19
    python scripts/training/train_mini.py network=pi3-mini init_from=models/checkpoints/vggt-mini.safetensors
    python scripts/training/train_mini.py --config-name heads init_from=models/checkpoints/vggt-mini.safetensors

Run it again with the same `out` and it resumes. `out` gets `last.pt` (everything needed to resume),
`model.safetensors` (averaged weights with configuration and provenance), `log.jsonl` and `curve.png`. `steps=0`
validates and writes the initial weights: for several checkpoints, their mean.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from curriculum import learning_rate, sample, stage_at
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS, checked_seeds, sample_batch
from geoaccel.eval.metrics.confidence import confidence_rank_correlation
from geoaccel.eval.metrics.depth import depth_errors
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from losses import normalise
from objectives import Weights
from training_run import Run


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, if the C library is glibc.

    Otherwise it returns large blocks to the kernel, which zeroes their pages again in every step: on two virtual cores
    that took more than a quarter of the time, and three fifths with 16 frames of 224 pixels.
    """
    trim_threshold, mmap_max = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def train_step(run: Run) -> dict[str, float]:
    cfg, device = run.cfg, run.device
    batch = sample(cfg, run.step, device)
    targets = normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, run.step)
    weights = Weights(**stage_at(cfg, run.step).weights)
    parts = run.objective(run.model, batch.images, targets, weights, autocast=run.autocast)
    parts["loss"].backward()
    norm = torch.nn.utils.clip_grad_norm_(run.parameters(), cfg.optimizer.clip)
    for optimizer in run.optimizers:
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.scenes += len(batch.images)
    run.average.update(run.model, run.step)
    return {name: float(value.detach()) for name, value in parts.items()} | {"grad_norm": float(norm)}


@torch.inference_mode()
def validate(run: Run) -> dict[str, float]:
    """Pose AUC of all pairs, and depth error and rank correlation of confidence as in the evaluation."""
    model, options = run.averaged(), run.cfg.validation
    errors, folded, depth_error, ranks = [], [], [], []
    for seed in checked_seeds(VALIDATION_SEEDS[: options.scenes], "choose weights by", "validation"):
        batch = sample_batch([seed], frames=options.frames, size=tuple(options.size), device=run.device)
        with torch.autocast(run.device.type, dtype=run.autocast, enabled=run.autocast is not None):
            predictions = model(batch.images)
        geometry = model.backbone.geometry(predictions, tuple(options.size))
        rotation, translation = relative_pose_errors(geometry.cam_from_world[0].cpu(), batch.cam_from_world[0].cpu())
        errors.append(rotation)
        folded.append(torch.maximum(rotation, translation))
        depth, truth, valid = geometry.depth[0].cpu(), batch.depth[0].cpu(), batch.valid[0].cpu()
        scored = depth_errors(depth, truth, mask=valid)
        relative = (scored["scale"] * depth - truth).abs() / truth.clamp(min=1e-6)
        depth_error.append(scored["abs_rel"])
        ranks.append(confidence_rank_correlation(geometry.conf[0].cpu(), relative, mask=valid))
    pooled = torch.cat(folded)
    return {
        "auc_30": auc(pooled, 30),
        "auc_5": auc(pooled, 5),
        "rotation_median_deg": float(torch.cat(errors).median()),
        "depth_abs_rel": sum(depth_error) / len(depth_error),
        "conf_spearman": sum(ranks) / len(ranks),
    }


def plot(log: Path, picture: Path) -> None:
    """Losses and validation scores over scenes."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [row for row in rows if "loss" in row]
    losses = ("camera", "relative", "patch", "match", "depth", "point", "conf")
    for name in (*(f"loss_{part}" for part in losses), "match"):
        points = [(row["scenes"], row[name]) for row in train if name in row]
        if points:
            left.plot(*zip(*points, strict=True), label=name, linewidth=1)
    scored = [row for row in rows if "auc_30" in row]
    for name in ("auc_30", "auc_5", "depth_abs_rel", "conf_spearman"):
        points = [(row["scenes"], row[name]) for row in scored if name in row]
        if points:
            right.plot(*zip(*points, strict=True), marker=".", label=name)
    # Losses with confidence may be negative.
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="scenes", title="training; match: share of right correspondences")
    right.set(xlabel="scenes", ylim=(0, 1), title="validation scenes, averaged weights")
    for axes in (left, right):
        if axes.get_lines():
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)  # hides no curve
        axes.locator_params(axis="x", nbins=6)  # six numbers fit next to each other
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


@hydra.main(version_base="1.3", config_path="pkg://geoaccel.configs", config_name="train")
def main(cfg: DictConfig) -> None:
    sys.exit(run_program("train_mini", partial(train, cfg), interrupted="the same command goes on from its last save"))


def train(cfg: DictConfig) -> None:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    run = Run(cfg)
    log = run.out / "log.jsonl"
    bar = tqdm(total=cfg.steps, initial=run.step, unit="step", dynamic_ncols=True)
    means: dict[str, list[float]] = {}
    began, began_scenes, shown = time.perf_counter(), run.scenes, time.perf_counter()
    while run.step < cfg.steps:
        for name, value in train_step(run).items():
            means.setdefault(name, []).append(value)
        bar.update()
        now = time.perf_counter()
        run.seconds += now - shown
        shown = now
        if run.step % 50 == 0:
            row: dict[str, Any] = {name: round(sum(v) / len(v), 5) for name, v in means.items()}
            rate = (run.scenes - began_scenes) / (now - began)
            append(log, {"step": run.step, "scenes": run.scenes, "scenes_per_s": round(rate, 2), **row})
            bar.set_postfix_str(f"{rate:.1f} scenes/s loss {row['loss']:.3f} match {row.get('match', 0):.2f}")
            means.clear()
        if run.step % cfg.validation.every == 0 or run.step == cfg.steps:
            bar.write(assess(run, log))
        if run.step % cfg.save_every == 0 or run.step == cfg.steps:
            run.save()
    if not (run.out / "model.safetensors").exists():  # no step was requested
        bar.write(assess(run, log))
    bar.close()


def assess(run: Run, log: Path) -> str:
    """Validate, and write the averaged weights, the scores and the curve; a line of scores to show."""
    scores = validate(run)
    append(log, {"step": run.step, "scenes": run.scenes, **{k: round(v, 4) for k, v in scores.items()}})
    run.export(scores)
    plot(log, run.out / "curve.png")
    return f"step {run.step}: " + "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def append(log: Path, row: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
