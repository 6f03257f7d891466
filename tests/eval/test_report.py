"""The report: what it says, that it says all of it, and that nothing in it can be misread or run."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from geoaccel.eval.report import (
    Report,
    Row,
    files,
    json_line,
    merge_reports,
    read_report,
    read_rows,
    terminal_table,
    write_report,
)
from geoaccel.eval.report.columns import columns, three_digits
from geoaccel.eval.report.naming import labels, ordered
from geoaccel.eval.report.page import html_page
from geoaccel.eval.report.plots import plot_pareto
from geoaccel.eval.report.rows import from_json, to_json
from geoaccel.eval.report.scaling import plot_scaling
from geoaccel.eval.report.tables import markdown, to_csv

PROMISED = [
    *("auc_3", "auc_5", "auc_15", "auc_30", "depth_abs_rel", "chamfer", "latency_ms", "dense_latency_ms", "speedup"),
    *("peak_memory_gib", "effective_ratio", "frames", "scenes", "model", "merging", "quantization"),
]
ATTACK = "<script>alert(1)</script>"
SETTINGS: dict[str, Any] = {
    "model": "vggt-mini",
    "merging": "none",
    "quantization": "none",
    "attention": "sdpa",
    "dtype": "float32",
    "device": "cpu",
    "frames": 8,
    "scenes": 2,
    "scores": {"auc_30": 0.9, "auc_5": 0.5},
    "hardware": "2 CPU threads",
    "versions": {"torch": "2.6"},
    "command": "geoaccel eval data=synthetic",
}


def row(**known: Any) -> Row:
    return Row(**{**SETTINGS, **known})


def merged(name: str, ratio: float | None, auc: float, speedup: float | None, **known: Any) -> Row:
    times = {} if speedup is None else {"latency_ms": 100 / speedup, "dense_latency_ms": 100.0}
    scores = {"auc_30": auc, "auc_5": auc / 2}
    return row(merging=name, ratio=ratio, scores=scores, speedup=speedup, **{**times, **known})


def report(*rows: Row, **known: str) -> Report:
    return Report(**{"title": "Some runs", "made": "2025-01-02", "protocol": "pose vggt-co3d", **known}, rows=rows)


SWEEP = (
    row(speedup=1.0, latency_ms=100.0, dense_latency_ms=100.0),
    merged("httm", 0.6, 0.8, 2.0),
    merged("httm", 0.3, 0.85, 1.5),
    merged("come", 0.6, 0.7, 3.0),
)


def strict(text: str) -> Any:
    """Parse JSON as browsers do: without NaN and infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# ---- JSON


def test_json_line_keeps_the_contract() -> None:
    line = json_line(row(scores={"auc_30": math.nan, "rra_30": 0.25, "frames": 99.0}, speedup=math.inf))
    assert "\n" not in line
    found = strict(line)
    assert list(found)[:16] == PROMISED
    assert found["auc_30"] is None
    assert found["speedup"] is None
    assert found["chamfer"] is None
    assert found["frames"] == 8
    assert found["rra_30"] == 0.25
    assert "limit_share" not in found
    assert strict(json_line(row(limit_share=0.5)))["limit_share"] == 0.5


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    scene: Mapping[str, object] = {"scene": "a\udcff", "category": None, "frames": 8, "auc_30": 1 / 3}
    full = merged("httm", 0.5, 1 / 3, 1.75, per_scene=(scene,), skipped=("b: one frame",), failed=("c: NaN poses",))
    written = report(*SWEEP, full)
    write_report(tmp_path / "new", written)
    assert read_report(tmp_path / "new") == written
    assert read_rows(tmp_path / "new" / "report.json") == written.rows
    strict((tmp_path / "new" / "report.json").read_text())


def test_scores_that_are_not_finite_come_back_as_nan() -> None:
    text = to_json(report(row(scores={"auc_30": math.nan, "auc_5": -math.inf}, per_scene=({"auc_30": math.nan},))))
    strict(text)
    back = from_json(text).rows[0]
    assert all(math.isnan(value) for value in back.scores.values())
    assert back.per_scene == ({"auc_30": None},)
    assert back.number("auc_30") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', '"rows"'])
def test_other_files_are_no_reports(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=r"report\.json is not a report of this version") as caught:
        read_rows(tmp_path)
    assert "\n" not in str(caught.value)


