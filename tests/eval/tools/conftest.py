"""A tiny checkpoint, and ``geoaccel quantize`` on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from geoaccel.cli import main
from geoaccel.models import build
from geoaccel.models.weights import save_model

SIZES: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8],
    "dpt_layers": [0, 0, 1, 1], "heads": ["camera", "depth", "point"], "layer_scale": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = build("vggt", **SIZES)
    with torch.no_grad():  # a random camera may have no field of view at all, and then no focal length
        network.camera_head.pose_branch.fc2.bias[-2:] = 1.0
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    save_model(network, path, dtype=torch.float32)
    return path


@pytest.fixture
def quantize(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def command(action: str, *args: Any, model: Path | str = source) -> tuple[int, str, str]:
        try:
            code = main(["quantize", action, "--model", str(model), *map(str, args)])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return command
