"""The dense model stands beside a method in the report of an evaluation: its times, and its scores where known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from report_rows import merged, row
from tiny_checkpoint import write_checkpoint

import geoaccel
from geoaccel import cli
from geoaccel.eval.report import Row
from geoaccel.eval.tools.command import make_plans, without_repeats
from geoaccel.models.weights import save_model
from geoaccel.quantization import W4A16

SMALL = ("data=synthetic", "data.scenes=1", "data.frames=3", "data.options.size=[28,28]")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("vggt", tmp_path_factory.mktemp("weights"))


def rows(out: Path, *options: str) -> list[dict[str, Any]]:
    assert cli.main(["eval", *SMALL, f"out={out}", *options]) == 0
    (report,) = out.glob("eval-sweep-*/report.json" if "--multirun" in options else "report.json")
    return json.loads(report.read_text())["rows"]


def test_with_scores_where_the_dense_model_was_predicted(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    merging = ("merging=fastvggt", "merging.fastvggt.bypass=false", "fidelity=true")
    dense, own = rows(tmp_path / "both", f"model={checkpoint}", *merging)
    out, err = capsys.readouterr()
    assert json.loads(out)["merging"] == own["merging"] == "fastvggt"
    assert "no token was merged" not in err
    assert (dense["merging"], dense["quantization"], dense["effective_ratio"]) == ("none", "none", None)
    assert (dense["speedup"], dense["limit_share"]) == (1, None)
    assert dense["latency_ms"] == dense["dense_latency_ms"] == own["dense_latency_ms"]
    assert dense["peak_memory_gib"] == own["dense_peak_memory_gib"]
    assert own["scores"]["spread_ms"] > 0
    assert dense["scores"]["spread_ms"] == own["scores"]["dense_spread_ms"]
    (alone,) = rows(tmp_path / "alone", f"model={checkpoint}")
    for name in ("auc_30", "depth_abs_rel", "chamfer"):
        assert dense["scores"][name] == alone["scores"][name], name
    assert "dense" in (tmp_path / "both" / "report.md").read_text()


def test_with_times_alone_where_it_was_not(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    dense, own = rows(tmp_path / "timed", f"model={checkpoint}", "merging=httm")
    assert (dense["merging"], dense["speedup"]) == ("none", 1)
    assert "auc_30" not in dense["scores"]
    assert own["scores"]["auc_30"] is not None
    capsys.readouterr()
    (own,) = rows(tmp_path / "untimed", f"model={checkpoint}", "merging=httm", "timing.repeats=0")
    assert "no token was merged, and the output is the dense model's" in capsys.readouterr().err
    assert own["merging"] == "httm"


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "w4.safetensors"
    model = geoaccel.accelerate(geoaccel.load_model(checkpoint), quantization=W4A16(group_size=16))
    save_model(model, path, dtype=torch.float32)
    return path


def test_a_quantized_checkpoint_is_not_called_dense(checkpoint: Path, quantized: Path, tmp_path: Path) -> None:
    found = rows(tmp_path / "both", f"model={checkpoint},{quantized}", "timing.repeats=0", "--multirun")
    assert [(one["merging"], one["quantization"]) for one in found] == [("none", "none"), ("none", "w4a16")]
    beside = ("merging=httm,fastvggt", f"model={quantized}", "fidelity=true", "timing.repeats=0", "--multirun")
    found = rows(tmp_path / "merged", *beside)
    assert [one["merging"] for one in found] == ["none", "httm", "fastvggt"]
    assert {one["quantization"] for one in found} == {"w4a16"}


def test_nor_is_it_where_it_is_timed(quantized: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["bench", f"model={quantized}", "methods=httm", "frames=[2]", "size=[28,28]", f"out={tmp_path / 'bench'}"]
    assert cli.main(given) == 0
    assert [json.loads(line)["quantization"] for line in capsys.readouterr().out.splitlines()[-1:]] == ["w4a16"]


def test_a_sweep_shows_one_dense_model() -> None:
    plans = make_plans("eval", "eval", ["data=synthetic", "merging=httm,fastvggt", "data.scenes=2,3"])
    assert len(plans) == 4
    timed, scored = row(scores={}), row(scores={"auc_30": 0.9})
    beside: list[list[Row]] = [[one, merged("httm", None, 0.8, 2.0)] for one in (timed, timed, scored, scored)]
    kept = without_repeats(list(zip(plans, beside, strict=True)))
    assert [one.merging for one in kept].count("httm") == 4
    assert [one for one in kept if one.is_dense] == [scored, scored]  # one of two scenes, one of three