def test_reports_are_joined(tmp_path: Path) -> None:
    odd = report(SWEEP[0], protocol="pose strict")
    for name, one in (("b", report(*SWEEP[:2])), ("a", report(*SWEEP[2:])), ("c", odd)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(to_json(one))
    folders = [tmp_path / "b", tmp_path / "a", tmp_path / "a" / ".." / "b"]
    joined = merge_reports(folders, title="both", made="today")
    assert joined == report(*SWEEP, title="both", made="today")
    with pytest.raises(ValueError, match="one protocol only"):
        merge_reports([tmp_path / "a", tmp_path / "c"], title="", made="")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere"):
        merge_reports([tmp_path / "nowhere"], title="", made="")
    with pytest.raises(ValueError, match="no reports to join"):
        merge_reports([], title="", made="")


# ---- Tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.8, "0.800"),
        (1, "1.00"),
        (0.9996, "1.00"),
        (-12.345, "-12.3"),
        (123.4, "123"),
        (999.6, "1000"),
        (45678.9, "45700"),
        (0.01234, "0.0123"),
        (0.00001234, "0.0000123"),
        (1.5e-9, "1.50e-09"),
        (2.5e8, "2.50e+08"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def header(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("| method"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_columns_are_there_where_values_are() -> None:
    assert header(markdown(report(row()))) == ["method", "AUC@5", "AUC@30"]
    nothing = row(scores={"auc_30": math.nan, "chamfer": math.inf})
    assert header(markdown(report(nothing))) == ["method"]
    many = header(markdown(report(row(), merged("httm", 0.5, 0.8, 2.0, frames=16, model="pi3-mini"))))
    assert many == ["method", "model", "frames", "ratio", "AUC@5", "AUC@30", "ms", "dense ms", "speedup"]
    scores = {"fidelity_rotation_deg": 1.0, "fidelity_layer_3": 0.5, "depth_abs_rel": 0.1, "chamfer": 0.2}
    found = header(markdown(report(row(scores=scores, peak_memory_gib=2.0, effective_ratio=0.4, limit_share=0.3))))
    assert found[:4] == ["method", "eff. ratio", "depth AbsRel", "points chamfer"]
    assert found[4:] == ["fidelity rotation", "limit share", "peak GiB"]


def test_markdown_rows() -> None:
    lines = markdown(report(*SWEEP), ["pareto.png"]).splitlines()
    assert lines[4:8] == [
        "| dense | - | 0.500 | 0.900 | 100 | 100 | 1.00x |",
        "| httm | 0.3 | 0.425 | 0.850 | 66.7 | 100 | 1.50x |",
        "| httm | 0.6 | 0.400 | 0.800 | 50.0 | 100 | 2.00x |",
        "| come | 0.6 | 0.350 | 0.700 | 33.3 | 100 | 3.00x |",
    ]
    for fact in (
        "- hardware: 2 CPU threads",
        "- versions: torch 2.6",
        "- scenes: 2",
        "- frames: 8",
        "- made: 2025-01-02",
    ):
        assert fact in lines
    assert "- protocol: pose vggt-co3d" in lines
    assert "- setup: sdpa attention, float32, cpu" in lines
    assert "    geoaccel eval data=synthetic" in lines
    assert "![pareto.png](pareto.png)" in lines


def test_names_cannot_break_markdown() -> None:
    text = markdown(report(row(failed=(f"{ATTACK} a|b\n# c: `why`",)), title="a\n# b"))
    assert r"- \<script\>alert(1)\</script\> a\|b # c: \`why\`" in text.splitlines()
    assert text.splitlines()[0] == "# a # b"


def test_csv_is_exact_and_holds_no_formulas() -> None:
    bad = row(
        scores={"auc_30": 1 / 3, "odd": math.nan}, failed=("=cmd|'/C calc': no depth",), skipped=("a: b", "c, d: e")
    )
    lines = list(csv.DictReader(io.StringIO(to_csv(report(bad, SWEEP[1])))))
    assert float(lines[0]["auc_30"]) == 1 / 3
    assert lines[0]["frames"] == "8"
    assert lines[0]["odd"] == lines[0]["speedup"] == lines[0]["auc_5"] == ""
    assert lines[0]["failed"] == "'=cmd|'/C calc': no depth"
    assert lines[0]["skipped"] == "a: b; c, d: e"
    assert lines[1]["auc_5"] == "0.4"
    assert (lines[1]["merging"], lines[1]["ratio"], lines[1]["speedup"]) == ("httm", "0.6", "2.0")
    assert (lines[1]["versions"], lines[1]["command"]) == ("torch 2.6", "geoaccel eval data=synthetic")


def test_the_terminal_table_is_aligned_and_fits() -> None:
    scores = dict.fromkeys(("auc_3", "auc_5", "auc_30", "depth_abs_rel", "chamfer", "end_to_end_ms"), 0.1234)
    scores |= {"fidelity_rotation_deg": 0.1, "fidelity_depth_abs_rel": 0.2}
    times = {"latency_ms": 10.0, "dense_latency_ms": 20.0, "speedup": 2.0, "limit_share": 0.5}
    memory = {"peak_memory_gib": 1.0, "dense_peak_memory_gib": 2.0}
    wide = merged("fastvggt", 0.5, 0.5, 2.0, effective_ratio=0.4, **memory)
    text = terminal_table(report(replace(wide, scores=scores, **times), row(frames=16)))
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("--"))
    assert max(map(len, lines)) <= 100
    ends = [i for i, c in enumerate(lines[rule] + " ") if c == " " and lines[rule][i - 1] == "-"]
    for line in (lines[rule - 1], *lines[rule + 1 : rule + 3]):
        assert all(line.ljust(102)[end : end + 2] == "  " for end in ends)
    assert [line.split()[0] for line in lines[rule + 1 : rule + 3]] == ["fastvggt", "dense"]
    left_out = next(line for line in lines if line.startswith("for want of room"))
    assert "end to end ms" in left_out
    assert "AUC@30" not in left_out
    assert "AUC@30" in lines[rule - 1]
    narrow = terminal_table(report(*SWEEP))
    assert "for want of room" not in narrow
    assert "httm      0.3  0.425   0.850  66.7    100    1.50x" in narrow.splitlines()


def test_the_terminal_shows_no_control_characters() -> None:
    text = terminal_table(report(row(failed=("a\x1b[2J\udcff: b",), skipped=tuple(f"s{i}: short" for i in range(12)))))
    assert "a?[2J?: b" in text
    assert "skipped (12)" in text
    assert "s9: short" in text
    assert "s10: short" not in text
    assert "and 2 more" in text


# ---- Scenes without scores


def test_skipped_and_failed_scenes_are_listed_everywhere() -> None:
    scenes = ({"scene": "y", "failed": "NaN poses"}, {"scene": "z", "failed": "no depth"})
    first = row(skipped=("x: one frame",), failed=("y: NaN poses",), per_scene=scenes)
    both = report(first, merged("httm", 0.5, 0.8, None, skipped=("x: one frame",)))
    plain = [markdown(both), terminal_table(both), " ".join(read_html(html_page(both, {})).text)]
    for text in plain:
        assert "x: one frame" in text
        assert "x: one frame (in" not in text
        assert text.count("y: NaN poses (in dense)") == 1
        assert "z: no depth (in dense)" in text
    assert next(csv.DictReader(io.StringIO(to_csv(both))))["failed"] == "y: NaN poses; z: no depth"
    assert "Failed" not in markdown(report(row()))


# ---- Order and names


def test_order_is_that_of_a_reader_and_stable() -> None:
    a, b = merged("httm", 0.5, 0.1, 2.0), merged("httm", 0.5, 0.2, 2.0)
    rows = [merged("httm", 0.5, 0.3, 2.0, frames=16), a, b, merged("come", 0.1, 0.8, 2.0), SWEEP[0]]
    assert ordered(rows) == [SWEEP[0], a, b, rows[3], rows[0]]
    assert ordered([b, a]) == [b, a]
    by_effect = [merged("httm", None, 0.5, 2.0, effective_ratio=ratio) for ratio in (0.7, 0.2)]
    assert ordered(by_effect) == by_effect[::-1]


def test_every_row_has_a_name_of_its_own() -> None:
    rows = [*SWEEP, *SWEEP, merged("httm", None, 0.1, 1.0), merged("httm", None, 0.1, 1.0, effective_ratio=0.25)]
    rows += [merged("httm", None, 0.1, 1.0, effective_ratio=0.5), row(quantization="fp8", frames=4)]
    names = labels(rows)
    assert len(set(names)) == len(rows)
    assert names[1] == "httm, ratio 0.6, 8 frames (1)"
    assert names[5] == "httm, ratio 0.6, 8 frames (2)"
    assert names[-2] == "httm, 8 frames, effective ratio 0.5"
    assert names[-1] == "fp8, 4 frames"
    assert labels([row(model="/a/b.pt"), row(model="/a/c.pt")]) == ["dense, b.pt", "dense, c.pt"]
    assert labels([row(model="/a/b.pt"), row(model="/c/b.pt")]) == ["dense, /a/b.pt", "dense, /c/b.pt"]


# ---- Page


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style") and data.strip():
            self.text.append(data.strip())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read_html(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


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


# ---- Plots


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """What was drawn: name to points, in data coordinates; lines across the whole panel are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axes.lines:
        if line.get_gid() and line.get_transform() == axes.transData:
            points = [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
            found.setdefault(str(line.get_gid()), []).extend(points)
    return found


def drawn(figure: Figure | None) -> list[dict[str, list[tuple[float, float]]]]:
    assert figure is not None
    return [curves(axes) for axes in figure.axes]


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_pareto_joins_the_ratios_of_a_method() -> None:
    figure = plot_pareto(SWEEP)
    assert drawn(figure) == [
        {"dense": [(1, 0.9)], "httm": [(1.5, 0.85), (2, 0.8)], "come": [(3, 0.7)]},
        {"dense": [(1, 0.5)], "httm": [(1.5, 0.425), (2, 0.4)], "come": [(3, 0.35)]},
    ]
    assert figure is not None
    assert figure.axes[0].get_ylabel() == "AUC@30 (higher is better)"
    assert figure.axes[1].get_ylabel() == "AUC@5 (higher is better)"
    assert words(figure.axes[0]) == ["dense", "0.3", "0.6", "0.6"]
    (star,) = (line for line in figure.axes[0].lines if line.get_gid() == "dense")
    assert star.get_marker() == "*"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "httm", "come"]
    colors = {line.get_color() for line in figure.axes[0].lines if line.get_gid()}
    assert len(colors) == 3


def test_pareto_joins_frame_counts_where_each_has_one_ratio() -> None:
    rows = [merged("httm", 0.5, auc, speed, frames=n) for auc, speed, n in ((0.8, 1.5, 8), (0.9, 2.0, 32))]
    rows += [row(frames=8), row(frames=32, scores={"auc_30": 0.95})]
    figure = plot_pareto(rows)
    assert figure is not None
    assert curves(figure.axes[0]) == {"dense": [(1, 0.9), (1, 0.95)], "httm": [(1.5, 0.8), (2, 0.9)]}
    assert words(figure.axes[0]) == ["8", "32", "8", "32"]


def test_frame_counts_and_models_get_panels_of_their_own() -> None:
    rows = [*SWEEP, *(replace(each, frames=32) for each in SWEEP)]
    figure = plot_pareto(rows)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["8 frames", "8 frames", "32 frames", "32 frames"]
    assert all(len(panel["httm"]) == 2 and len(panel["dense"]) == 1 for panel in drawn(figure))
    models = plot_pareto([*SWEEP, *(replace(each, model="$pi3$") for each in SWEEP)])
    assert models is not None
    assert [axes.get_title(loc="left") for axes in models.axes][1:3] == ["vggt-mini", r"\$pi3\$"]
    assert all(len(panel["httm"]) == 2 for panel in drawn(models))


def test_scores_that_are_missing_are_not_drawn() -> None:
    rows = [*SWEEP, merged("httm", 0.9, math.nan, 4.0), merged("litevggt", 0.5, 0.6, None)]
    figure = plot_pareto(rows)
    assert figure is not None
    assert len(curves(figure.axes[0])["httm"]) == 2
    assert "litevggt" not in curves(figure.axes[0])
    assert "not timed: litevggt, ratio 0.5" in figure.legends[0].get_title().get_text()
    lower = plot_pareto([replace(each, scores={"depth_abs_rel": 0.1, "fidelity_depth_abs_rel": 0.2}) for each in SWEEP])
    assert lower is not None
    names = [axes.get_ylabel() for axes in lower.axes]
    assert names == ["depth AbsRel against dense (lower is better)", "depth AbsRel (lower is better)"]


def test_without_timings_each_score_has_its_scale() -> None:
    rows = [row(), merged("httm", 0.5, 0.8, None), merged("come", 0.5, 0.7, None)]
    figure = plot_pareto(rows)
    assert drawn(figure)[0] == {"dense": [(0.9, 0)], "httm": [(0.8, 1)], "come": [(0.7, 2)]}
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels(rows)
    assert words(figure.axes[0]) == ["0.900", "0.800", "0.700"]


def test_one_row_is_no_curve() -> None:
    alone = plot_pareto([SWEEP[1]])
    assert drawn(alone) == [{"httm": [(0.8, 0)]}, {"httm": [(0.4, 0)]}, {"httm": [(2, 0)]}]
    assert alone is not None
    assert alone.axes[0].get_xlim()[0] == 0
    assert alone.axes[0].get_xlim()[1] >= 1
    assert plot_pareto([row(scores={})]) is None
    speeds = plot_pareto([replace(each, scores={}) for each in SWEEP])
    assert len(drawn(speeds)) == 2
    assert drawn(speeds)[0]["come"] == [(3, 3)]


def test_words_stand_clear_of_each_other() -> None:
    rows = [row(), *(merged("httm", i / 100, 0.9 - i / 1000, 1 + i / 50) for i in range(30))]
    figure = plot_pareto(rows)
    assert figure is not None
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    points = figure.axes[0].transData.transform(curves(figure.axes[0])["httm"])
    assert not any(box.contains(*point) for box in boxes for point in points)


def scaling_rows() -> list[Row]:
    rows = []
    for frames, dense, fast in ((8, 100.0, 80.0), (32, 800.0, 400.0)):
        memory = {"peak_memory_gib": frames / 8, "dense_peak_memory_gib": frames / 4}
        times = {"latency_ms": fast, "dense_latency_ms": dense, "speedup": dense / fast}
        rows.append(row(merging="httm", frames=frames, scores={}, **times, **memory))
    return rows


def test_scaling_over_frame_counts() -> None:
    figure = plot_scaling(scaling_rows())
    assert drawn(figure) == [
        {"dense": [(8, 100), (32, 800)], "httm": [(8, 80), (32, 400)]},
        {"httm": [(8, 1.25), (32, 2)]},
        {"dense": [(8, 2), (32, 8)], "httm": [(8, 1), (32, 4)]},
    ]
    assert figure is not None
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 3
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["8", "32"]
    reference = [line for line in figure.axes[1].lines if line.get_gid() == "dense"]
    assert [list(line.get_ydata()) for line in reference] == [[1, 1]]
    # The dense model's own row counts before what others were measured beside.
    own = [*scaling_rows(), row(frames=8, scores={}, latency_ms=90.0, dense_latency_ms=90.0)]
    assert drawn(plot_scaling(own))[0]["dense"] == [(8, 90), (32, 800)]


def test_every_ratio_has_a_line_of_its_shade() -> None:
    rows = [replace(each, ratio=ratio) for ratio in (0.3, 0.6) for each in scaling_rows()]
    figure = plot_scaling(rows)
    assert figure is not None
    assert drawn(figure)[1].keys() == {"httm, ratio 0.3", "httm, ratio 0.6"}
    shades = {str(line.get_gid()): line.get_color() for line in figure.axes[1].lines}
    assert shades["httm, ratio 0.6"] == "#0072b2"
    assert shades["httm, ratio 0.3"] > shades["httm, ratio 0.6"]
    assert "ratio 0.3, 0.6" in figure.legends[0].get_title().get_text()
    knobs = [replace(each, effective_ratio=ratio) for ratio in (0.2, 0.4) for each in scaling_rows()]
    assert {name: len(points) for name, points in drawn(plot_scaling(knobs))[1].items()} == {"httm": 2, "httm (2)": 2}


def test_one_frame_count_does_not_scale() -> None:
    assert plot_scaling(SWEEP) is None
    assert plot_scaling([*SWEEP, merged("httm", 0.5, 0.8, None, frames=32)]) is None


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
    with pytest.raises(OSError, match="No space"):
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
