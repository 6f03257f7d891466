"""``geoaccel eval`` and ``geoaccel bench`` from the command line: one line of JSON, a report, clear errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report_rows import merged, row
from tiny_checkpoint import write_checkpoint

from geoaccel import cli
from geoaccel.api import list_merging
from geoaccel.eval.report import Report, Row
from geoaccel.eval.run.plan import Plan
from geoaccel.eval.tools import command
from geoaccel.eval.tools.evaluation import of_one_sitting

pytest.importorskip("scipy")

KEYS = (
    "auc_3 auc_5 auc_15 auc_30 depth_abs_rel chamfer latency_ms dense_latency_ms speedup peak_memory_gib "
    "effective_ratio frames scenes model merging quantization"
)
PROMISED = frozenset(KEYS.split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


SMALL = ["data=synthetic", "data.scenes=2", "data.frames=3", "data.options.size=[28,28]"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_eval_ends_with_one_line_of_json_and_writes_a_report(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, f"model={checkpoint}", f"out={tmp_path / 'run'}"]
    code, out, err = run(capsys, "eval", *options)
    assert code == 0
    line = json.loads(out)
    assert line.keys() >= PROMISED
    assert (line["frames"], line["scenes"], line["merging"], line["quantization"]) == (3, 2, "none", "none")
    assert line["speedup"] == 1  # the dense model beside itself
    assert line["dense_latency_ms"] > 0
    assert "auc" in err.lower()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.md", "report.csv", "report.json", "report.html", "scores.json", "timing.json"} <= names
    assert "geoaccel eval data=synthetic" in (tmp_path / "run" / "report.md").read_text()
    # A second start measures nothing again and says the same.
    stamp = (tmp_path / "run" / "timing.json").stat().st_mtime_ns
    assert json.loads(run(capsys, "eval", *options)[1]) == line
    assert (tmp_path / "run" / "timing.json").stat().st_mtime_ns == stamp


def test_sweeps_need_multirun_and_end_in_one_report(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*SMALL[:2], "data.frames=2,3", SMALL[3], f"model={checkpoint}", "timing.repeats=0"]
    code, _, err = run(capsys, "eval", *options)
    assert code == 2
    assert "2 combinations" in err
    assert "--multirun" in err
    code, out, _ = run(capsys, "eval", "--multirun", *options)
    assert code == 0
    assert json.loads(out)["frames"] == 3
    assert json.loads(out)["latency_ms"] is None
    (sweep,) = (tmp_path / "runs" / "eval").glob("eval-sweep-*")
    assert [row["frames"] for row in json.loads((sweep / "report.json").read_text())["rows"]] == [2, 3]
    assert len(list((tmp_path / "runs" / "eval").iterdir())) == 3


@pytest.mark.parametrize("other", ["tuesday", "monday"])
def test_times_of_two_runs_do_not_stand_in_one_table(
    other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of two was timed by a process that may be gone: a sweep over both says so, and keeps the scores."""
    sittings = iter(["monday", other])
    found: list[Report] = []

    def run_plan(plan: Plan, command: str) -> list[Row]:
        return [merged("httm", 0.3, 0.8, 1.5, sitting=next(sittings))]

    monkeypatch.setattr(command, "run_plan", run_plan)
    monkeypatch.setattr(command, "finish", lambda folder, report: found.append(report))
    assert run(capsys, "eval", "--multirun", *SMALL[:2], "data.frames=2,3")[0] == 0
    assert [len(report.rows) for report in found] == [1, 1, 2]
    assert [one.is_timed for report in found[:2] for one in report.rows] == [True, True]
    for one in found[2].rows:
        assert one.is_timed == (one.number("speedup") is not None) == (other == "monday")
        assert one.number("auc_30") == 0.8
        assert ("timed in 2 runs" in str(one.failures)) != (other == "monday")


def test_rows_of_one_sitting_stay_as_they_are() -> None:
    timed = merged("httm", 0.3, 0.8, 1.5, sitting="monday")
    others = [merged("come", 0.3, 0.7, None), row()]
    assert of_one_sitting([timed, *others]) == [timed, *others]
    for other in ("tuesday", ""):
        kept = of_one_sitting([timed, replace(timed, sitting=other), *others])
        assert not any(one.is_timed for one in kept)
        assert [one.scores["auc_30"] for one in kept] == [0.8, 0.8, 0.7, 0.9]


