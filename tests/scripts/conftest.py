"""The training script, and a run that is small enough."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf
from small_recipes import ROOT, SMALL, SMALL_MODEL


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return importlib.import_module("train_mini")


@pytest.fixture(params=sorted(SMALL_MODEL))
def config(tmp_path: Path, request: pytest.FixtureRequest) -> DictConfig:
    """The recipe as hydra composes it, made small."""
    model = OmegaConf.merge(
        OmegaConf.load(ROOT / "configs" / "network" / f"{request.param}.yaml"), SMALL_MODEL[request.param]
    )
    recipe = OmegaConf.load(ROOT / "configs" / "train.yaml")
    cfg = OmegaConf.merge(recipe, SMALL, {"out": str(tmp_path / "run"), "network": model})
    for stage in cfg.stages:
        stage.tokens, stage.sizes, stage.frames = 64, [[56, 56]], [2, 3]
    return cfg
