"""Rates of the machine: measured once, kept, and built in where nothing can be measured."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from geoaccel.merging import calibration, microbenchmarks
from geoaccel.merging.calibration import in_use, rates_for
from geoaccel.merging.rates import Kind, Rates

KIND = Kind(torch.device("cpu"), torch.float32, width=16, head_dim=8)
MEASURED = replace(Rates.built_in("cpu", 16, 8), linear=7e-12, measured=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Kind]:
    """A machine that measures in no time, with a cache folder and a process of its own; what was measured."""
    asked: list[Kind] = []

    def measure(kind: Kind) -> Rates:
        asked.append(kind)
        return MEASURED

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(calibration, "_KNOWN", {})
    monkeypatch.setenv("GEOACCEL_RATES", "measured")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return asked


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_KNOWN", {})


def test_rates_are_measured_once_and_kept(
    measured: list[Kind], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [rates_for(KIND) for _ in range(2)] == [MEASURED] * 2
    another_process(monkeypatch)
    assert rates_for(KIND) == MEASURED
    assert measured == [KIND]
    (path,) = (tmp_path / "geoaccel").glob("rates-*.json")
    assert json.loads(path.read_text())["of"]["width"] == 16
    assert str(rates_for(KIND)) == "measured on this machine"
    assert "measured for float32 at width 16 with sdpa" in in_use("cpu")


def test_another_kind_or_number_of_threads_has_its_own(measured: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    others = [replace(KIND, dtype=torch.bfloat16), replace(KIND, width=32), replace(KIND, kernel="matmul")]
    for kind in (KIND, *others):
        rates_for(kind)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 37)
    rates_for(KIND)
    assert measured == [KIND, *others, KIND]


@pytest.mark.parametrize(
    "change",
    [
        lambda found: "no JSON",
        lambda found: [1],
        lambda found: {**found, "of": {**found["of"], "torch": "0.1"}},
        lambda found: {**found, "seconds": {**found["seconds"], "linear": -1.0}},
        lambda found: {**found, "seconds": {**found["seconds"], "linear": "1"}},
        lambda found: {**found, "seconds": {"linear": 1.0}},
        lambda found: {"of": found["of"]},
    ],
)
def test_damaged_files_are_measured_anew(
    measured: list[Kind], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any
) -> None:
    rates_for(KIND)
    (path,) = (tmp_path / "geoaccel").glob("rates-*.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    another_process(monkeypatch)
    assert rates_for(KIND) == MEASURED
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: list[Kind], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [rates_for(KIND) for _ in range(2)] == [MEASURED] * 2
    assert measured == [KIND]


def test_built_in_where_nothing_can_be_measured(measured: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = Rates.built_in("cpu", 16, 8)
    assert rates_for(replace(KIND, device=torch.device("meta"))) == Rates.built_in("meta", 16, 8)
    with FakeTensorMode():
        assert rates_for(KIND) == built_in
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert rates_for(KIND) == built_in
    monkeypatch.undo()
    monkeypatch.setenv("GEOACCEL_RATES", "built-in")
    assert rates_for(KIND) == built_in
    assert measured == []
    assert in_use("cpu") == "built in (GEOACCEL_RATES=built-in)"


def test_a_wrong_word_is_one_line(measured: list[Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOACCEL_RATES", "off")
    with pytest.raises(ValueError, match="GEOACCEL_RATES='off'; known: measured, built-in"):
        rates_for(KIND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_run_and_leave_the_process_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """With next to nothing to compute: what is measured is for a machine, not for a test, to say."""
    monkeypatch.setattr(microbenchmarks, "SPEED", {"cpu": 1e4})
    monkeypatch.setattr(microbenchmarks, "FRAMES", {"cpu": 2})
    monkeypatch.setattr(microbenchmarks, "RUNS", 1)
    monkeypatch.setattr(microbenchmarks, "MOST_TIMES", 1)
    before = torch.get_rng_state()
    found = microbenchmarks.measure(replace(KIND, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), before)
    seconds = [getattr(found, field.name) for field in fields(Rates) if field.name != "measured"]
    assert all(0 < value < 1 for value in seconds)
    assert found.measured


def test_pieces_count_what_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every run takes a second shows what the seconds are divided by."""
    pieces = microbenchmarks.Pieces(KIND)
    monkeypatch.setattr(pieces, "budget", 1e6)
    monkeypatch.setattr(pieces, "seconds", lambda call: 1.0)
    assert pieces.block(100, torch.float32) == 1 / (12 * 16**2 * 100)
    assert pieces.attention(None) == 1 / (1 * 2 * 261**2)  # one frame, two heads
    assert pieces.merging() == 1 / (256 * 16)
    assert pieces.starting() == 1 / 200
