"""Block by block and frame by frame: what an evaluation says of where a method drifts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plans import evaluate
from tiny_checkpoint import write_checkpoint

import geoaccel
from geoaccel import cli
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.layers import compare_layers
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.source import Source
from geoaccel.merging.layers import Layers
from geoaccel.quantization import FP8, W4A16
from geoaccel.tuned import TunedPlan, of_weights

pytest.importorskip("scipy")

NO_BYPASS = {"ratio": 0.5, "bypass": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


def source(scenes: int = 1) -> Source:
    return Source(dataset="synthetic", frames=3, scenes=scenes, options={"size": [56, 56]})


@pytest.mark.parametrize(
    "changes", [{"merging": {"fastvggt": NO_BYPASS}}, {"quantization": {"fp8": {}}}, {"control": "frame-only"}]
)
def test_tokens_are_equal_up_to_the_first_block_that_was_changed(checkpoint: Path, changes: dict) -> None:
    job = Job(str(checkpoint), **changes)
    found = compare_layers(job, next(iter(source()())))
    rows = found["layers"]
    network = job.dense.build()
    assert len(rows) == sum(len(sites) for sites in network.backbone.sites(network).values())
    cosines = [row["fidelity_cosine_min"] for row in rows]
    first = 0 if "quantization" in changes else next(i for i, row in enumerate(rows) if row["kind"] == "global")
    assert cosines[:first] == [1.0] * first
    assert all(cosine < 1 for cosine in cosines[first:])
    assert len(found["frames"]) == 3
    assert all(frame["fidelity_depth_abs_rel"] > 0 for frame in found["frames"])


def test_eval_writes_layers_beside_the_report(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data=synthetic", "data.scenes=1", "data.frames=3", "data.options.size=[28,28]", "timing.repeats=0"]
    options += [f"model={checkpoint}", "quantization=w4a16", "quantization.w4a16.group_size=48", "fidelity=true"]
    assert cli.main(["eval", *options, f"out={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "layers.json").read_text())["scene"]
    assert (tmp_path / "run" / "layers.png").stat().st_size > 0
    line = json.loads(capsys.readouterr().out)
    assert line["quantization"] == "w4a16"
    assert line["fidelity_depth_abs_rel"] > 0


def test_knobs_of_a_quantization_reach_the_model(checkpoint: Path) -> None:
    model = Job(str(checkpoint), quantization={"w4a16": {"group_size": 16}}).build()
    (part, *_) = geoaccel.describe(model).quantization
    assert part.method.group_size == 16


def check_float_weights_are_noticed(job: Job, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing quantizes, and where the quantized model is the float one."""
    with monkeypatch.context() as patch:
        patch.setattr(geoaccel, "accelerate", lambda model, **knobs: model)
        with pytest.raises(RuntimeError, match="no quantized layer"):
            job.build()
    float_one = Predictor(job.dense)
    monkeypatch.setattr(Job, "build", lambda self: float_one.model)
    with pytest.raises(RuntimeError, match="bit for bit"):
        evaluate(job, source(), Protocol(points=None), out, data={}, with_fidelity=True)


def test_a_float_model_under_a_quantized_name_is_noticed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(str(checkpoint), quantization={"fp8": {}})
    check_float_weights_are_noticed(job, tmp_path / "run", monkeypatch)


def planned(checkpoint: Path, path: Path) -> str:
    """A plan that merges nothing and quantizes one half of the linears in either format."""
    model = geoaccel.load_model(checkpoint)
    names = [f"aggregator.global_blocks.0.attn.{name}" for name in ("qkv", "proj")]
    methods = (FP8(include=(names[0],)), W4A16(include=(names[1],)))
    TunedPlan(of_weights(model), Layers(), methods).write(path, 2)
    return str(path)


def test_a_plan_that_quantizes_is_a_quantized_run(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(str(checkpoint), plan=planned(checkpoint, tmp_path / "plan.yaml"))
    assert job.quantizes
    options = ["data=synthetic", "data.scenes=1", "data.frames=2", "data.options.size=[28,28]", "timing.repeats=0"]
    options += [f"model={checkpoint}", f"plan={job.plan}", f"out={tmp_path / 'eval'}"]
    assert cli.main(["eval", *options]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["quantization"] == "fp8+w4a16"
    (row,) = json.loads((tmp_path / "eval" / "report.json").read_text())["rows"]
    assert row["quantization"] == "fp8+w4a16"
    check_float_weights_are_noticed(job, tmp_path / "run", monkeypatch)
