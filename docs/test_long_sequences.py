"""docs/long-sequences.md and docs/results/deeper-mini.md: tables are what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "long-sequences-report.json").read_text())
TEXT = (ROOT / "docs" / "long-sequences.md").read_text()


def percent(errors: list[float]) -> str:
    return ", ".join(f"{error:.2f}" for error in errors) + " %"


def test_paths() -> None:
    assert len(MEASURED["paths"]) == 12
    for row in MEASURED["paths"]:
        cells = [
            f"{row['path']}, seed {row['seed']}, `{row['model']}`",
            f"{row['wide']} of {row['wide'] + row['wide_rejected']}",
            f"{row['loops']} of {row['loops'] + row['loops_rejected']}",
            percent(row["open_ate_percent"]),
            percent(row["ate_percent"]),
        ]
        assert f"| {' | '.join(cells)} |" in TEXT, cells


def angles(found: dict[str, float]) -> str:
    return f"{found['pose_deg']:.1f}"


def test_against_one_forward() -> None:
    rows: dict[int, dict[str, Any]] = {}
    for row in MEASURED["against_one_forward"]:
        rows.setdefault(row["seed"], {})[row["model"]] = row
    assert len(rows) == 4
    for seed, of_model in rows.items():
        vggt, pi3 = of_model["vggt-mini"], of_model["pi3-mini"]
        cells = [f"seed {seed}", *(angles(vggt[name]) for name in ("windows", "shuffled")), angles(pi3["windows"])]
        cells += [angles(one[name]) for one in (vggt, pi3) for name in ("windows to truth", "dense to truth")]
        assert f"| {' | '.join(cells)} |" in TEXT, cells


def test_the_deeper_mini() -> None:
    text = (ROOT / "docs" / "results" / "deeper-mini.md").read_text()
    log = (ROOT / "benchmarks" / "deeper-mini-training.jsonl").read_text().splitlines()
    scored = [row for row in map(json.loads, log) if "auc_30" in row]
    shown = [row for row in scored if f"after {row['scenes']:,} scenes |" in text]
    assert len(shown) == 4
    for row in shown:
        scores = f"{row['auc_30']:.3f} | {row['auc_5']:.3f} | {row['depth_abs_rel']:.4f} | {row['conf_spearman']:.3f}"
        assert f"after {row['scenes']:,} scenes | {scores} |" in text, scores
    assert shown[-1] is scored[-1]


def spread(found: dict[str, float], digits: int) -> str:
    return "{mean:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**found, d=digits)


def test_layers_of_the_deeper_mini() -> None:
    text = (ROOT / "docs" / "results" / "deeper-mini.md").read_text()
    rows = json.loads((ROOT / "benchmarks" / "layers-deeper-mini.json").read_text())["rows"]
    assert len(rows) == (1 + 4 + 5) + (1 + 12 + 5)
    for row in rows:
        scores = [spread(row["auc_30"], 3), spread(row["auc_5"], 3), spread(row["to_dense_deg"], 1)]
        (line,) = (line for line in text.splitlines() if f"| {' | '.join(scores)} |" in line)
        name = {"dense": "none"}.get(row["what"], row["what"])
        assert name in line or f"`{row['model']}`" in line, line
