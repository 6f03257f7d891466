"""The report in words and numbers: what it says, that it says all of it, and that nothing in it can be misread."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_rows import ATTACK, SWEEP, merged, read_html, report, row

from geoaccel.eval.report import (
    json_line,
    merge_reports,
    read_report,
    read_rows,
    terminal_table,
    write_report,
)
from geoaccel.eval.report.columns import three_digits
from geoaccel.eval.report.naming import labels, ordered
from geoaccel.eval.report.page import html_page
from geoaccel.eval.report.rows import from_json, knobs_of, to_json
from geoaccel.eval.report.scaling import method_curves
from geoaccel.eval.report.tables import markdown, to_csv

PROMISED = [
    *("auc_3", "auc_5", "auc_15", "auc_30", "depth_abs_rel", "chamfer", "latency_ms", "dense_latency_ms", "speedup"),
    *("peak_memory_gib", "effective_ratio", "frames", "scenes", "model", "merging", "quantization"),
]


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


def test_scores_that_are_no_numbers_are_left_out_of_the_line() -> None:
    """Names of the contract are always there."""
    found = strict(json_line(row(scores={"auc_30": math.nan, "rra_30": math.nan, "rta_30": 0.5})))
    assert "rra_30" not in found
    assert (found["auc_30"], found["rta_30"]) == (None, 0.5)


@pytest.mark.parametrize(("spread", "dense_spread", "says"), [(4.0, 5.0, None), (8.0, 5.0, 16), (1.0, 30.0, 30)])
def test_a_busy_machine_is_noted(spread: float, dense_spread: float, says: int | None) -> None:
    """The larger spread over its own median counts: of 50 and of 100 ms here."""
    spreads = {"auc_30": 0.8, "spread_ms": spread, "dense_spread_ms": dense_spread}
    written = report(row(), replace(merged("httm", 0.3, 0.8, 2.0), scores=spreads))
    note = f"times varied by {says} %: the machine was busy, and speedups are rough"
    for text in (markdown(written), terminal_table(written), html_page(written, {})):
        assert ("the machine was busy" in text) == (says is not None)
        assert (note in " ".join(text.split())) == (says is not None)
    assert "spread ms" in markdown(written)


def test_rows_that_differ_in_knobs_are_told_apart() -> None:
    """As they are typed, and only where rows of one method differ."""
    first, second, third = (
        merged("asymmetric", None, 0.8, 2.0, knobs={"asymmetric.stride": stride, "asymmetric.anchor": "true"})
        for stride in ("2", "3", "null")
    )
    other = merged("httm", 0.3, 0.8, 2.0, knobs={"httm.block": '"spatial"'})
    rows = (row(), first, second, third, other)
    named = ["asymmetric, stride=2", "asymmetric, stride=3", "asymmetric, stride=null"]
    assert labels(rows)[1:] == [*named, "httm, ratio 0.3"]
    written = report(*rows)
    for text in (markdown(written), terminal_table(written), html_page(written, {}), to_csv(written)):
        assert "stride=3" in text
    assert "anchor" not in markdown(written)
    assert "block" not in markdown(written)
    assert "anchor=true" in to_csv(written)
    assert "knobs" not in markdown(report(row(), first, other))
    old = replace(second, knobs={})  # of an earlier version, which says nothing of its knobs
    assert labels([row(), first, old])[1:] == ["asymmetric (1)", "asymmetric (2)"]
    paths = [replace(other, knobs={"httm.file": f'"/home/somebody/{name}"'}) for name in ("a", "b" * 50)]
    assert [label.partition(", file=")[2] for label in labels(paths)] == ["a", "b" * 32 + "..."]
    both = [replace(one, merging="come+asymmetric") for one in (first, second)]
    assert labels(both) == ["come+asymmetric, asymmetric.stride=2", "come+asymmetric, asymmetric.stride=3"]
    assert [label for _, label, _ in method_curves(ordered(rows))][:3] == named
    assert from_json(to_json(written)) == written


def test_knobs_of_methods() -> None:
    """A ratio stands in a column of its own, where it is one for all."""
    found = knobs_of({"httm": {"ratio": 0.3, "block": (1, 2)}}, {"fp8": {"search": None, "file": Path("a")}})
    assert found == {"httm.block": "[1, 2]", "fp8.search": "null", "fp8.file": '"a"'}
    assert not knobs_of({"come": {"ratio": 0.3}, "httm": {"ratio": 0.3}})
    different = {"come.ratio": "0.5", "httm.ratio": "0.3"}
    assert knobs_of({"come": {"ratio": 0.5}, "httm": {"ratio": 0.3}}) == different


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
    sweep = [replace(one, sitting="monday") for one in SWEEP]
    odd = report(sweep[0], protocol="pose strict")
    for name, one in (("b", report(*sweep[:2])), ("a", report(*sweep[2:])), ("c", odd)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(to_json(one))
    folders = [tmp_path / "b", tmp_path / "a", tmp_path / "a" / ".." / "b"]
    joined = merge_reports(folders, title="both", made="today")
    assert joined == report(*sweep, title="both", made="today")
    with pytest.raises(ValueError, match="with the same protocol"):
        merge_reports([tmp_path / "a", tmp_path / "c"], title="", made="")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere"):
        merge_reports([tmp_path / "nowhere"], title="", made="")
    with pytest.raises(ValueError, match="no reports to join"):
        merge_reports([], title="", made="")


@pytest.mark.parametrize("other", ["tuesday", ""])
def test_times_of_different_runs_are_not_joined(other: str, tmp_path: Path) -> None:
    """Those of no known run are of another one; rows that were not timed join any."""
    for name, sitting in (("a", "monday"), ("b", other)):
        (tmp_path / name).mkdir()
        rows = [replace(one, sitting=sitting) for one in SWEEP]
        (tmp_path / name / "report.json").write_text(to_json(report(*rows)))
    with pytest.raises(ValueError, match=r"/a and .*/b were timed in different runs; time all rows") as caught:
        merge_reports([tmp_path / "a", tmp_path / "b"], title="", made="")
    assert "\n" not in str(caught.value)
    scored = report(merged("httm", 0.3, 0.8, None))
    (tmp_path / "b" / "report.json").write_text(to_json(scored))
    assert len(merge_reports([tmp_path / "a", tmp_path / "b"], title="", made="").rows) == len(SWEEP) + 1
    (tmp_path / "a" / "report.json").write_text(to_json(report(*SWEEP)))  # as files without a sitting are read
    assert len(merge_reports([tmp_path / "a", tmp_path / "b"], title="", made="").rows) == len(SWEEP) + 1


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
    left_out = next(line for line in lines if line.startswith("for lack of space"))
    assert "end to end ms" in left_out
    assert "AUC@30" not in left_out
    assert "AUC@30" in lines[rule - 1]
    narrow = terminal_table(report(*SWEEP))
    assert "for lack of space" not in narrow
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
