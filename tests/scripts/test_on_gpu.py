"""The day with a GPU, rehearsed small on a CPU: it ends in time, loses nothing, and says what it found."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from geoaccel.kernels.fused import NAMES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PARTS = ("gpu_journal", "gpu_schedule", "gpu_forwards", "gpu_kernels", "gpu_fused", "gpu_summary", "gpu_day")
TINY = (
    "--in-process",
    "--no-compile",
    "--device",
    "cpu",
    "--models",
    "vggt-mini",
    "--size",
    "56",
    "70",
    "--kernel-tokens",
    "128",
)
ONCE = (*TINY, "--frames", "2", "--quantized-frames", "2", "--turns", "1", "--dtype", "float32")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    for folder in (SCRIPTS, SCRIPTS / "gpu_day"):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in (*PARTS, "on_gpu"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        module = load("on_gpu")
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
        return int(end.value.code or 0)

    return run


def test_it_runs_to_the_end_and_measures_nothing_twice(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "day"))
    assert run(*ONCE, *out) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "day" / "on_gpu.json").read_text())
    assert str(tmp_path / "day" / "on_gpu.json") in printed.out
    assert "vggt-mini, 2 frames, merging: 1 turns" in printed.err
    compared = {row["group"]: [] for row in found["forwards"]}
    for row in found["forwards"]:
        compared[row["group"]].append(row["candidate"])
        assert row["median_ms"] > 0
        assert row["predicted_gib"] > 0
        assert row["runs"] == 1
    assert {"none", "httm", "fastvggt", "litevggt", "come"} <= set(compared["merging"])
    assert compared["quantization"] == ["none", "fp8", "w4a16"]
    kernels = {row["name"]: row for row in found["kernel"]}
    for name in ("best match", "segment means", "decoded 4-bit weights", "attention sdpa", *NAMES):
        assert kernels[name]["runs"]
        assert kernels[name]["difference"] < 1e-3
        assert kernels[name]["not_compiled"] == "they need a CUDA device"
    assert not found["failed"]
    for name in ("peaks.png", "merging/report.md", "quantization/report.md"):
        assert (tmp_path / "day" / name).stat().st_size > 0

    journal = tmp_path / "day" / "journal.jsonl"
    before = journal.read_bytes()
    assert run(*ONCE, *out) == 0
    assert journal.read_bytes() == before
    lines = before.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == "run")
    journal.write_bytes(b"".join(lines[:last]) + lines[last][:40])  # killed while it wrote
    assert run(*ONCE, *out) == 0
    kinds = [json.loads(line)["kind"] for line in journal.read_bytes()[len(b"".join(lines[:last])) :].splitlines()[1:]]
    assert kinds.count("run") == 1
    assert run(*ONCE, *out, "--turns", "2") == 0
    found = json.loads((tmp_path / "day" / "on_gpu.json").read_text())
    assert {row["runs"] for row in found["forwards"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "1"], "--minutes 1: give more than 1"),
        (["--turns", "0"], "give numbers of at least 1"),
        (["--device", "cuda"], "device cuda is not available here"),
        (["--models", "vgt-mini"], "Did you mean 'vggt-mini'"),
        (["--size", "57", "70"], "57 x 70 is not a multiple of the patch size 14"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    run: Callable[..., int],
    load: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(load("on_gpu"), "probe_kernels", lambda *given, **more: None)
    assert run(*ONCE, "--out", str(tmp_path), *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_turns_are_given_up_where_they_are_dearest(load: Callable[[str], Any]) -> None:
    schedule = load("gpu_schedule")
    costs = [schedule.Cost(1, 0, 5), schedule.Cost(10, 5, 5), schedule.Cost(100, 5, 5)]
    assert schedule.allot(costs, 1000) == [5, 5, 5]
    assert schedule.allot(costs, 300) == [5, 5, 2]
    assert schedule.allot(costs, 165) == [5, 5, 1]
    assert schedule.allot(costs, 130) == [5, 1, 1]
    assert schedule.allot(costs, 60) == [5, 5, 0]
    assert schedule.allot(costs, 0) == [0, 0, 0]


def test_what_a_group_takes_follows_what_was_measured(load: Callable[[str], Any], tmp_path: Path) -> None:
    schedule, journal = load("gpu_schedule"), load("gpu_journal").Journal(tmp_path / "lines", {})
    few, many = (schedule.Group("merging", "vggt-mini", frames, ("none", "httm")) for frames in (2, 4))

    def seconds(group: Any, name: str) -> float:
        return schedule.seconds_of(journal, group, name, (56, 70), "cpu")

    work = [schedule.flop("vggt-mini", frames, (56, 70)) for frames in (2, 4)]
    assert seconds(few, "httm") == work[0] / schedule.FIRST_RATE["cpu"]
    journal.write("run", **few.key, candidate="none", ms=3000.0)
    assert seconds(few, "none") == 3
    assert seconds(many, "httm") == pytest.approx(3 * work[1] / work[0])
    journal.write("run", **few.key, candidate="httm", ms=1000.0)
    assert seconds(many, "httm") == pytest.approx(work[1] / work[0])


def test_lines_of_others_do_not_count(load: Callable[[str], Any], tmp_path: Path) -> None:
    kind = load("gpu_journal").Journal
    kind(tmp_path / "lines", {"code": "a"}).write("run", frames=1)
    assert kind(tmp_path / "lines", {"code": "b"}).of("run") == []
    assert len(kind(tmp_path / "lines", {"code": "a"}).of("run", frames=1)) == 1


class Model(nn.Module):
    """A forward that does what it is told."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act = act

    def forward(self, images: torch.Tensor) -> None:
        self.act()


