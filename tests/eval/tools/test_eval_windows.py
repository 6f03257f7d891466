"""``geoaccel eval ... windows=N``: whole sequences of every data set that has them, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_trees import TREES
from tiny_checkpoint import write_checkpoint
from tree_parts import camera_poses

from geoaccel import cli
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.tools.command import make_plans, share_lengths
from geoaccel.windows import predict
from geoaccel.windows.predict import Lengths

pytest.importorskip("scipy")

SMALL = ("data=long_paths", "data.frames=20", "data.options.size=[28,28]", "windows=8", "timing.repeats=0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    try:
        code = cli.main(["eval", *map(str, arguments)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("dataset", ["tum_rgbd", "seven_scenes", "kitti_odometry"])
def test_whole_sequences_on_disk(
    dataset: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES[dataset](tmp_path / "data", camera_poses(9))
    options = [f"data={dataset}", f"data.root={tree.root}", f"model={checkpoint}", f"out={tmp_path / 'run'}"]
    code, out, err = run(capsys, *options, "data.frames=all", "windows=4", "joining.overlap=2", "timing.repeats=0")
    assert code == 0, err
    line = json.loads(out)
    assert (line["frames"], line["scenes"], line["auc_30"]) == (9, 1, None)
    assert line["pieces"] >= 1
    (scene,) = json.loads((tmp_path / "run" / "scores.json").read_text())["scenes"]
    about = scene["sequence"]
    assert (about["window"], about["overlap"], scene["windows"]) == (4, 2, 4)
    assert sum(count for _, _, count in about["pieces"]) == 9
    assert {"rpe_rotation_deg", "loops_closed", "cuts"} <= scene.keys()
    assert about["windows"][0]["ate_percent"] > 0
    picture = tmp_path / "run" / f"path-{tree.scene}.png"
    assert f"Path of {tree.scene}" in (tmp_path / "run" / "report.html").read_text()
    assert picture.stat().st_size > 5_000
    # All frames of a short sequence also go through the model at once.
    options[3:] = ["data.protocol.points=null", "data.protocol.depth=null", f"out={tmp_path / 'once'}"]
    code, out, err = run(capsys, *options, "data.frames=all", "timing.repeats=0")
    assert code == 0, err
    assert (json.loads(out)["frames"], "windows" in json.loads(out)) == (9, False)


def test_merging_stands_beside_the_dense_model_and_one_window_is_timed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL[:4], f"model={checkpoint}", f"out={tmp_path / 'run'}", "merging=httm", "fidelity=true"]
    options.append("merging.httm.bypass=false")
    code, out, err = run(capsys, *options)
    assert code == 0, err
    line = json.loads(out)
    assert line["merging"] == "httm"
    assert 0 < line["effective_ratio"] < 1
    assert line["fidelity_ate_percent"] > 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["merging"] for row in report["rows"]] == ["none", "httm"]
    assert all(row["scores"]["ate_percent"] > 0 and row["latency_ms"] > 0 for row in report["rows"])
    assert "trajectories, windows of 8 frames, a half shared, validation scenes" in report["protocol"]
    assert json.loads((tmp_path / "run" / "timing.json").read_text())["frames"] == 8
    before = (tmp_path / "run" / "scores.json").read_bytes()
    assert json.loads(run(capsys, *options)[1]) == line
    assert (tmp_path / "run" / "scores.json").read_bytes() == before


def test_a_run_that_is_interrupted_within_a_sequence_goes_on_from_its_windows(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = ["merging=httm", "merging.httm.bypass=false"]
    options = [*SMALL, "data.scenes=2", f"model={checkpoint}", *method]
    assert run(capsys, *options, f"out={tmp_path / 'whole'}")[0] == 0
    window, made = predict.Predictor.__call__, 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        made += 1
        if made == stop:
            raise KeyboardInterrupt
        return window(*arguments, **named)

    monkeypatch.setattr(predict.Predictor, "__call__", counting)
    stop, out = 3, tmp_path / "killed"
    assert run(capsys, *options, f"out={out}")[0] == 130
    kept = sorted(path.name for path in out.rglob("window_*.safetensors"))
    assert kept == ["window_00000.safetensors", "window_00001.safetensors"]
    made, stop = 0, -1
    code, _, err = run(capsys, *options, f"out={out}")
    assert code == 0, err
    assert not list(out.rglob("window_*"))
    again = made
    made = 0
    monkeypatch.setattr(predict.Predictor, "__call__", counting)
    assert run(capsys, *options, f"out={tmp_path / 'third'}")[0] == 0
    assert again == made - 2
    for name in ("whole", "third"):
        assert (out / "scores.json").read_bytes() == (tmp_path / name / "scores.json").read_bytes()


def test_pictures_of_other_sequences_go(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, f"model={checkpoint}", f"out={tmp_path / 'run'}"]
    for count in (2, 1):
        assert run(capsys, *options, f"data.scenes={count}")[0] == 0
        assert len(list((tmp_path / "run").glob("path-*.png"))) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("data=dtu data.root=x windows=8", "windows need a video, and dtu has none; leave windows out"),
        ("data=co3d_own_frames data.root=x windows=8", "windows need a video, and co3d has none"),
        ("windows=auto", "windows need a video, and synthetic has none"),
        ("data=tum_rgbd data.root=x data.rule=draw windows=8", "data.rule=draw changes the order of frames"),
        ("data.frames=all", "frames of synthetic are rendered in any number; give a number"),
        ("data=long_paths data.frames=all windows=8", "frames of long_paths are rendered"),
        ("data=co3d_vggt data.root=x data.frames=all", "frames of co3d_lists are drawn by data.rule=replay"),
        ("data=tum_rgbd data.root=x data.frames=all data.frame_list=x.json", "are those of data.frame_list"),
        ("data=long_paths windows=3", "window=3 (windows): give auto, or a number of frames from 4 on"),
        ("data=long_paths windows=many", "window='many' (windows): give auto"),
        ("data=long_paths windows=8 joining.overlap=8", "overlap=8 (joining.overlap) leaves no new frames in a window"),
        ("data=long_paths windows=8 joining.overlap=0", "windows are joined by shared frames; give 1 or more"),
        ("data=long_paths windows=8 joining.loops=maybe", "joining.loops=maybe: give true or false"),
        ("data=long_paths windows=8 joining.reference=2", "joining.reference=2: every window has its own"),
        ("data=long_paths windows=8 joining.overlaps=2", "joining.overlaps"),
        ("data=long_paths windows=8 joining=2", "this is a group of settings"),
        ("data=long_paths joining.overlap=4", "joining.overlap=4 is for windows; give windows=auto, too"),
        (
            "data=long_paths data.frames=20 windows=24",
            "windows=24 is longer than the sequence of 20 frames",
        ),
        ("data=long_paths windows=8 data.options.path=spiral", "unknown data.options.path 'spiral'; known: corridor"),
        (
            "data=long_paths windows=8 data.options.seeds=[8192]",
            "seeds of the report set but data.split=validation",
        ),
        ("data=long_paths windows=8 data.split=training", "data.split=training has no default scenes"),
        ("data=tum_rgbd windows=8", "data.root is not set"),
    ],
)
def test_what_cannot_be_is_one_line_before_a_model_is_loaded(
    settings: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_loaded(monkeypatch)
    code, out, err = run(capsys, *settings.split(), f"out={tmp_path / 'run'}")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.rglob("report.*"))


def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("geoaccel.eval.run.job.load_model", load)


def test_a_sequence_larger_than_memory_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_loaded(monkeypatch)
    monkeypatch.setattr("geoaccel.eval.run.room.free_bytes", lambda device: 2**25)
    tree = TREES["seven_scenes"](tmp_path / "data", camera_poses(5))
    options = ["data=seven_scenes", f"data.root={tree.root}", "data.frames=all", f"out={tmp_path / 'run'}"]
    code, out, err = run(capsys, *options)
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert "first of 1 skipped: chess_seq-03: 5 frames of " in last
    assert "windows=auto takes them part by part" in last


def test_kitti_without_poses_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_loaded(monkeypatch)
    tree = TREES["kitti_odometry"](tmp_path / "data", camera_poses(5))
    options = ["data=kitti_odometry", f"data.root={tree.root}", "windows=4", f"out={tmp_path / 'run'}"]
    code, _, err = run(capsys, *options, "data.scenes=['21']")
    assert (code, "sequence 21: KITTI publishes no poses of sequences 11 to 21" in err.splitlines()[-1]) == (2, True)
    (tree.root / "poses" / "04.txt").unlink()
    code, _, err = run(capsys, *options)
    assert (code, "first of 1 skipped: 04: no file" in err.splitlines()[-1]) == (2, True)
    (tree.root / "poses").rmdir()
    code, _, err = run(capsys, *options)
    assert (code, "fetch the ground truth poses" in err.splitlines()[-1]) == (2, True)


def test_runs_of_one_table_have_windows_of_one_length(tmp_path: Path) -> None:
    overrides = [
        "data=long_paths",
        "data.frames=20",
        "windows=auto",
        "merging=httm",
        f"out={tmp_path}",
        "ratio=0.3,0.6",
    ]
    plans = make_plans("eval", "eval", overrides)
    share_lengths(plans[0], plans)
    autos = [plan.auto() for plan in plans if isinstance(plan, Plan)]
    assert [auto and auto.read() for auto in autos] == [None, None]
    assert isinstance(plans[1], Plan)
    assert autos[1] is not None
    plans[1].store()
    autos[1].keep(Lengths(12, 6))
    share_lengths(plans[0], plans)
    assert [auto and auto.read() for auto in autos] == [Lengths(12, 6)] * 2


@pytest.mark.parametrize(
    "swept", ["model=pi3-mini,vggt-mini", "model=vggt-mini dtype=float32,bfloat16", "data.options.path=loop,corridor"]
)
def test_runs_that_windows_fit_otherwise_are_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], swept: str
) -> None:
    options = f"--multirun data=long_paths data.frames=20 windows=auto {swept} out={tmp_path / 'run'}"
    code, _, err = run(capsys, *options.split())
    says = "cannot share a table" if "path" in swept else "windows=auto differs between "
    assert (code, says in err.splitlines()[-1]) == (2, True)
    assert not (tmp_path / "run").exists()


def test_seeds_of_long_paths_are_those_of_their_set() -> None:
    from geoaccel.eval.run.source import Source

    for split, seeds in (("validation", range(1000, 1032)), ("report", range(8192, 8256))):
        source = Source("long_paths", frames=4, split=split, options={"size": [28, 28]})
        assert [scene.name for scene in source()] == [f"seed{seed:09d}" for seed in seeds]
        assert (source.notes, len(source)) == ([f"{split} scenes"], len(seeds))


def test_a_model_whose_numbers_are_not_finite_costs_the_sequence_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    good = write_checkpoint("vggt", tmp_path)
    from safetensors import safe_open

    with safe_open(good, "pt") as file:
        notes = file.metadata()
    tensors = load_file(good)
    name = next(name for name in tensors if name.startswith("camera_head") and name.endswith("bias"))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, tmp_path / "bad.safetensors", notes)
    code, _, err = run(capsys, *SMALL, f"model={tmp_path / 'bad.safetensors'}", f"out={tmp_path / 'run'}")
    assert code == 2
    assert "NaN" in err.splitlines()[-1]
