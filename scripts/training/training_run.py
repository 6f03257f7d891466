"""A training run: the network, its optimizers and its averaged weights, saved so that it resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from deepen import copy_layers
from geoaccel.atomic import atomic_file, write_text
from geoaccel.errors import UserError
from geoaccel.models import build
from geoaccel.models.files import read_tensors, resolve
from geoaccel.models.layers.block import Block
from geoaccel.models.weights import history, load_model, save_model
from geoaccel.runtime import hardware
from objectives import OBJECTIVES
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
    """Everything that a step changes, and how to save it."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(wanted)
        self.autocast = None if cfg.dtype == "float32" else getattr(torch, cfg.dtype)
        torch.manual_seed(cfg.seed)
        self.model = first_weights(cfg).to(self.device).train()
        # On a CPU plain matrix products are faster in bfloat16; in float32 torch's fused attention is, by a fifth of a
        # step.
        kernel = "matmul" if self.device.type == "cpu" and self.autocast else "sdpa"
        objectives: dict[str, Any] = {"whole": OBJECTIVES, "heads": REFINEMENTS}
        objective = objectives[cfg.objective][self.model.backbone.name]
        self.objective = objective(self.model, kernel=kernel).to(self.device)
        if cfg.compile_blocks:
            compile_blocks(self.model)
        self.optimizers = self.make_optimizers()
        self.average = Average(self.model, cfg.optimizer.ema)
        self.step = 0
        self.scenes = 0
        self.seconds = 0.0
        self.hardware = [hardware(str(self.device))]
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
            if not hasattr(torch.optim, "Muon"):
                raise UserError(
                    f"optimizer.muon=true needs torch 2.9 or newer, this is {torch.__version__}; give false"
                )
            options = {"lr": opt.lr, "weight_decay": opt.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            made.append(torch.optim.Muon(hidden, **options))
        return made

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        found = [*self.model.parameters(), *self.objective.parameters()]
        return [parameter for parameter in found if parameter.requires_grad]

    def save(self) -> None:
        """Write under a temporary name first: a run killed here still has its last state."""
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.shadow,
            "step": self.step,
            "scenes": self.scenes,
            "seconds": self.seconds,
            "hardware": self.hardware,
            "config": OmegaConf.to_yaml(self.cfg),
        }
        with atomic_file(self.out / "last.pt") as temporary:
            torch.save(state, temporary)

    def restore(self) -> None:
        state = torch.load(self.out / "last.pt", map_location=self.device, weights_only=True)
        begun = OmegaConf.create(state["config"])
        # Steps, rates and stages may differ: a run can be extended.
        for key in ("network", "objective", "optimizer.muon", "init_from", "seed"):
            before, now = OmegaConf.select(begun, key), OmegaConf.select(self.cfg, key)
            if before != now:
                raise UserError(f"{self.out} was started with {key}={before}, not {now}; use that, or change out")
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.average.shadow = state["average"]
        self.step, self.scenes, self.seconds = state["step"], state["scenes"], state["seconds"]
        # A run resumed elsewhere was made on both machines.
        self.hardware = list(dict.fromkeys([*state["hardware"], *self.hardware]))
        # Steps logged after this state are repeated: the curve must not show them twice.
        log = self.out / "log.jsonl"
        if not log.exists():
            return
        rows = [line for line in log.read_text().splitlines() if self.happened(line)]
        write_text(log, "".join(f"{line}\n" for line in rows))

    def happened(self, line: str) -> bool:
        """Whether a line of the log is from an earlier step; the last line may be truncated."""
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except ValueError:
            return False

    def averaged(self) -> Any:
        """A second network with the averaged weights, for validation and shipping."""
        model = type(self.model)(self.model.config)
        model.load_state_dict(self.average.shadow)
        return model.to(self.device).eval()

    def export(self, scores: dict[str, float]) -> None:
        provenance = {
            "steps": self.step,
            "scenes": self.scenes,
            "hours": round(self.seconds / 3600, 2),
            "hardware": " and ".join(self.hardware),
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


def first_weights(cfg: DictConfig) -> Any:
    """The network before its first step: random, or as ``init_from`` says; of several checkpoints, their mean."""
    options: Any = OmegaConf.to_container(cfg.network, resolve=True)
    backbone = options.pop("backbone")
    sources: list[Any] = [load_model(name, dtype=torch.float32) for name in sources_of(cfg)]
    if not sources:
        return build(backbone, **options)
    given = sources[0]
    states = [source.state_dict() for source in sources]
    if any(source.config != given.config for source in sources):
        raise UserError(f"init_from={cfg.init_from}: different networks cannot be averaged; give checkpoints of one")
    given.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
    model = build(backbone, **options)
    if given.backbone.name != backbone:
        copy_trunk(given, model)  # type: ignore[arg-type]
    elif "depth" in options and given.config.depth != options["depth"]:
        copy_layers(given, model)  # type: ignore[arg-type]
    else:
        return given
    return model


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block for each new shape, without a limit on recompilations."""
    torch._dynamo.config.recompile_limit = 1024
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
