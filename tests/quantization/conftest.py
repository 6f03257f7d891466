"""A float checkpoint of every backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from geoaccel.models.weights import save_model


@pytest.fixture
def source(tiny: nn.Module, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_model(tiny, folder / "float.safetensors", dtype=torch.float32, provenance={"steps": 3})
    return folder / "float.safetensors"
