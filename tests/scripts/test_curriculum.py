"""What each step of training sees, and the recipes in configs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from small_recipes import ROOT, SMALL_MODEL

from geoaccel.models import build
from objectives import Weights


@pytest.mark.parametrize("name", sorted(SMALL_MODEL))
def test_minis_have_five_to_eight_million_parameters(name: str) -> None:
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "network" / f"{name}.yaml"))
    with torch.device("meta"):
        model = build(options.pop("backbone"), **options)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 8e6


@pytest.mark.parametrize("recipe", ["train", "heads", "gpu", "more"])
@pytest.mark.parametrize("network", sorted(SMALL_MODEL))
def test_every_recipe_is_complete(script: ModuleType, recipe: str, network: str) -> None:
    with initialize_config_module("geoaccel.configs", version_base="1.3"):
        cfg = compose(recipe, overrides=[f"network={network}", "out=here"])
    shares = [stage.until for stage in cfg.stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for step in (0, cfg.steps - 1):
        Weights(**script.stage_at(cfg, step).weights)
        assert 0 < script.learning_rate(cfg, step) <= cfg.optimizer.lr


def test_stages_follow_each_other_and_the_rate_falls(script: ModuleType, config: DictConfig) -> None:
    config.steps = 1000
    shares = [script.stage_at(config, step).until for step in range(1000)]
    assert shares == sorted(shares)
    assert set(shares) == {stage.until for stage in config.stages}
    rates = [script.learning_rate(config, step) for step in range(1000)]
    assert max(rates) == pytest.approx(config.optimizer.lr)
    assert rates[0] < rates[config.optimizer.warmup - 1]
    assert rates[-1] == pytest.approx(config.optimizer.final_lr, rel=0.05)
    held = rates[config.optimizer.warmup : int(1000 * config.optimizer.hold)]
    assert set(held) == {config.optimizer.lr}
    assert rates[int(1000 * config.optimizer.hold) + 50] < config.optimizer.lr


def test_large_pictures_come_in_fewer_frames(script: ModuleType, config: DictConfig) -> None:
    config.stages[0].update({"tokens": 64, "sizes": [[56, 56]], "frames": [2, 24]})
    counts = {script.sample(config, step, torch.device("cpu")).images.shape[:2] for step in range(12)}
    assert max(frames for _, frames in counts) <= 4
    assert all(scenes * frames <= 4 for scenes, frames in counts)


def test_numbers_of_frames_can_be_listed(script: ModuleType, config: DictConfig) -> None:
    config.stages = [{"until": 1.0, "tokens": 96, "sizes": [[56, 56]], "frames": [2, 24], "among": [2, 5, 12],
                      "span": [30, 90]}]  # fmt: skip
    counts = {script.sample(config, step, torch.device("cpu")).images.shape[1] for step in range(12)}
    assert counts == {2, 5}
    config.stages[0].update({"among": [12]})
    assert script.sample(config, 0, torch.device("cpu")).images.shape[1] == 2
