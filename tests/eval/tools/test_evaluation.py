"""A whole ``geoaccel eval``: what goes wrong with one scene, one setting or one run, and what is kept all the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoint import write_checkpoint

from geoaccel import cli
from geoaccel.eval.run.layers import LAYERS, PLOT
from geoaccel.eval.tools import evaluation
from geoaccel.eval.tools.command import make_plans, suffixes, with_own_folders

pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["eval", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


SMALL = ("data=synthetic", "data.scenes=1", "data.frames=3", "data.options.size=[28,28]", "timing.repeats=0")


def write_images(folder: Path, *, poses: bool = True, count: int = 3) -> Path:
    """A scene of noise; with poses, a camera that moves to the right."""
    folder.mkdir(parents=True)
    frames = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        extrinsic = [[1, 0, 0, 0.1 * i], [0, 1, 0, 0], [0, 0, 1, 0.05 * i * i]]
        frames.append({"file": f"{i}.png", "extrinsic": extrinsic, "intrinsic": [[28, 0, 14], [0, 28, 14], [0, 0, 1]]})
    if poses:
        (folder / "poses.json").write_text(json.dumps({"frames": frames}))
    return folder


def on_images(checkpoint: Path, root: Path, out: Path) -> list[str]:
    return [
        *("data=folder", f"data.root={root}", "data.frames=3", "data.resize=false"),
        *(f"model={checkpoint}", f"out={out}"),
    ]


def test_a_bad_first_scene_takes_neither_timing_nor_layers_along(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (write_images(tmp_path / "data" / "a") / "1.png").write_bytes(b"cut short")
    write_images(tmp_path / "data" / "b")
    write_images(tmp_path / "data" / "c", count=2)
    out = tmp_path / "run"
    options = [*on_images(checkpoint, tmp_path / "data", out), "fidelity=true", "control=frame-only"]
    # poses.json says nothing of sizes, so that the reader lets the broken image through
    code, line, err = run(capsys, *options)
    assert code == 0, err
    assert json.loads(line)["scenes"] == 1
    assert json.loads(line)["latency_ms"] > 0
    assert json.loads((out / LAYERS).read_text())["scene"] == "b"
    assert {path.name for path in out.iterdir()} >= {"report.html", "timing.json", LAYERS, PLOT}
    assert "c: 2 frames, 3 are needed" in err
    assert "1.png" in err


def test_timing_that_fails_is_a_line_and_the_scores_stay(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_little_memory(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand much more")

    monkeypatch.setattr(evaluation, "measure", too_little_memory)
    monkeypatch.setattr(evaluation, "compare_layers", too_little_memory)
    options = [*SMALL[:4], "fidelity=true", "control=frame-only", f"model={checkpoint}", f"out={tmp_path / 'run'}"]
    code, line, err = run(capsys, *options)
    assert code == 0
    assert json.loads(line)["auc_30"] is not None
    assert json.loads(line)["latency_ms"] is None
    assert "failed timing: CUDA out of memory\n" in err
    dense, row = json.loads((tmp_path / "run" / "report.json").read_text())["rows"]
    assert (dense["scores"]["auc_30"] is not None, dense["latency_ms"]) == (True, None)
    assert row["failed"] == ["layers: CUDA out of memory", "timing: CUDA out of memory"]
    assert row["scenes"] == 1


@pytest.mark.parametrize(
    "typo",
    [
        ["data=synthetic", "data.scenes=[sed7]"],
        ["data=folder", "data.root=nowhere", "fidelity=true"],
        # No predictor comes with these weights.
        ["data=synthetic", "data.scenes=1", "merging=come"],
    ],
)
def test_a_typo_does_not_spoil_the_folder(
    typo: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [f"model={checkpoint}", f"out={tmp_path / 'run'}"]
    code, _, err = run(capsys, *typo, "data.frames=3", *out)
    assert code == 2
    assert not (tmp_path / "run").exists(), err
    code, _, err = run(capsys, *SMALL, *out)
    assert code == 0, err


def test_what_was_skipped_is_said_where_nothing_is_left(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, count=2)
    code, out, err = run(capsys, *on_images(checkpoint, tmp_path / "data", tmp_path / "run"))
    assert (code, out) == (2, "")
    assert "(first of 2 skipped: a: 2 frames, 3 are needed; data.frames=2 uses all)" in err.splitlines()[-1]
    said = "2 frames, 3 are needed; data.frames=2 uses all"
    assert {f"skipped {name}: {said}" for name in "ab"} <= set(err.splitlines())


def test_images_alone_are_compared_with_the_dense_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "data", poses=False)
    options = [*on_images(checkpoint, tmp_path / "data", tmp_path / "run"), "control=frame-only"]
    code, _, err = run(capsys, *options)
    assert code == 2
    assert "compare with the dense model (fidelity=true)" in err.splitlines()[-1]
    code, line, err = run(capsys, *options, "fidelity=true", "timing.repeats=0")
    assert code == 0, err
    found = json.loads(line)
    assert found["auc_30"] is None
    assert found["fidelity_depth_abs_rel"] > 0
    assert "without poses: compared with the dense model, not scored" in err
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / LAYERS).exists()


def test_images_with_poses_are_scored_beside_the_comparison(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "data")
    options = [*on_images(checkpoint, tmp_path / "data", tmp_path / "run"), "fidelity=true", "timing.repeats=0"]
    code, line, err = run(capsys, *options)
    assert code == 0, err
    assert json.loads(line)["auc_30"] is not None
    assert "without poses" not in err


def planned(*overrides: str) -> list[str]:
    return [str(plan.folder) for plan in make_plans("eval", "eval", ["data=synthetic", *overrides])]


def test_runs_of_a_sweep_that_differ_in_any_setting_have_folders_of_their_own() -> None:
    base = "runs/eval/synthetic-vggt-mini"
    assert planned("data.frames=2,3") == [f"{base}-dense-2frames", f"{base}-dense-3frames"]
    assert planned("attention=sdpa,matmul") == [f"{base}-dense-8frames-attention-{name}" for name in ("sdpa", "matmul")]
    assert planned("merging=httm", "merging.httm.query_keep=0.3,0.5", "data.frames=2,3") == [
        f"{base}-httm-{frames}frames-query_keep-{keep}" for keep in (0.3, 0.5) for frames in (2, 3)
    ]


def test_benchmarks_of_a_sweep_do_not_overwrite_each_other() -> None:
    plans = make_plans("bench", "bench", ["repeats=5,6"])
    assert [plan.folder.name.partition("-repeats-")[2] for plan in plans] == ["5", "6"]


def test_a_sweep_with_an_out_folder_stays_inside() -> None:
    assert planned("data.frames=2,3", "out=o") == ["o/frames-2", "o/frames-3"]
    assert planned("data.frames=2,3", "ratio=0.3,0.5", "merging=httm", "out=o")[-1] == "o/frames-3-ratio-0.5"
    # A dense model has no ratio, so that there is one run.
    assert planned("ratio=0.3,0.5", "out=o") == ["o"]
    bypass = ("merging.alike.bypass=true,false", "merging.httm.bypass=true,false")
    assert (
        planned("merging=[alike,httm]", *bypass, "out=o")[1] == "o/merging.alike.bypass-True-merging.httm.bypass-False"
    )


def test_what_makes_no_name_makes_a_hash() -> None:
    long = [
        f"data.scenes=[seed{i:09d},seed000000009,seed000000010,seed000000011,seed000000012,seed000000013]"
        for i in (1, 2)
    ]
    names = suffixes([["out=o", one] for one in long])
    assert len(set(names)) == 2
    assert all(len(name) == 8 for name in names)
    assert names == suffixes([["out=o", one] for one in long])
    # Values that differ in what no folder's name can hold.
    first, second = suffixes([["model=a/b"], ["model=a:b"]])
    assert first != second
    assert suffixes([["+data.x=[1,2]"], ["+data.x=[3]"]]) == ["x-1_2", "x-3"]


def test_two_runs_in_one_folder_are_refused_before_the_first() -> None:
    plans: list[Any] = [Planned(Path("o"), 2), Planned(Path("o"), 3), Planned(Path("o/frames-2"), 4)]
    overrides = [["data.frames=2"], ["data.frames=3"], ["data.frames=4"]]
    assert [str(p.folder) for p in with_own_folders(plans[:2], overrides[:2], inside=False)] == [
        "o-frames-2",
        "o-frames-3",
    ]
    with pytest.raises(ValueError, match=r"2 of the 3 runs would write to .*o/frames-2; give each its own out folder"):
        with_own_folders(plans, overrides, inside=True)


@dataclass(frozen=True)
class Planned:
    """All that choosing folders asks of a plan."""

    folder: Path
    frames: int


@pytest.mark.parametrize("last", ["merging.httm.query_keep=0.3,1.5", "ratio=0.3,1.5", "attention=sdpa,matmull"])
def test_a_bad_value_in_the_last_run_shows_before_the_first(
    last: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, f"model={checkpoint}", "merging=httm", last, f"out={tmp_path / 'run'}"]
    code, out, err = run(capsys, "--multirun", *options)
    assert (code, out) == (2, "")
    assert "1.5 is not in" in err or "Did you mean 'matmul'" in err
    assert not (tmp_path / "run").exists()


def test_a_sweep_over_a_knob_runs_to_its_end(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, f"model={checkpoint}", "attention=sdpa,matmul", f"out={tmp_path / 'o14'}"]
    code, _, err = run(capsys, "--multirun", *options)
    assert code == 0, err
    assert (tmp_path / "o14" / "attention-matmul" / "scores.json").exists()
    (sweep,) = (tmp_path / "o14").glob("eval-sweep-*")
    rows = json.loads((sweep / "report.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["sdpa", "matmul"]
