"""The table of merging over frame counts: measured scene by scene, gone on with, and put together as it is scored."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_checkpoint

import frame_tables
import measure_frames
from frame_picture import picture
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS
from geoaccel.eval.metrics.pose_protocols import PROTOCOLS, PairErrors
from geoaccel.merging import MERGING, Asymmetric
from geoaccel.merging.layers import Layers
from geoaccel.models.weights import load_model
from geoaccel.quantization import QUANTIZATION
from geoaccel.registry import make
from geoaccel.tuned import TunedPlan, of_weights
from merging_variants import DENSE, FREE, GROUPS, NAMED, base, chosen

Measure = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("vggt", tmp_path_factory.mktemp("weights")))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny.jsonl"


@pytest.fixture
def measure(checkpoint: str, out: Path) -> Measure:
    def measure(*names: str, seeds: dict[int, list[int]] | None = None) -> list[dict[str, Any]]:
        wanted = chosen(list(names))
        return list(measure_frames.measure(checkpoint, seeds or {3: [1000]}, wanted, out, size=(28, 28)))

    return measure


def about(lines: list[dict[str, Any]]) -> list[tuple[int, int, str]]:
    return [(line["frames"], line["seed"], line["variant"]) for line in lines]


def test_each_run_is_a_line_and_the_same_command_goes_on(
    measure: Measure, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    answer = measure_frames.predicted
    monkeypatch.setattr(
        measure_frames, "predicted", lambda m, images: forwards.append(images.shape[1]) or answer(m, images)
    )
    first = measure("httm", "asymmetric, stride=2")
    assert forwards == [2, 3, 3, 3]  # a forward that warms up, and one for each line
    assert about(first) == [(3, 1000, DENSE), (3, 1000, "httm"), (3, 1000, "asymmetric, stride=2")]
    assert measure_frames.read_lines(out) == first
    assert measure("httm", "asymmetric, stride=2") == []
    # Killed while it wrote the last line, it measures that one anew, and nothing that follows is lost.
    text = out.read_text()
    out.write_text(text[:-40])
    assert about(measure("httm", "asymmetric, stride=2")) == [(3, 1000, "asymmetric, stride=2")]
    more = measure("httm", seeds={3: [1000, 1001], 2: [1000, 1001]})
    assert about(more) == [(n, s, v) for n, s in ((2, 1000), (3, 1001), (2, 1001)) for v in (DENSE, "httm")]
    assert len(measure_frames.read_lines(out)) == 9
    made = measure_frames.made_by
    monkeypatch.setattr(measure_frames, "made_by", lambda *given: {**made(*given), "code": "another"})
    assert about(measure("httm")) == [(3, 1000, DENSE), (3, 1000, "httm")]


def test_a_line_says_what_was_measured(measure: Measure) -> None:
    dense, merged, half = measure("httm", "asymmetric, stride=2")
    assert dense["merging"] == {}
    assert merged["merging"] == {"httm": {"bypass": False}}
    assert half["merging"] == {"asymmetric": {"stride": 2, "bypass": False}}
    for line in (dense, merged, half):
        assert len(line["pairs_deg"]) == 3
        for degrees in (30, 5, 3):
            of_pairs = frame_tables.auc(torch.tensor(line["pairs_deg"]), degrees)
            assert line[f"auc_{degrees}"] == pytest.approx(of_pairs, abs=1e-6)
        assert line["dense_cpu_s"] == dense["cpu_s"] > 0 < line["cpu_s"]
        assert {"code", "processor", "threads"} <= line["made_by"].keys()
        assert line["depth_abs_rel"] > 0
    assert all(dense[key] == 0 for key in frame_tables.DISTANCES)
    assert all(merged[key] > 0 for key in ("pose_deg", "pose_median_deg", "depth_rel", "points"))
    assert dense["predicted_speedup"] is None
    assert merged["predicted_speedup"] > 0 < half["predicted_speedup"]
    assert (dense["queries"], dense["keys"]) == (1, 1)
    assert merged["queries"] < 1 > merged["keys"]
    # 28 pixels are two patches a side: of 3 x 9 tokens the 5 special ones of each frame, 4 patches of the first one and
    # 2 of each other stay keys.
    assert (half["queries"], half["keys"]) == (1, pytest.approx((15 + 4 + 2 * 2) / 27))


def test_a_plan_is_measured_as_it_stands(measure: Measure, checkpoint: str, tmp_path: Path) -> None:
    layers = {"0": None, "1-": Asymmetric(stride=2, min_gain=1.0)}  # a gain that would not let it act
    depth = load_model(checkpoint).trunk.global_blocks  # type: ignore[union-attr, operator]
    weights = of_weights(load_model(checkpoint))
    TunedPlan(weights, Layers.read(layers)).write(tmp_path / "tuned.yaml", depth)
    _, planned, _ = measure(str(tmp_path / "tuned.yaml"), "asymmetric, stride=2")
    stride = {"asymmetric": {"stride": 2, "bypass": False}}
    assert (planned["variant"], planned["merging"]) == ("tuned", {"layers": {0: "none", 1: stride}})
    assert planned["pose_median_deg"] > 0
    assert planned["keys"] == (15 + 4 + 2 * 2) / 27  # of the layers that act
    packed = TunedPlan(weights, Layers(), (QUANTIZATION["fp8"](),))
    packed.write(tmp_path / "packed.yaml", depth)
    with pytest.raises(UserError, match="also quantizes, which is not measured here"):
        measure(str(tmp_path / "packed.yaml"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Two scenes of 3 and 2 photographs with poses, without depth."""
    generator = torch.Generator().manual_seed(0)
    for name, number in (("hall", 3), ("yard", 2)):
        (tmp_path / name).mkdir()
        frames = []
        for i in range(number):
            pixels = torch.randint(0, 256, (40, 52, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            pose = torch.eye(4)[:3]
            pose[0, 3] = float(i)
            camera = [[50.0, 0.0, 26.0], [0.0, 50.0, 20.0], [0.0, 0.0, 1.0]]
            frames.append({"file": f"{i}.png", "extrinsic": pose.tolist(), "intrinsic": camera})
        (tmp_path / name / "poses.json").write_text(json.dumps({"name": name, "frames": frames}))
    return tmp_path


def test_photographs_are_measured_by_name(checkpoint: str, photographs: Path, out: Path) -> None:
    seeds = measure_frames.scenes_of(["2", "3:1"], 32, "photographs", photographs)
    assert seeds == {2: ["hall", "yard"], 3: ["hall"]}
    wanted = chosen(["httm"])
    lines = list(measure_frames.measure(checkpoint, seeds, wanted, out, root=photographs))
    assert about(lines) == [  # type: ignore[comparison-overlap]
        *((n, s, v) for n, s in ((2, "hall"), (3, "hall"), (2, "yard")) for v in (DENSE, "httm")),
    ]
    assert all(line["size"] is None and "depth_abs_rel" not in line for line in lines)
    assert lines[3]["pose_median_deg"] > 0
    found = frame_tables.document("tiny", lines, "photographs", {"hall", "yard"})
    text = frame_tables.markdown(found, "name")
    assert "same scenes of photographs, with" in text
    assert " | AbsRel | " in text
    assert " | not known | " in text


def test_other_photographs_of_the_same_names_are_measured_anew(
    checkpoint: str, photographs: Path, out: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(photographs / "hall", moved / "hall")  # before anything is written beside it

    def measured(root: Path) -> list[str]:
        return [line["variant"] for line in measure_frames.measure(checkpoint, {2: ["hall"]}, {}, out, root=root)]

    assert [measured(photographs), measured(photographs), measured(moved)] == [[DENSE], [], [DENSE]]
    pixels = moved / "hall" / "0.png"
    os.utime(pixels, ns=(1, 1))
    assert [measured(moved), measured(moved), measured(photographs)] == [[DENSE], [], []]
    lines = measure_frames.read_lines(out)
    assert [line["root"] for line in lines] == [str(root.resolve()) for root in (photographs, moved, moved)]
    # Of one folder and the photographs that are there now, those of the last line; another folder's are no row.
    assert frame_tables.as_last(lines) == lines[-1:]


def test_what_a_method_reads_is_part_of_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "predictor").write_text("one")
    monkeypatch.setattr(MERGING["come"], "files", lambda self: [tmp_path / "predictor"])
    variants = chosen(["come", "httm", FREE])
    before = {name: measure_frames.files_of(knobs) for name, knobs in variants.items()}
    assert before["httm"] == before[FREE] == {}  # so that their lines stay what they were
    about = {"frames": 4, "seed": 1000, "variant": "come", "merging": variants["come"]}
    (tmp_path / "predictor").write_text("another")
    after = measure_frames.files_of(variants["come"])
    assert len({measure_frames.identity(about | files) for files in ({}, before["come"], after)}) == 3
    lines = [line("come", 1000, **files) for files in (before["come"], after)]
    assert frame_tables.as_last([line("dense", 1000), *lines]) == [line("dense", 1000), lines[1]]


def test_a_free_attention_computes_no_attention_and_leaves_nothing_behind(measure: Measure, out: Path) -> None:
    lines = {line["variant"]: line for line in measure("alike", FREE, "httm")}
    assert lines[FREE]["merging"] == {FREE: {}}
    assert lines[FREE]["predicted_speedup"] is None
    assert lines[FREE]["pose_median_deg"] > 0
    out.unlink()
    alone = {line["variant"]: line for line in measure(FREE, "httm")}
    assert all(alone[name]["pose_deg"] == lines[name]["pose_deg"] for name in (FREE, "httm"))
    found = frame_tables.document("tiny", list(lines.values()), "validation", {1000})
    assert [row["variant"] for row in found["frames"]["3"]] == [DENSE, "httm", "alike", FREE]


def line(variant: str, seed: int, **scores: Any) -> dict[str, Any]:
    given = {
        **{"frames": 4, "seed": seed, "variant": variant, "merging": {}, "weights": "w", "size": [28, 28]},
        **{"auc_30": 0.8, "auc_5": 0.4, "auc_3": 0.2, "depth_abs_rel": 0.04, "bypassed": None},
        **{
            "queries": 1.0,
            "keys": 1.0,
            "predicted_speedup": 1.9,
            "cpu_s": 2.0,
            "dense_cpu_s": 2.0,
            "pairs_deg": [1.0, 2.0],
        },
        **dict.fromkeys(frame_tables.DISTANCES, 0.0),
        "made_by": {"code": "c", "processor": "P", "instructions": "I", "device": "cpu", "threads": 1},
    }
    return {**given, **scores}


LINES = [
    line("dense", 1000),
    line("dense", 1001, pairs_deg=[9.0, 40.0], auc_30=0.6, dense_cpu_s=4.0, cpu_s=4.0),
    line("asymmetric, stride=4", 1000, auc_30=0.7, cpu_s=1.0, pose_median_deg=2.0, keys=0.25, pairs_deg=[3.5, 4.5]),
    line("httm", 1000, auc_30=0.5, cpu_s=1.0, queries=0.25),
    line("httm", 1001, auc_30=0.4, cpu_s=1.0, dense_cpu_s=4.0, queries=0.25),
    line("httm, no outlier filter", 1001, auc_30=0.3, cpu_s=1.0),
]


def test_rows_are_scored_as_an_evaluation_is() -> None:
    found = frame_tables.document("tiny", LINES, "validation", VALIDATION_SEEDS)
    rows = {row["variant"]: row for row in found["frames"]["4"]}
    assert list(rows) == [DENSE, "httm", "httm, no outlier filter", "asymmetric, stride=4"]
    errors = [PairErrors(torch.tensor(one["pairs_deg"]), torch.zeros(2)) for one in LINES[:2]]
    expected = PROTOCOLS["vggt-co3d"].scores(errors)
    assert [rows[DENSE][f"auc_{t}"] for t in (30, 5, 3)] == [pytest.approx(expected[f"auc_{t}"]) for t in (30, 5, 3)]
    httm, four = rows["httm"]["effects"], rows["asymmetric, stride=4"]["effects"]
    assert httm["auc_30_loss"]["mean"] == pytest.approx((0.3 + 0.2) / 2)
    assert (httm["auc_30_loss"]["low"], httm["auc_30_loss"]["high"]) == (pytest.approx(0.2), pytest.approx(0.3))
    assert httm["speedup"]["mean"] == pytest.approx((2.0 + 4.0) / 2)
    assert (rows["httm"]["effective_ratio"], rows["httm"]["scenes"], rows["asymmetric, stride=4"]["scenes"]) == (
        *(0.75, 2),
        1,
    )
    assert four["pose_median_deg"]["mean"] == 2
    # An ablation against its method, on the scenes of both.
    minus = rows["httm, no outlier filter"]["minus"]
    assert minus["httm"]["auc_30_loss"]["mean"] == pytest.approx(0.3 - 0.2)
    assert "minus" not in rows["httm"]


def test_lines_of_other_code_or_scenes_are_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    old = [{**one, "made_by": {**one["made_by"], "code": "old"}, "auc_30": 0.0} for one in LINES]
    others = [line("dense", 8192, auc_30=0.0), line("httm", 8192)]
    found = frame_tables.document("tiny", [*old, *LINES, *others], "validation", VALIDATION_SEEDS)
    assert found["frames"] == frame_tables.document("tiny", LINES, "validation", VALIDATION_SEEDS)["frames"]
    assert "6 lines from other code, weights, machines or files are left out" in capsys.readouterr().err
    # A dense line that is missing takes those of its scene along.
    (rows,) = frame_tables.document("tiny", LINES[1:], "validation", VALIDATION_SEEDS)["frames"].values()
    assert [row["variant"] for row in rows] == [DENSE, "httm", "httm, no outlier filter"]
    with pytest.raises(UserError, match="no measurements of tiny on the validation set"):
        frame_tables.document("tiny", others, "validation", VALIDATION_SEEDS)


def test_a_summary_is_json_tables_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES))
    monkeypatch.setattr(sys, "argv", ["measure_frames.py", "summary", f"--out={tmp_path}", f"--to={tmp_path}"])
    measure_frames.work(measure_frames.arguments())
    name = "merging-tiny-frames-validation"
    found = json.loads((tmp_path / "benchmarks" / f"{name}.json").read_text())
    assert found["made_by"]["4"]["code"] == "c"
    shown = (tmp_path / "docs" / "results" / f"{name}.md").read_text()
    assert "## 4 frames, scenes: 1 to 2\n\n1 CPU threads, P (I), code c.\n\n| | AUC@30 of " in shown
    one_scene = found["frames"]["4"][-1]["effects"]["auc_30_loss"]
    assert one_scene == {"mean": pytest.approx(0.1), "low": None, "high": None}
    assert "| `httm` | -0.250 (-0.300 to -0.200) | " in shown
    assert shown.rstrip().endswith(" | 100 % | 25 % | 2.00, predicted 1.90 |")
    assert f"![Accuracy kept against speedup]({name}.png)" in shown
    assert (tmp_path / "docs" / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (panel,) = picture(found).axes
    at = {line.get_gid(): (line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if line.get_marker()}  # type: ignore[index]
    assert at["dense"] == (1, 100)
    before = found["frames"]["4"][0]["auc_30"]
    assert at["httm"] == (pytest.approx(3), pytest.approx(100 * (1 - 0.25 / before), abs=0.01))
    assert at["asymmetric, stride=4, AUC@5"] == (pytest.approx(2), pytest.approx(100))
    assert FREE not in at
    bars = [drawn.get_xdata() for drawn in panel.lines if drawn.get_linewidth() == 1.2]
    assert list(map(list, bars)) == [[pytest.approx(3)] * 2]  # type: ignore[arg-type]  # of two scenes; one has none
    free = [line(FREE, seed, cpu_s=0.5, dense_cpu_s=2.0) for seed in (1000, 1001)]
    (panel,) = picture(frame_tables.document("tiny", [*LINES, *free], "validation", {1000, 1001})).axes
    assert [drawn.get_xdata()[0] for drawn in panel.lines if drawn.get_gid() == FREE] == [pytest.approx(4)]  # type: ignore[index]


def test_frame_counts_of_the_same_weights_are_put_together() -> None:
    """One after the other, also of other code or another machine; the rows of one count never come from two."""
    more = [{**one, "frames": 16, "made_by": {**one["made_by"], "processor": "Q", "code": "d"}} for one in LINES]
    mixed = [*LINES, *more, {**more[3], "made_by": {**more[3]["made_by"], "processor": "R"}}]
    first, second, last = (
        frame_tables.document("tiny", lines, "validation", VALIDATION_SEEDS) for lines in (LINES, more, mixed)
    )
    found = frame_tables.together(second, first)
    assert found["frames"] == {"4": first["frames"]["4"], "16": second["frames"]["16"]}
    assert [made["processor"] for made in found["made_by"].values()] == ["P", "Q"]
    assert frame_tables.together(first, second) == found
    assert [made["code"] for made in found["made_by"].values()] == ["c", "d"]
    assert frame_tables.document("tiny", [*LINES, *more], "validation", VALIDATION_SEEDS) == found
    assert frame_tables.together({**second, "weights": "new"}, first)["frames"].keys() == {"16"}
    assert last["frames"] == first["frames"]  # of R there is no dense line


def test_variants_are_what_their_names_say() -> None:
    """Every name makes methods with bypassing off, has what it is set against, and says by itself what acts."""
    for name, methods in chosen([*GROUPS]).items():
        assert all(not make(MERGING, method, knobs).bypass for method, knobs in methods.items())  # type: ignore[union-attr]
        assert base(name) in NAMED
    assert set(MERGING) == {name for name in NAMED if name in MERGING}
    assert all(NAMED[name] == {name: {}} for name in MERGING)
    assert chosen(["httm, outliers=0.1, anchor=false"]) == {
        "httm, outliers=0.1, anchor=false": {"httm": {"outliers": 0.1, "anchor": False, "bypass": False}}
    }
