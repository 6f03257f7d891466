"""References that outputs are compared with (upstream's outputs, published names, images), and the relative error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from geoaccel.models import BACKBONES, build

N = TypeVar("N", bound=nn.Module)

DATA = Path(__file__).parent / "data"
REAL_SCENES = Path(__file__).resolve().parents[2] / "shared" / "data"

NEEDED_KNOBS: dict[str, dict[str, Any]] = {"come": {"predictor": "untrained"}, "asymmetric": {"keys": 1.5}}
"""By merging method, what it needs on networks for which nothing was trained, or on few frames."""

IDLE_KNOBS: dict[str, dict[str, Any]] = {
    "asymmetric": {"keys": 1000.0},
    "avggt": {"stride": 1, "frame_layers": 0},
}
"""By merging method, with what it merges nothing, where that is not ``ratio=0``."""


class Golden:
    """A golden file: upstream's outputs of a tiny random network.

    Args:
        name: Of the file.
        backbone: Whose network it is, where it is one.
    """

    def __init__(self, name: str, backbone: str = "") -> None:
        self.backbone = backbone
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata() or {}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        # Upstream has switches and repetitions besides that are fixed in our configuration.
        self.upstream_config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
        known = BACKBONES[backbone].config.names() if backbone else list(self.upstream_config)
        self.config = {name: value for name, value in self.upstream_config.items() if name in known}
        self.cases: dict[str, dict[str, Any]] = json.loads(metadata.get("cases", "{}"))
        self.weights = {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def network_of(self, kind: type[N]) -> N:
        """As :meth:`network`, of this class."""
        network = self.network()
        assert isinstance(network, kind)
        return network

    def network(self) -> nn.Module:
        """Ours, with the weights of the file; one of its own for each call."""
        return copy.deepcopy(self._network)

    @cached_property
    def _network(self) -> nn.Module:
        model = build(self.backbone, **self.config)
        model.load_state_dict(self.weights)
        return model.eval()

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def inputs(self, case: str) -> dict[str, Any]:
        """What a case of the file gives the network besides images."""
        given = self.cases[case].items()
        return {name: self.tensors.get(f"inputs.{key}", key) for name, key in given if name != "frames"}

    def compare(self, found: Mapping[str, Tensor], case: str) -> dict[str, float]:
        """Relative errors of predictions by name; dense maps are in the file on every third or fifth row and column."""
        errors = {}
        for key, expected in self.tensors.items():
            name = key.removeprefix(f"outputs.{case}.")
            step = {"_s3": 3, "_s5": 5}.get(name[-3:], 1)
            name = name if step == 1 else name[:-3]
            if key.startswith(f"outputs.{case}.") and name in found:
                value = found[name] if step == 1 else found[name][:, :, ::step, ::step]
                errors[name] = relative_error(value, expected)
        return errors


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, **options: Any) -> dict[str, Tensor]:
    """One forward."""
    return model(images, **options)


def golden_fixture(backbone: str) -> Callable[[], Golden]:
    """A fixture of the golden file of a backbone, one a module."""
    return pytest.fixture(scope="module")(lambda: Golden(f"{backbone}_tiny", backbone))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def key_list(name: str) -> dict[str, list[int]]:
    """Name and shape of every tensor of a published checkpoint."""
    rows = (line.split("\t") for line in (DATA / name).read_text().splitlines() if line.strip())
    return {key: [int(n) for n in shape.split("x")] for key, shape in rows}
