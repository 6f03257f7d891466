"""References that outputs are compared with (upstream's outputs, published names, images), and the relative error."""

from __future__ import annotations

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from geoaccel.models import build

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
        self.config: dict[str, Any] = json.loads(metadata.get("config", "{}"))
        self.weights = {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def key_list(name: str) -> dict[str, list[int]]:
    """Name and shape of every tensor of a published checkpoint."""
    rows = (line.split("\t") for line in (DATA / name).read_text().splitlines() if line.strip())
    return {key: [int(n) for n in shape.split("x")] for key, shape in rows}
