"""Train a mini checkpoint on procedural scenes.

    python scripts/training/train_mini.py                       # vggt-mini by the recipe of configs/train.yaml
    python scripts/training/train_mini.py network=pi3-mini
    python scripts/training/train_mini.py steps=200 out=runs/try
    python scripts/training/train_mini.py --config-name more init_from=models/checkpoints/vggt-mini.safetensors seed=19
    python scripts/training/train_mini.py network=pi3-mini init_from=models/checkpoints/vggt-mini.safetensors
    python scripts/training/train_mini.py --config-name heads init_from=models/checkpoints/vggt-mini.safetensors

Run it again with the same `out` and it continues where it was cut off. `out` gets `last.pt` (everything needed to
continue), `model.safetensors` (averaged weights with configuration and provenance), `log.jsonl` and `curve.png`.
`steps=0` validates and writes what it starts from: of several checkpoints their mean.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from geoaccel.errors import UserError, run_program
from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, VALIDATION_SEEDS, OrbitConfig, sample_batch
from geoaccel.eval.metrics.confidence import confidence_rank_correlation
from geoaccel.eval.metrics.depth import depth_errors
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.models import BACKBONES, build
from geoaccel.models.files import read_tensors, resolve
from geoaccel.models.layers.block import Block
from geoaccel.models.weights import history, load_model, save_model
from losses import normalise
from objectives import OBJECTIVES, Weights
from refinement import REFINEMENTS
from transfer import copy_trunk


class Average:
    """Exponential moving average of the weights; young averages forget faster."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: tensor.detach().clone().float() for name, tensor in model.state_dict().items()}

    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = list(self.shadow.values()), [t.detach().float() for t in model.state_dict().values()]
        torch._foreach_lerp_(own, new, 1 - decay)


class Run:
    """Everything that a step changes, and how to put it away."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(wanted)
        self.autocast = None if cfg.dtype == "float32" else getattr(torch, cfg.dtype)
        torch.manual_seed(cfg.seed)
        self.model = first_weights(cfg).to(self.device).train()
        # On a CPU plain products are faster in bfloat16; in float32 torch's fused attention is, by a fifth of a step.
        kernel = "matmul" if self.device.type == "cpu" and self.autocast else "sdpa"
        objective: Any = {"whole": OBJECTIVES, "heads": REFINEMENTS}[cfg.objective][self.model.backbone.name]
        self.objective = objective(self.model, kernel=kernel).to(self.device)
        if cfg.compile_blocks:
            compile_blocks(self.model)
        self.optimizers = self.make_optimizers()
        self.average = Average(self.model, cfg.optimizer.ema)
        self.step = 0
        self.scenes = 0
        self.seconds = 0.0
        if (self.out / "last.pt").exists():
            self.restore()

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW; with ``optimizer.muon`` the matrices of the blocks go to Muon, in steps as large as AdamW's."""
        opt = self.cfg.optimizer
        blocks = [module for module in self.model.modules() if isinstance(module, Block)]
        matrices = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2} if opt.muon else set()
        hidden = [p for p in self.parameters() if id(p) in matrices]
        decay = [p for p in self.parameters() if p.ndim > 1 and id(p) not in matrices]
        plain = [p for p in self.parameters() if p.ndim <= 1]
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [{"params": decay, "weight_decay": opt.weight_decay}, {"params": plain, "weight_decay": 0.0}],
                lr=opt.lr,
                betas=tuple(opt.betas),
                fused=True,
            )
        ]
        if hidden:
            options = {"lr": opt.lr, "weight_decay": opt.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            made.append(torch.optim.Muon(hidden, **options))
        return made

    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        found = [*self.model.parameters(), *self.objective.parameters()]
        return [parameter for parameter in found if parameter.requires_grad]

    def save(self) -> None:
        """Write under a temporary name first: a run that is killed here still has its last state."""
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.shadow,
            "step": self.step,
            "scenes": self.scenes,
            "seconds": self.seconds,
            "config": OmegaConf.to_yaml(self.cfg),
        }
        torch.save(state, self.out / "last.pt.tmp")
        os.replace(self.out / "last.pt.tmp", self.out / "last.pt")

    def restore(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
        begun = OmegaConf.create(state["config"])
        # Steps, rates and stages may be others: a run can be prolonged.
        for key in ("network", "objective", "optimizer.muon", "init_from", "seed"):
            before, now = OmegaConf.select(begun, key), OmegaConf.select(self.cfg, key)
            if before != now:
                raise UserError(f"{self.out} was begun with {key}={before}, not {now}; go on with that, or change out")
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.average.shadow = state["average"]
        self.step, self.scenes, self.seconds = state["step"], state["scenes"], state["seconds"]
        # What was logged after this state happens again: the curve must not show it twice.
        log = self.out / "log.jsonl"
        if not log.exists():
            return
        rows = [line for line in log.read_text().splitlines() if self.happened(line)]
        temporary = log.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in rows))
        os.replace(temporary, log)

    def happened(self, line: str) -> bool:
        """Whether a line of the log is of a step before this one; the last may have been cut off."""
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except ValueError:
            return False

    def averaged(self) -> nn.Module:
        """A second network with the averaged weights, for validation and shipping."""
        model = BACKBONES[self.model.backbone.name].network(**self.model.config)
        model.load_state_dict(self.average.shadow)
        return model.to(self.device).eval()

    def export(self, scores: dict[str, float]) -> None:
        provenance = {
            "steps": self.step,
            "scenes": self.scenes,
            "hours": round(self.seconds / 3600, 2),
            "hardware": hardware(self.device),
            "validation": scores,
            "torch": torch.__version__,
            "objective": self.cfg.objective,
        }
        sources = [json.loads(read_tensors(resolve(name))[1]["provenance"]) for name in sources_of(self.cfg)]
        provenance["source_provenance"] = history({"source_provenance": sources})
        save_model(self.averaged(), self.out / "model.safetensors", dtype=torch.bfloat16, provenance=provenance)