@pytest.mark.parametrize(("swept", "says"), [
    ("data.protocol.pose=vggt-co3d,strict", ["vggt-co3d", "strict"]),
    ("data.options.size=[28,28],[56,56]", ["data.options.size=[28, 28] and data.options.size=[56, 56]: they cannot"]),
    ("data=synthetic,long_paths data.protocol.points=null", ["data.dataset=synthetic and data.dataset=long_paths"]),
    ("data.scenes=[1],[2]", ["data.scenes=['1'] and data.scenes=['2']"]),
    ("data=folder data.root=A,B", ["data.root=A and data.root=B"]),
    ("data=folder data.root=A data.rule=evenly,draw data.frames=4,8", ["data.rule=evenly and data.rule=draw"]),
    ("data=tum_rgbd data.root=A data.seed=1,2", ["data.seed=1 and data.seed=2"]),
    ("data=long_paths windows=4 data.options.path=loop,corridor", ["data.options.path=loop and "]),
])  # fmt: skip
def test_a_sweep_that_no_table_holds_is_refused_before_it_runs(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    swept: str, says: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "run_plan", lambda *_: pytest.fail("it ran"))
    options = [f"model={checkpoint}", *swept.split(), f"out={tmp_path / 'run'}"]
    code, out, err = run(capsys, "eval", "--multirun", *options)
    assert (code, out) == (2, "")
    assert all(words in err.splitlines()[-1] for words in [*says, "run the command once for each"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "swept", "message"), [
    ("eval", "model=CHECKPOINT,nosuch", "unknown model 'nosuch'"),
    ("eval", "model=CHECKPOINT,gone.safetensors", "no checkpoint at gone.safetensors"),
    ("eval", "model=CHECKPOINT,torn.safetensors", "torn.safetensors is not a complete safetensors file"),
    ("eval", "model=CHECKPOINT merging=none,httm data.options.size=[100,100]", "data.options.size=[100, 100]: "),
    ("eval", "model=CHECKPOINT merging=none,httm data.options.size=[100]", "size=[100]: give height and width"),
    ("eval", "model=CHECKPOINT merging=none,httm data.options.seeds=few", "seeds='few': give a list"),
    ("eval", "model=CHECKPOINT merging=none,httm data=folder data.root=gone", "gone"),
    ("bench", "model=CHECKPOINT,vgt-mini device=cpu", "unknown model 'vgt-mini'"),
    ("bench", "suite=merge3d merge3d.geometry=vggt,vgt-mini device=cpu", "unknown model 'vgt-mini'"),
])  # fmt: skip
def test_what_no_run_can_take_is_refused_before_the_first(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, swept: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for kind in (command.Bench, command.Merge3DBench):
        monkeypatch.setattr(kind, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(command, "run_plan", lambda *_: pytest.fail("it ran"))
    Path("torn.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    code, out, err = run(capsys, name, "--multirun", *swept.replace("CHECKPOINT", str(checkpoint)).split(), "out=runs")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["eval", "bench"])
def test_a_place_that_takes_no_results_is_refused_before_anything_runs(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_plan", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(command.Bench, "run", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    for place, why in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "in", "is a file"),
        ("/proc/no", "/proc ("),
    ):
        code, out, err = run(capsys, name, f"out={place}", "device=cpu")
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        assert "cannot write to" in err
        assert why in err


@pytest.mark.parametrize(("config", "options"), [
    ("eval", ["data=folder", "data.root=A", "data.frames=4,all"]), ("eval", ["data.scenes=1,2"]),
    ("ablation", ["sweep.merging=[none,httm]", "sweep.ratio=[0.5]"]),
])  # fmt: skip
def test_frames_and_numbers_of_scenes_are_told_apart(config: str, options: list[str]) -> None:
    plans = command.make_plans("eval", config, options)
    assert len(plans) > 1
    command.check_one_source(plans)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval data=sinthetic", "Could not find 'data/sinthetic'"),
        ("eval merging=htttm", "Could not find 'merging/htttm'"),
        ("eval model=vgt-mini", "vgt-mini"),
        ("eval data=folder", "data.root is not set"),
        ("eval data=folder data.root=nowhere", "nowhere"),
        ("eval control=frames-only", "Did you mean 'frame-only'"),
        ("eval engine=rey", "Did you mean 'ray'"),
        ("eval fidelity=no", "fidelity=no: give true or false"),
        ("eval data.resize=maybe", "data.resize=maybe: give true or false"),
        ("eval merging=httm merging.httm.bypass=no", "bypass='no' must be true or false"),
        ("eval timing.repeats=3", "at least 5"),
        ("eval data.protocol.pose=vggt", "unknown pose protocol 'vggt'"),
        ("eval dtype=float64", "unknown dtype 'float64'"),
        ("eval device=tpu", "unknown device 'tpu'"),
        ("eval data.scenes=[seed7]", "unknown scene 'seed7'"),
        ("eval --config ablatoin", "ablatoin"),
        ("bench frames=[0]", "list of positive numbers"),
        ("bench frames=[]", "list of positive numbers"),
        ("bench methods=[htttm]", "unknown merging method 'htttm'"),
        ("bench size=[100,100]", "multiples of 14"),
        ("bench repeats=1", "at least 5"),
        ("bench suite=spead", "Did you mean 'speed'"),
        ("bench suite=merge3d device=cpu merge3d.host=qwen", "unknown host 'qwen'; known: qwen2.5-vl, qwen3-vl"),
        ("bench suite=merge3d device=cpu merge3d.scale=huge", "unknown merge3d.scale 'huge'"),
        ("bench suite=merge3d device=cpu merge3d.method=merge4d", "Did you mean 'merge3d'"),
        ("bench suite=merge3d device=cpu merge3d.ratios=[1.5]", "ratio=1.5 is not in (0, 1]"),
        ("bench suite=merge3d device=cpu merge3d.ratios=[]", "give fractions of the tokens to keep"),
        ("bench suite=merge3d device=cpu merge3d.geometry_merging=htttm", "unknown merging method 'htttm'"),
        (
            "bench suite=merge3d device=cpu merge3d.new_tokens=1",
            "merge3d.new_tokens=1: give a whole number",
        ),
        ("bench suite=merge3d device=cpu size=wide", "size=wide: give height and width, or one number for both"),
        ("bench suite=merge3d device=cpu size=[224,224,3]", "give height and width"),
        ("bench suite=merge3d device=cpu merge3d.ratios=1.5", "ratio=1.5 is not in (0, 1]"),
        ("bench device=cpu suite=merge4d", "Did you mean 'merge3d'"),
    ],
)
def test_wrong_settings_are_one_line(
    command: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "suite=merge" in command:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *command.split())
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("report.*"))


