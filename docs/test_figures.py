"""`make docs-check`: documents show what was measured, on the weights that are in the package."""

from __future__ import annotations

import json
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
    assert capsys.readouterr().out.count("## ") == 8
    assert "| 9." in (tmp_path / "README.md").read_text()
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


@pytest.mark.parametrize("what", ["scored", "few_frames", "merged", "ablated", "quantized", "calibrated"])
def test_the_readme_shows_what_was_measured(what: str) -> None:
    shown = (ROOT / "README.md").read_text().splitlines()
    lines = getattr(mini_tables, what)()
    assert len(lines) > 4
    assert [line for line in lines if line not in shown] == [], "python scripts/figures/mini_tables.py prints them"


@pytest.mark.parametrize("model", MODELS)
def test_cards_show_what_was_measured(model: str) -> None:
    shown = (ROOT / "models" / "checkpoints" / f"{model}.md").read_text().splitlines()
    assert [line for line in mini_tables.card(model) if line not in shown] == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", MEASURED)
def test_figures_belong_to_the_weights_in_the_package(what: str, model: str) -> None:
    document = json.loads((ROOT / "benchmarks" / f"{what.format(model)}.json").read_text())
    assert document["weights"] == fingerprint(model), "python scripts/figures/measure_mini.py measures them anew"
