"""Whether this processor is faster in bfloat16: asked once, kept for the machine, never by a test's own speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from geoaccel import bfloat16

MACHINE = {"processor": "one", "instructions": "AVX512", "device": "cpu", "threads": 1}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """A machine whose answers are given, with a cache folder and a process of its own; those that are left."""
    answers = [4.0, 0.5]
    monkeypatch.setattr(bfloat16, "measure", lambda: answers.pop(0))
    monkeypatch.setattr(bfloat16, "_KNOWN", {})
    monkeypatch.setenv("GEOACCEL_RATES", "measured")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return answers


def test_it_is_asked_once_and_kept(measured: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bfloat16.gain(MACHINE, ask=False) is None
    assert [bfloat16.gain(MACHINE) for _ in range(2)] == [4.0] * 2
    monkeypatch.setattr(bfloat16, "_KNOWN", {})  # another process
    assert bfloat16.gain(MACHINE, ask=False) == 4.0
    assert measured == [0.5]
    (path,) = (tmp_path / "geoaccel").glob("bfloat16-*.json")
    assert json.loads(path.read_text())["of"]["processor"] == "one"
    assert bfloat16.gain({**MACHINE, "threads": 8}) == 0.5


@pytest.mark.parametrize("damage", ["", "[]", '{"gain": 3.0}', "-1.0", '"4.0"'])
def test_damaged_files_are_measured_anew(
    measured: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str
) -> None:
    bfloat16.gain(MACHINE)
    (path,) = (tmp_path / "geoaccel").glob("bfloat16-*.json")
    path.write_text(damage if not damage.startswith(("-", '"')) else path.read_text().replace("4.0", damage))
    monkeypatch.setattr(bfloat16, "_KNOWN", {})
    assert bfloat16.gain(MACHINE) == 0.5


def test_not_where_nothing_can_be_measured(measured: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        assert bfloat16.gain(MACHINE) is None
    monkeypatch.setenv("GEOACCEL_RATES", "built-in")
    assert bfloat16.gain(MACHINE) is None
    assert len(measured) == 2


def test_the_probe_compares_the_fastest_runs_and_leaves_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: of float32 runs take 8 s, of bfloat16 2 s, the first ones more, some are disturbed."""
    lasting: dict[torch.dtype, Any] = {torch.float32: [50.0, 9.0, 8.0], torch.bfloat16: [50.0, 2.0, 3.0]}
    now = [0.0]

    def block(dtype: torch.dtype) -> Any:
        def call() -> None:
            now[0] += lasting[dtype].pop(0)

        return call

    monkeypatch.setattr(bfloat16, "_block", block)
    monkeypatch.setattr(bfloat16, "SECONDS", 115.0)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert bfloat16.measure() == 4.0
    assert lasting == {torch.float32: [], torch.bfloat16: []}


def test_the_block_runs_in_both_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "WIDTH", 32)
    monkeypatch.setattr(bfloat16, "HEADS", 4)
    before = torch.get_rng_state()
    wide, narrow = (bfloat16._block(dtype)() for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(narrow.float(), wide, atol=1e-3, rtol=0.02)
    assert bfloat16.measure() > 0
