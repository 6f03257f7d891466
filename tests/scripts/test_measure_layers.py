"""What each layer does is measured against the dense model, and a row is there for each layer and method."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_recipes import SMALL_MODEL

import measure_layers
from geoaccel.models import build
from geoaccel.models.weights import save_model


def test_rows_of_a_small_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (tmp_path / "small").mkdir()
    path = tmp_path / "small" / "model.safetensors"
    small = SMALL_MODEL["vggt-mini"] | {"depth": 2, "dpt_layers": [0, 0, 1, 1], "heads": ["camera", "depth"]}
    save_model(build("vggt", **small), path, dtype=torch.float32)
    monkeypatch.setattr(measure_layers, "FRAMES", 3)
    monkeypatch.setattr(measure_layers, "SIZE", 56)
    out = tmp_path / "layers.json"
    monkeypatch.setattr("sys.argv", ["measure_layers.py", str(path), "--scenes", "2", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        measure_layers.main()
    assert not ended.value.code
    document = json.loads(out.read_text())
    rows = {row["what"]: row for row in document["rows"]}
    assert list(rows) == ["dense", "layer 0", "layer 1", *measure_layers.METHODS]
    assert {(row["model"], row["layers"]) for row in document["rows"]} == {("small", 2)}
    assert (document["frames"], document["scenes"]) == (3, 2)
    assert rows["dense"]["to_dense_deg"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert rows["layer 0"]["to_dense_deg"]["mean"] > 0
