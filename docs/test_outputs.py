"""docs/outputs.md: what is said of the edge filter is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("scenes", ["validation", "report"])
def test_the_edge_filter(scenes: str) -> None:
    text = (ROOT / "docs" / "outputs.md").read_text()
    document = json.loads((ROOT / "benchmarks" / f"edge-filter-{scenes}.json").read_text())
    assert document["scenes"] == 32
    for model, found in document["percent"].items():
        before, after, lost = (
            "{mean:.2f} % ({low:.2f} to {high:.2f})".format(**found[name])
            for name in ("off_before", "off_after", "lost")
        )
        falls = f"{found['share_falls']:.1f} % | {found['number_falls']:.1f} %"
        row = (
            f"| {scenes} | `{model}` | {before} | {after} | {falls} | {lost} | {found['lost_of_known']['mean']:.1f} % |"
        )
        assert row in text, row
