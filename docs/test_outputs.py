"""docs/outputs.md: what is said of the edge filter and of known positions is what was measured."""

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


GIVEN = {
    "true": "true positions",
    "far": "2 of 8 wrong by the extent",
    "near": "2 of 8 wrong by 0.3 of it",
    "one_distance": "`--scale` of the two farthest cameras",
}


def scale(of_scenes: list[float]) -> str:
    return "{:.1f} % ({:.1f})".format(*of_scenes)


def test_known_positions() -> None:
    text = (ROOT / "docs" / "outputs.md").read_text()
    plain, refined = (
        json.loads((ROOT / "benchmarks" / f"positions-{name}.json").read_text())
        for name in ("report", "refined-report")
    )
    assert plain["scenes"] == refined["scenes"] == 32
    for model in ("vggt-mini", "pi3-mini"):
        for kind, words in GIVEN.items():
            cells = []
            for document in (plain, refined):
                found = document["percent"][model]
                if kind == "one_distance":
                    cells += ["", scale(found[kind])]
                else:
                    cells += [f"{found[f'{kind}/moved'][0]:.1f} %", scale(found[f"{kind}/scale"])]
            first = f"`{model}`" if kind == "true" else ""
            row = " | ".join([first, words, *cells])
            assert " ".join(f"| {row} |".split()) in " ".join(text.split()), row
    apart = [refined["percent"][model]["apart"][0] for model in ("vggt-mini", "pi3-mini")]
    assert "they stand {:.1f} and {:.1f} %".format(*apart) in text.replace("\n", " ")
    for model in ("vggt-mini", "pi3-mini"):
        before, after = (
            "{mean:.3f} ({low:.3f} to {high:.3f})".format(**document["percent"][model]["auc_5"])
            for document in (plain, refined)
        )
        assert f"from {before} to {after}" in text.replace("\n", " ")


def test_wrong_positions_are_named() -> None:
    text = (ROOT / "docs" / "outputs.md").read_text()
    shares = []
    for name in ("report", "refined-report"):
        found = json.loads((ROOT / "benchmarks" / f"positions-{name}.json").read_text())["percent"]
        shares.append([found[model][f"{kind}/named"] for model in found for kind in ("far", "near")])
    assert f"in {min(shares[0]):.0f} to {max(shares[0]):.0f} %" in text
    assert f"({min(shares[1]):.0f} to {max(shares[1]):.0f} %)" in text
