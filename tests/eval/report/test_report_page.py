"""The page of the report, and its files: nothing in a name runs, nothing is fetched, nothing is left half written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from report_rows import ATTACK, SWEEP, read_html, report, row

from geoaccel.eval.report import (
    files,
    read_rows,
    write_report,
)
from geoaccel.eval.report.columns import columns
from geoaccel.eval.report.page import html_page


def test_nothing_in_a_name_becomes_a_tag() -> None:
    scenes = (
        {"scene": ATTACK, "category": '" onclick="x', "frames": 8, "auc_30": 0.5},
        {"scene": ATTACK, "failed": ATTACK},
    )
    names = dict.fromkeys(("model", "merging", "attention", "hardware", "command"), ATTACK)
    bad = row(**names, versions={ATTACK: ATTACK}, per_scene=scenes, skipped=(ATTACK,), failed=(ATTACK,))
    both = report(replace(bad, scores={ATTACK: 1.0}), row(), title=ATTACK, protocol=ATTACK)
    page = read_html(html_page(both, {}))
    assert page.count("script") == 1
    assert page.text.count(ATTACK) > 8
    assert not [attrs for _, attrs in page.tags if "onclick" in attrs]


def test_the_page_needs_nothing_else() -> None:
    text = html_page(report(*SWEEP), {"pareto.png": b"\x89PNG"})
    page = read_html(text)
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert addresses == ["data:image/png;base64,iVBORw=="]
    assert "http" not in text.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_every_scene_is_on_the_page() -> None:
    scenes = (
        {"scene": "a", "category": "cup", "frames": 8, "auc_30": 0.25, "auc_5": 0.125},
        {"scene": "b", "category": "cup", "frames": 8, "auc_30": None, "rra_30": 0.5},
        {"scene": "c", "failed": "no depth"},
    )
    page = read_html(html_page(report(row(per_scene=scenes), SWEEP[1]), {}))
    assert page.count("table") == 2
    assert page.count("tr") == (1 + 2) + (1 + 3)
    bars = [attrs for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "bar"]
    assert bars == [{"class": "bar", "style": "--share:25.0%", "data-value": "0.25"}]
    assert "failed: no depth" in page.text
    assert [attrs["colspan"] for _, attrs in page.tags if "colspan" in attrs] == ["4"]
    # What is sorted by is not what is printed: full precision, nothing where there is no value.
    speedups = [attrs["data-value"] for _, attrs in page.tags if attrs.get("data-value") == "2.0"]
    assert len(speedups) == 1
    dense = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "dense"]
    assert len(dense) == 1


# ---- Files


def test_all_files_are_written_and_old_plots_removed(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "for it"
    rows = [*SWEEP, *(replace(each, frames=32) for each in SWEEP)]
    written = write_report(folder, report(*rows))
    names = {"report.md", "report.csv", "report.json", "report.html", "pareto.png", "scaling.png"}
    assert {path.name for path in written} == {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("pareto.png", "scaling.png"))
    assert "scaling.png" in (folder / "report.md").read_text()
    assert read_html((folder / "report.html").read_text()).count("img") == 2
    assert (folder / "report.csv").read_bytes().count(b"\r\n") == 9
    write_report(folder, report(row()))
    assert {path.name for path in folder.iterdir()} == names - {"scaling.png"}
    assert "scaling.png" not in (folder / "report.md").read_text()
    with pytest.raises(ValueError, match="no rows"):
        write_report(folder, report())


def test_a_plot_that_fails_touches_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, report(row()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(figure: Figure) -> bytes:
        raise MemoryError

    monkeypatch.setattr(files, "png", fail)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(MemoryError):
            write_report(folder, report(*SWEEP))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, report(row(scores={})))
    before = (tmp_path / "report.csv").read_bytes()
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if "report.csv" in path.name:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path, report(row(scores={}), row(scores={})))
    assert (tmp_path / "report.csv").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    odd = row(model="m\udcff.pt", failed=("\udcff: no depth",), per_scene=({"scene": "\udcff", "failed": "no depth"},))
    write_report(tmp_path, report(odd, row()))
    assert "?: no depth" in (tmp_path / "report.html").read_text()
    assert read_rows(tmp_path)[0] == odd


def test_columns_name_what_they_hold() -> None:
    found = {column.name: column for column in columns(SWEEP)}
    assert found["speedup"].get(SWEEP[1]) == 2
    assert found["method"].get(SWEEP[1]) == "httm"
    assert not found["method"].is_number
    assert found["ratio"].is_number
    both = replace(SWEEP[1], quantization="fp8")
    assert both.method == "httm+fp8"
    assert row().is_dense
    assert not row(merging="frame-only").is_dense
    assert not row(quantization="fp8").is_dense
