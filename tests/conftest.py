"""Switches of the test suite, and tiny networks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as cores: each keeps to one, and so do the processes that its tests start. Before torch is read.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from safetensors import safe_open
from torch import Tensor, nn

from geoaccel.models import BACKBONES, build

DATA = Path(__file__).parent / "data"
REAL_SCENES = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption("--gpu", action="store_true", help="also run tests marked gpu")
    parser.addoption("--weights", action="store_true", help="also run tests marked weights")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in ("slow", "gpu", "weights"):
        if not config.getoption(f"--{mark}"):
            skip = pytest.mark.skip(reason=f"run with --{mark}")
            for item in items:
                if mark in item.keywords:
                    item.add_marker(skip)


class Golden:
    """A golden file: upstream's outputs of a tiny random network."""

    def __init__(self, name: str) -> None:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
        self.weights = {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


@pytest.fixture(scope="session", params=sorted(BACKBONES))
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden file of every backbone."""
    return Golden(f"{request.param}_tiny")


@pytest.fixture
def tiny(golden: Golden) -> nn.Module:
    """Every backbone at a tiny size with upstream's random weights."""
    name = "vggt" if "aggregator.camera_token" in golden.weights else "pi3"
    model = build(name, **golden.config)
    model.load_state_dict(golden.weights)
    return model.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def key_list(name: str) -> dict[str, list[int]]:
    """Name and shape of every tensor of a published checkpoint."""
    rows = (line.split("\t") for line in (DATA / name).read_text().splitlines() if line.strip())
    return {key: [int(n) for n in shape.split("x")] for key, shape in rows}