def test_settings_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "eval", "--cfg", "data.frames=5")
    assert code == 0
    assert "frames: 5" in out


@pytest.mark.parametrize("method", list_merging())
def test_every_method_is_a_choice_with_its_knobs(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    knob, value = {"asymmetric": ("keys", 6.5), "avggt": ("stride", 3)}.get(method, ("ratio", 0.25))
    code, out, _ = run(capsys, "eval", "--cfg", f"merging={method}", f"merging.{method}.{knob}={value}")
    assert code == 0
    assert f"{knob}: {value}" in out


def test_bench_compares_every_method_at_every_frame_count(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_folder = tmp_path / "bench"
    options = [f"model={checkpoint}", "frames=[2,3]", "size=[28,28]", f"out={out_folder}"]
    code, out, err = run(capsys, "bench", *options)
    assert code == 0, err
    assert json.loads(out).keys() >= PROMISED
    rows = json.loads((out_folder / "report.json").read_text())["rows"]
    # It was not asked for by name, and there is no predictor for these weights.
    assert "left out: come: no bundled confidence predictor fits this checkpoint" in err
    able = [name for name in list_merging() if name != "come"]
    assert [(row["frames"], row["merging"]) for row in rows] == [
        (count, name) for count in (2, 3) for name in ("none", *able)
    ]
    assert all(row["speedup"] == pytest.approx(row["dense_latency_ms"] / row["latency_ms"]) for row in rows)
