"""`make docs-check`: documents show what was measured, on the weights that are in the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import mini_tables
from geoaccel.models.files import fingerprint

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("vggt-mini", "pi3-mini")
MEASURED = (
    "scores-{}",
    "merging-{}-64frames",
    "merging-{}-frames-report",
    "merging-{}-frames-photographs",
    "depth-{}-frames-validation",
    "quantization-{}",
    "quantization-{}-five-sets",
    "sensitivity-{}",
)


def test_tables_are_put_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {path.relative_to(ROOT): path.read_text() for path in mini_tables.places()}
    for path, text in shown.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text.replace("| 0.", "| 9.").replace("| -0.", "| +0.").replace(" (0.", " (9."))
        assert (tmp_path / path).read_text() != text
    monkeypatch.setattr(mini_tables, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["mini_tables.py"])
    mini_tables.main()
    assert capsys.readouterr().out.count("## ") == 17
    assert "| 9." in (tmp_path / "docs" / "checkpoints.md").read_text()
    monkeypatch.setattr("sys.argv", ["mini_tables.py", "--write"])
    mini_tables.main()
    written = {path: (tmp_path / path).read_text().splitlines() for path in shown}
    for path, makers in mini_tables.places().items():
        for make in makers.values():
            assert set(make()) <= set(written[path.relative_to(tmp_path)])
    with pytest.raises(ValueError, match=r"0 tables with the column AUC@30 and the row `vggt-mini`, `fp8` , not one"):
        mini_tables.filled("| a | b |\n|---|---|\n| c | d |\n", mini_tables.quantized())
    with pytest.raises(ValueError, match="2 tables"):
        mini_tables.filled("\n\n".join(2 * ["\n".join(mini_tables.quantized())]), mini_tables.quantized())


PLACES = [(path.relative_to(ROOT), title) for path, tables in mini_tables.places().items() for title in tables]


@pytest.mark.parametrize(("path", "title"), PLACES, ids=[title for _, title in PLACES])
def test_documents_show_what_was_measured(path: Path, title: str) -> None:
    shown = (ROOT / path).read_text().splitlines()
    lines = mini_tables.places()[ROOT / path][title]()
    assert len(lines) > 4
    assert [line for line in lines if line not in shown] == [], "python scripts/figures/mini_tables.py prints them"


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    """Links of all documents are paths that exist, or addresses."""
    assert len((ROOT / "README.md").read_text().split()) <= 900
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} leads to {target}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", MEASURED)
def test_figures_belong_to_the_weights_in_the_package(what: str, model: str) -> None:
    document = json.loads((ROOT / "benchmarks" / f"{what.format(model)}.json").read_text())
    assert document["weights"] == fingerprint(model), "python scripts/figures/measure_mini.py measures them anew"
