"""An error of ours shows a traceback, ends with 1 and says how to report it; only wrong input is one line and a 2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import checkpoint, commands, run, write_images  # noqa: F401 (a fixture)

from geoaccel.cli import parser
from geoaccel.errors import REPORT, MissingPackage, UnsupportedHere, UserError, UserTypeError, run_program

EVAL = ("eval", "data=synthetic", "data.scenes=1", "data.frames=2", "model={model}", "out={out}", "timing.repeats=0")
QUANTIZE = ("--model", "{model}", "--quantization", "fp8")
# Each command, and something deep inside that it calls.
PLACES = [
    ("demo", ("demo", "--out", "{out}", "--model", "{model}"), "geoaccel.eval.tools.demo.run_demo"),
    ("reconstruct", ("reconstruct", "{photos}", "--out", "{out}", "--model", "{model}"), "geoaccel.reconstruct"),
    ("eval", EVAL, "geoaccel.eval.run.job.Predictor.load"),
    ("eval", EVAL, "geoaccel.eval.run.runner.score_scene"),
    ("eval", EVAL, "geoaccel.eval.tools.command.make_report"),
    ("eval", (*EVAL, "merging=httm"), "geoaccel.merging.httm.HTTMMixer.splits"),
    ("eval", (*EVAL[:-1], "timing.repeats=5"), "geoaccel.eval.tools.evaluation.measure"),
    ("bench", ("bench", "model={model}", "out={out}", "frames=[2]"), "geoaccel.eval.bench.bench.filled_slots"),
    (
        "tune",
        ("tune", "{photos}", "--out", "{out}.yaml", "--model", "{model}", "--speedup", "1.1"),
        "geoaccel.eval.tuning.photographs.natural_key",
    ),
    ("view", ("view", "{photos}", "--html", "{out}.html"), "geoaccel.viewer.folder.read_result"),
    ("completion", ("completion", "bash"), "shtab.complete"),
    ("info", ("info",), "geoaccel.info.compiled_why_not"),
    ("info", ("info", "{model}"), "geoaccel.info.recognise"),
    (
        "quantize export",
        ("quantize", "export", *QUANTIZE, "--out", "{out}.safetensors"),
        "geoaccel.quantization.FP8.encode",
    ),
    (
        "quantize calibrate",
        ("quantize", "calibrate", *QUANTIZE, "--out", "{out}.safetensors"),
        "geoaccel.quantization.calibrate.calibration.calibrate",
    ),
    (
        "quantize sensitivity",
        ("quantize", "sensitivity", *QUANTIZE, "--out", "{out}.json", "--scenes", "4", "--frames", "2"),
        "geoaccel.eval.tools.sensitivity.measure_sensitivity",
    ),
]  # fmt: skip


def test_every_command_is_here() -> None:
    assert {command for command, _, _ in PLACES} == set(commands(parser()))


@pytest.mark.parametrize(("command", "args", "place"), PLACES, ids=[place.rpartition(".")[2] for _, _, place in PLACES])
def test_a_fault_of_ours_is_not_the_users(
    checkpoint: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    args: tuple[str, ...],
    place: str,
    request: pytest.FixtureRequest,
) -> None:
    fault = ValueError if "vggt" in request.node.name else TypeError

    def broken(*args: Any, **kwargs: Any) -> None:
        raise fault("planted")

    monkeypatch.setattr(place, broken)
    names = {"model": checkpoint, "photos": write_images(tmp_path / "photos"), "out": tmp_path / "out"}
    if place.endswith("HTTMMixer.splits"):  # so few tokens are left alone otherwise
        args = (*args, "merging.httm.bypass=false")
    code, _, err = run(capsys, *(arg.format(**names) for arg in args))
    assert code == 1, err
    assert "Traceback (most recent call last)" in err
    assert f"\n{fault.__name__}: planted\n" in err
    assert err.splitlines()[-1] == f"geoaccel: {REPORT}"
    for word in ("issue tracker", "`geoaccel info`", "traceback"):
        assert word in REPORT
    assert not re.search("https?:", REPORT)


@pytest.mark.parametrize(
    "error",
    [
        UserError("so\n it is"),
        UserTypeError("so it is"),
        UnsupportedHere("so it is"),
        MissingPackage("so it is"),
        FileNotFoundError("so it is"),
        PermissionError("so it is"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(error: Exception, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise error

    assert run_program("tool", work) == 2
    assert capsys.readouterr().err == "tool: so it is\n"
    monkeypatch.setenv("GEOACCEL_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_program("tool", work)


@pytest.mark.parametrize("error", [KeyError, AssertionError, ImportError, RuntimeError, AttributeError, ValueError])
def test_everything_else_is_ours(error: type[Exception], capsys: Any) -> None:
    def work() -> None:
        raise error("so it is")

    assert run_program("tool", work) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(f"tool: {REPORT}\n")


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (UserError("bad data"), True),
        (FileNotFoundError("no such file"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ValueError("shapes differ"), False),
        (TypeError("a bug"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_one_scene_may_fail_for_bad_data_and_memory_alone(error: Exception, goes_on: bool) -> None:
    from geoaccel.workers import reason_to_go_on

    assert (reason_to_go_on(error) is not None) == goes_on


def test_a_cpu_without_memory_fails_one_scene() -> None:
    from geoaccel.workers import reason_to_go_on

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert reason_to_go_on(caught.value) is not None
