"""What the demo advises can be pasted into a shell."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import run


def test_folders_with_blanks_are_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {"auc_30": 1.0, "auc_5": 1.0, "rotation_median_deg": 0.0, "depth_abs_rel": 0.0}
    trial: dict[str, Any] = {"name": "dense", "scores": scores, "runs": 3, "latency_s": 1.0, "spread_s": 0.0}
    trial |= {"effective_ratio": None, "effective_key_ratio": None, "peak_memory_gib": 1.0}
    result = SimpleNamespace(trials=[SimpleNamespace(**trial)], points=1, kept_share=1.0, files=[])
    monkeypatch.setattr("geoaccel.eval.tools.demo.run_demo", lambda *_, **__: result)
    out = tmp_path / "my demo"
    code, said, err = run(capsys, "demo", "--out", out)
    assert code == 0, err
    assert shlex.split(next(line for line in said.splitlines() if "geoaccel view" in line))[-1] == str(out)
    again = shlex.split(next(line for line in said.splitlines() if "the same from files" in line))
    assert again[again.index("reconstruct") + 1] == str(out / "photos")
