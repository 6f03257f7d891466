"""The notebook runs from top to bottom, and says what it promises; its cells are kept without outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

NOTEBOOK = json.loads((Path(__file__).parent / "first-steps.ipynb").read_text())


def test_the_notebook_runs(tmp_path: Path) -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    script = tmp_path / "cells.py"
    # What a cell ends with is shown.
    text = "\n\n".join("".join(cell["source"]) for cell in cells)
    script.write_text(text.replace("\ndense\n", "\ndense._repr_html_()\n"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "merging in global attention: Asymmetric" in done.stdout
    assert "accelerated: " in done.stdout
    page = Path(done.stdout.split("open ")[1].strip())
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert (page.parent / "scene" / "points.ply").stat().st_size > 0
