"""docs/long-sequences.md and docs/results/deeper-mini.md: tables are what was measured."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "benchmarks" / "long-sequences-report.json").read_text())
TEXT = (ROOT / "docs" / "long-sequences.md").read_text()
WORDS = " ".join(TEXT.split())


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


def against(model: str) -> dict[int, list[dict[str, Any]]]:
    """By seed: windows of 32 and of 60."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in MEASURED["against_one_forward"]:
        if row["model"] == model:
            found.setdefault(row["seed"], []).append(row)
    for rows in found.values():
        assert [row["window"] for row in rows] == [32, 60]
    return found


def degrees(row: dict[str, Any], *names: str) -> list[float]:
    return [row[name]["pose_deg"] for name in names]


def yardsticks() -> list[list[float]]:
    """Of each loop: between orders, then what windows differ and its ratio to that, for 32 and for 60."""
    found = []
    for rows in against("vggt-mini").values():
        (between,) = {row["between orders"]["pose_deg"] for row in rows}
        found.append([between])
        for row in rows:
            apart = degrees(row, "windows")[0] if row["pieces"] == 1 else math.inf
            found[-1] += [apart, apart / between]
    return found


def yardstick_line(name: str, values: list[float]) -> str:
    cells = [
        f"{x:.{digits}f}" if x < math.inf else {1: "two pieces", 2: "-"}[digits]
        for x, digits in zip(values, (1, 1, 2, 1, 2), strict=True)
    ]
    return f"| {name} | {' | '.join(cells)} |"


def test_against_one_forward() -> None:
    rows = yardsticks()
    seeds = list(against("vggt-mini"))
    assert seeds == list(range(8192, 8200))
    for seed, values in zip(seeds, rows, strict=True):
        assert yardstick_line(f"seed {seed}", values) in TEXT, values
    columns = [list(column) for column in zip(*rows, strict=True)]
    assert yardstick_line("median", [statistics.median(column) for column in columns]) in TEXT
    means = []
    for apart in (1, 3):
        whole = [values for values in rows if values[apart] < math.inf]
        means.append(statistics.mean(values[apart] for values in whole))
        means.append(means[-1] / statistics.mean(values[0] for values in whole))
    assert yardstick_line("mean", [statistics.mean(columns[0]), *means]) in TEXT
    largest = [max(ratio for ratio in columns[place] if ratio < math.inf) for place in (2, 4)]
    assert f"the largest ratio of a loop is {largest[0]:.2f} and {largest[1]:.2f}" in WORDS


def test_against_the_order_of_the_path() -> None:
    first = []
    for place in (0, 1):
        found = [rows[place] for rows in against("vggt-mini").values()]
        ratios = [
            degrees(row, "windows to the first order")[0] / degrees(row, "between orders")[0]
            if row["pieces"] == 1
            else math.inf
            for row in found
        ]
        first.append(f"{statistics.median(ratios):.2f}")
    assert f"the order of the path it is {first[0]} and {first[1]} in the median" in WORDS


def test_to_the_truth() -> None:
    vggt, pi3 = against("vggt-mini"), against("pi3-mini")
    assert vggt.keys() == pi3.keys()
    for seed in pi3:
        cells = [f"seed {seed}"]
        for rows in (vggt[seed], pi3[seed]):
            truth = [row["windows to truth"] if row["pieces"] == 1 else None for row in rows]
            truth.append(rows[0]["dense to truth"])
            cells += ["two pieces" if one is None else f"{one['pose_deg']:.1f}" for one in truth]
        assert f"| {' | '.join(cells)} |" in TEXT, cells
    for row in (row for rows in pi3.values() for row in rows):
        assert row["between orders"]["most_pose_deg"] < 0.01  # in another order it answers the same


def test_lengths_of_windows() -> None:
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in MEASURED["against_one_forward_validation"]:
        rows.setdefault(row["window"], []).append(row)
    assert [(window, len(own)) for window, own in rows.items()] == [(window, 8) for window in (32, 48, 60, 64, 96)]
    ratios = [[degrees(row, "windows")[0] / degrees(row, "between orders")[0] for row in own] for own in rows.values()]
    truth = [statistics.mean(degrees(row, "windows to truth")[0] for row in own) for own in rows.values()]
    for name, values in (
        ("ratio, median of the loops", [f"{statistics.median(own):.2f}" for own in ratios]),
        ("ratio, largest", [f"{max(own):.2f}" for own in ratios]),
        ("to the truth, mean of the loops", [f"{mean:.1f}" for mean in truth]),
    ):
        assert f"| {name} | {' | '.join(values)} |" in TEXT, values
    dense = statistics.mean(degrees(row, "dense to truth")[0] for row in rows[32])
    assert f"one forward is {dense:.1f} degrees from the truth in the mean" in WORDS


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
