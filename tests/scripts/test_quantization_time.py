"""Times of quantized forwards: in turns, medians, over the dense one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantization_time


class Clock(nn.Module):
    """Takes as long as it is told, on a clock of its own."""

    now = 0.0

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.seconds = list(seconds)

    def forward(self, images: torch.Tensor) -> None:
        Clock.now += self.seconds.pop(0)


def test_medians_of_turns_without_the_first(monkeypatch: Any) -> None:
    monkeypatch.setattr(quantization_time.time, "process_time", lambda: Clock.now)
    models: dict[str, nn.Module] = {"dense": Clock(9, 1, 2, 3), "fp8": Clock(9, 5, 4, 40)}
    assert quantization_time.processor_seconds(models, torch.zeros(1), 3) == {"dense": 2, "fp8": 5}


def test_the_file_holds_what_is_printed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rows = {"dense": {"cpu_s": 2.0, "over_dense": 1.0}, "fp8": {"cpu_s": 3.0, "over_dense": 1.5}}
    threads = torch.get_num_threads()
    monkeypatch.setattr(quantization_time, "measure", lambda name, rounds: rows)
    quantization_time.main(["vggt-mini", "--out", str(tmp_path / "t.json")])
    assert "| `vggt-mini`, `fp8` | 3.00 | 1.50 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == {"vggt-mini": rows}
    assert torch.get_num_threads() == threads