@pytest.fixture
def measured(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Any]]:
    """Measures candidates, which are functions, for so many turns in a given time; the journal and the group."""

    def measure(turns: int, seconds: float, **acts: Callable[[], None]) -> tuple[Any, Any]:
        forwards, schedule = load("gpu_forwards"), load("gpu_schedule")
        models = {name: SimpleNamespace(model=Model(act), prepare=lambda: None) for name, act in acts.items()}
        bench = SimpleNamespace(photographs=lambda count, size: torch.zeros(1, count, 3, 1, 1))
        monkeypatch.setitem(forwards.KINDS, "merging", lambda bench, settings: models)
        monkeypatch.setattr(forwards.Settings, "bench", lambda *given: bench)
        monkeypatch.setattr(forwards, "estimate_bytes", lambda model, **given: 1)
        monkeypatch.setattr(forwards, "token_counts", lambda model: {})
        monkeypatch.setattr(forwards, "seconds_of", lambda *given: 0.05)
        journal = load("gpu_journal").Journal(tmp_path / "lines", {})
        group = schedule.Group("merging", "any", 70, tuple(acts))
        settings = forwards.Settings((1, 1), "cpu", "float32")
        forwards.measure(group, turns, settings, journal, schedule.Clock(seconds))
        return journal, group

    return measure


def test_candidates_take_turns_and_one_that_fails_is_left_out(measured: Callable[..., tuple[Any, Any]]) -> None:
    order: list[str] = []

    def fails() -> None:
        raise torch.cuda.OutOfMemoryError("too much\nof it")

    journal, _ = measured(3, 60, none=lambda: order.append("a"), httm=fails, come=lambda: order.append("b"))
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b"]  # the first of each is for warmth
    assert [(line["candidate"], line["turn"]) for line in journal.of("run")] == [
        (name, turn) for turn in range(3) for name in ("none", "come")
    ]
    assert [line["why"] for line in journal.of("failed")] == ["OutOfMemoryError: too much"]


def test_what_is_no_runtime_error_is_a_line_too(measured: Callable[..., tuple[Any, Any]]) -> None:
    """Compilers raise classes of their own, and some errors say nothing."""

    def fails() -> None:
        raise AssertionError

    journal, _ = measured(1, 60, none=lambda: None, httm=fails, come=lambda: None)
    assert [line["why"] for line in journal.of("failed")] == ["AssertionError: "]
    assert [line["candidate"] for line in journal.of("run")] == ["none", "come"]


