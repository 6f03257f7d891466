"""The training script, a run that is small enough, and a batch to train on."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import DictConfig, OmegaConf
from small_recipes import ROOT, SIZE, SMALL, SMALL_MODEL

from geoaccel.eval.data.synthetic import sample_batch
from losses import Targets, normalise


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


@pytest.fixture(scope="module")
def targets() -> Targets:
    batch = sample_batch([1_000_000, 1_000_001], frames=3, size=(SIZE, SIZE))
    return normalise(batch.cam_from_world, batch.intrinsics, batch.depth, batch.points_world, batch.valid)