def sources_of(cfg: DictConfig) -> list[str]:
    """The checkpoints that a run starts from."""
    if not cfg.init_from:
        return []
    return [cfg.init_from] if isinstance(cfg.init_from, str) else list(cfg.init_from)


def first_weights(cfg: DictConfig) -> nn.Module:
    """The network before its first step: random, or as ``init_from`` says; of several checkpoints, their mean."""
    options = OmegaConf.to_container(cfg.network, resolve=True)
    backbone = options.pop("backbone")
    sources = [load_model(name, dtype=torch.float32) for name in sources_of(cfg)]
    if not sources:
        return build(backbone, **options)
    given = sources[0]
    states = [source.state_dict() for source in sources]
    if any(source.config != given.config for source in sources):
        raise UserError(f"init_from={cfg.init_from}: different networks have no mean")
    given.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    if given.backbone.name == backbone:
        return given
    model = build(backbone, **options)
    copy_trunk(given, model)
    return model


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block for each shape that comes, and never give up on a shape."""
    torch._dynamo.config.recompile_limit = 1024
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, where the C library is glibc.

    It would hand large blocks back to the kernel, which zeroes their pages anew in every step: on two virtual cores
    that took more than a quarter of the time, and three fifths with 16 frames of 224 pixels.
    """
    trim_threshold, mmap_max = -1, -4
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def hardware(device: torch.device) -> str:
    """What the run was made on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def stage_at(cfg: DictConfig, step: int) -> DictConfig:
    """The curriculum stage of a step."""
    return next(stage for stage in cfg.stages if step < stage.until * cfg.steps or stage.until >= 1)


def learning_rate(cfg: DictConfig, step: int) -> float:
    """Linear warm-up, the full rate for a share of the run, then a cosine."""
    opt = cfg.optimizer
    if step < opt.warmup:
        return opt.lr * (step + 1) / opt.warmup
    start = max(opt.warmup, opt.hold * cfg.steps)
    done = max(0.0, (step - start) / max(1, cfg.steps - start))
    return opt.final_lr + (opt.lr - opt.final_lr) * 0.5 * (1 + math.cos(math.pi * done))


def draw(cfg: DictConfig, step: int, device: torch.device) -> Any:
    """The batch of a step: number of frames, size, span and scenes depend on the step's number alone."""
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
        range(first, first + scenes),
        frames=frames,
        size=(height, width),
        device=device,
        orbit=OrbitConfig(span_deg=tuple(stage.span)),
        compile=cfg.compile,
    )


def train_step(run: Run) -> dict[str, float]:
    cfg, device = run.cfg, run.device
    batch = draw(cfg, run.step, device)
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
    """Pose AUC of all pairs, and depth error and rank correlation of confidence as evaluators score a scene."""
    model, options = run.averaged(), run.cfg.validation
    errors, folded, depth_error, ranks = [], [], [], []
    for seed in list(VALIDATION_SEEDS)[: options.scenes]:
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
    # Losses with a confidence in them may be negative.
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="scenes", title="training; match: share of right correspondences")
    right.set(xlabel="scenes", ylim=(0, 1), title="validation scenes, averaged weights")
    for axes in (left, right):
        if axes.get_lines():
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)  # hides no curve
        axes.locator_params(axis="x", nbins=6)  # six digits have room beside each other
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
    if not (run.out / "model.safetensors").exists():  # no step was asked for
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