def test_a_device_that_is_broken_ends_the_process_and_not_the_others(
    measured: Callable[..., tuple[Any, Any]], load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an illegal access does: all that follows in this process would fail, and count as failed."""
    broken = []

    def breaks() -> None:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(device: str) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(load("gpu_forwards"), "synchronize", synchronize)
    candidates = {"none": lambda: None, "httm": breaks, "come": lambda: None}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measured(1, 60, **candidates)
    broken.clear()  # another process
    journal, _ = measured(1, 60, **candidates)
    assert [line["candidate"] for line in journal.of("failed")] == ["httm"]
    assert [line["candidate"] for line in journal.of("run")] == ["none", "come"]


def test_a_group_that_cannot_be_made_is_left_out(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(bench: Any, settings: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("too much")

    forwards, schedule = load("gpu_forwards"), load("gpu_schedule")
    monkeypatch.setitem(forwards.KINDS, "quantization", too_large)
    journal = load("gpu_journal").Journal(tmp_path / "lines", {})
    group = schedule.Group("quantization", "vggt", 100, ("none", "fp8"))
    forwards.measure(group, 1, forwards.Settings((56, 70), "cpu", "float32"), journal, schedule.Clock(60))
    assert [line["why"] for line in journal.of("failed", **group.key)] == ["OutOfMemoryError: too much"] * 2
    assert load("gpu_day").done(group, journal) == float("inf")


def test_a_candidate_that_ends_the_process_is_left_out_in_the_end(measured: Callable[..., tuple[Any, Any]]) -> None:
    def dies() -> None:
        raise KeyboardInterrupt  # as good as a signal: nothing behind it is run

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measured(1, 60, none=lambda: None, httm=dies, come=lambda: None)
    journal, _ = measured(1, 60, none=lambda: None, httm=dies, come=lambda: None)
    assert [line["why"] for line in journal.of("failed")] == ["it ended the process 2 times"]
    assert [line["candidate"] for line in journal.of("run")] == ["none", "come"]


def test_nothing_begins_that_would_end_too_late(measured: Callable[..., tuple[Any, Any]]) -> None:
    journal, _ = measured(3, 0.04, none=lambda: None)
    assert not journal.of("run")
    assert [line["expected_s"] for line in journal.of("cut")] == [0.1]


@pytest.fixture
def supervised(load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with a process that only does what ``child.py`` says."""
    module: ModuleType = load("on_gpu")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setattr(sys, "argv", ["on_gpu.py"])
    monkeypatch.setattr(module.signal, "signal", lambda *given: None)
    return module


def test_a_process_that_hangs_is_ended_in_time(supervised: Any, load: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("import time\ntime.sleep(100)")
    began = time.monotonic()
    supervised.supervise(tmp_path / "lines", load("gpu_schedule").Clock(1))
    assert time.monotonic() - began < 30


def test_a_process_that_dies_goes_on_while_it_gets_anywhere(
    supervised: Any, load: Callable[[str], Any], tmp_path: Path
) -> None:
    """It dies twice with something written, then with nothing."""
    lines = tmp_path / "lines"
    (tmp_path / "child.py").write_text(
        f"import os\nfrom pathlib import Path\npath = Path({str(lines)!r})\n"
        "text = path.read_text() if path.exists() else ''\n"
        "path.write_text(text + 'x' * (len(text) < 2))\nos._exit(9)"
    )
    supervised.supervise(lines, load("gpu_schedule").Clock(60))
    assert lines.read_text() == "xx"


def test_rows_of_peers_are_kept_as_they_come(
    load: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    day, journal = load("gpu_day"), load("gpu_journal").Journal(tmp_path / "lines", {})
    script = tmp_path / "compare.py"
    script.write_text(
        'import sys, time\nprint("loading")\n'
        'print(\'{"peer": "come", "frames": 8, "ours_over_peer": 0.5}\', flush=True)\ntime.sleep(100)'
    )
    monkeypatch.setattr(day, "COMPARE_PEERS", script)
    monkeypatch.setattr(day, "LONG", 0)
    day.compare_peer("come", tmp_path, "cpu", journal, load("gpu_schedule").Clock(5))
    assert [line["ours_over_peer"] for line in journal.of("peer", frames=8)] == [0.5]


def test_what_there_was_no_time_for_is_told_until_it_is_done(load: Callable[[str], Any], tmp_path: Path) -> None:
    journal = load("gpu_journal").Journal(tmp_path / "lines", {})
    group = load("gpu_schedule").Group("merging", "vggt", 300, ("none", "httm"))
    for name in ("none", "httm", "httm"):
        journal.write("cut", **group.key, candidate=name, turn=1, expected_s=9.0)
    told = load("gpu_summary").still_cut
    assert [line["candidate"] for line in told(journal)] == ["none", "httm"]
    journal.write("run", **group.key, candidate="none", turn=1)
    assert [line["candidate"] for line in told(journal)] == ["httm"]


def test_turns_that_are_done_leave_failed_candidates_out(load: Callable[[str], Any], tmp_path: Path) -> None:
    journal = load("gpu_journal").Journal(tmp_path / "lines", {})
    group = load("gpu_schedule").Group("merging", "vggt", 300, ("none", "httm", "come"))
    done = load("gpu_day").done
    for name in ("none", "httm", "none"):
        journal.write("run", **group.key, candidate=name)
    assert done(group, journal) == 0
    journal.write("failed", **group.key, candidate="come")
    assert done(group, journal) == 1
    journal.write("left_out", **group.key, candidate="httm")
    assert done(group, journal) == 2
