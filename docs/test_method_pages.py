"""`make docs-check`: the pages of docs/methods/ say what the code says and show what it does and what was measured."""

from __future__ import annotations

from itertools import chain

import pytest

import method_pages
import token_pictures
from geoaccel.merging import MERGING
from table_parts import MODELS, ROOT, read
from token_plans import LOOKS, look

LARGEST = 150_000
"""Bytes of a picture."""

SAME = 0.95
"""Share of the patches that are as in the picture: of two targets that are equally like, processors differ on one."""

OVERVIEW = (ROOT / "docs" / "methods.md").read_text()


def test_every_method_has_a_page() -> None:
    ours = {name for name, method in MERGING.items() if method.__module__.startswith("geoaccel.")}
    assert set(method_pages.ORDER) == set(LOOKS) == ours
    assert {path.stem for path in method_pages.FOLDER.glob("*.md")} == ours
    for name in ours:
        assert f"[`{name}`](methods/{name}.md)" in OVERVIEW
        assert f"      - methods/{name}.md\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("name", method_pages.ORDER)
def test_tables_are_those_of_the_code_and_of_the_figures(name: str) -> None:
    text = method_pages.page(name).read_text()
    parts = method_pages.parts(name)
    assert text.count("<!-- end of ") == len(parts)
    for part, lines in parts.items():
        assert method_pages.shown(text, part) == lines, "run python scripts/figures/method_pages.py --write"


def test_markers_that_are_missing_are_said() -> None:
    with pytest.raises(ValueError, match="no markers for its knobs"):
        method_pages.filled("# A page\n", "knobs", "| a |\n")


@pytest.mark.parametrize("name", method_pages.ORDER)
def test_pictures_show_what_the_method_does(name: str) -> None:
    path = method_pages.FOLDER / f"{name}.png"
    assert path.stat().st_size <= LARGEST
    assert f"]({name}.png)" in method_pages.page(name).read_text()
    now, kept = token_pictures.said(look(name)), token_pictures.kept(name)
    assert [list(row) for row in now] == [list(row) for row in kept]
    for row, before in zip(now, kept, strict=True):
        for part, values in row.items():
            equal = sum(one == other for one, other in zip(values, before[part], strict=True))
            assert equal >= SAME * len(values), f"run python scripts/figures/token_pictures.py {name}"
    assert any(values for values in chain(*(row.values() for row in kept)))


def test_a_picture_of_a_method_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["token_pictures.py", "htm"])
    with pytest.raises(ValueError, match="Did you mean 'httm'"):
        token_pictures.main()


def test_what_the_pages_say_beside_their_tables() -> None:
    """`asymmetric` moves cameras least; `alike` costs less than `come`; what is said of few frames and of targets."""
    for model in MODELS:
        for count, rows in read("merging-{}-frames-report.json")[model]["frames"].items():
            effects = {row["variant"]: row["effects"] for row in rows if row["variant"] != "dense"}
            if not effects.keys() >= set(method_pages.ORDER):
                continue

            def mean(name: str, what: str, effects: dict[str, dict[str, dict[str, float]]] = effects) -> float:
                return effects[name][what]["mean"]

            assert min(method_pages.ORDER, key=lambda name: mean(name, "pose_median_deg")) == "asymmetric"
            worst = max(method_pages.ORDER, key=lambda name: mean(name, "depth_abs_rel_rise"))
            assert worst == "come"
            assert mean("alike", "auc_30_loss") < mean("come", "auc_30_loss")
            assert min((row["keys"], row["variant"]) for row in rows)[1] == "avggt"
            if model == "vggt-mini" and int(count) >= 8:
                random = mean("litevggt, random targets", "auc_5_loss")
                assert random < mean("litevggt", "auc_5_loss")
            if model == "vggt-mini" and int(count) <= 16:
                assert mean("alike", "speedup") > mean("fastvggt", "speedup")
                assert mean("alike", "auc_30_loss") < mean("fastvggt", "auc_30_loss")
