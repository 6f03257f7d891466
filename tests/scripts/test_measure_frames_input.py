"""What may be measured over frame counts: sets that share no scene, and arguments that are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import measure_frames
from geoaccel.errors import UserError
from geoaccel.eval.data.synthetic import TEST_SEEDS, VALIDATION_SEEDS


def test_sets_share_no_scene() -> None:
    validation, report, test = (set(measure_frames.SETS[name]) for name in ("validation", "report", "test"))
    assert (validation, test) == (set(VALIDATION_SEEDS), set(TEST_SEEDS))
    assert len(report) == 64
    assert not (validation & report | validation & test | report & test)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--variants=htttm", "Did you mean 'httm'"),
        ("--variants=httm, outlier=0", "outlier"),
        ("--variants=httm, outliers=", "write a method and its knobs"),
        ("--variants=nothing, x=1", "unknown merging method 'nothing'"),
        ("--frames=1", "--frames 1: give a number of at least 2"),
        ("--frames=8:x", "--frames 8:x: give a number of at least 2"),
        ("--frames=8:33", "33 scenes of the validation set, which has 32"),
        ("--skip=-1", "--skip -1: give a number of scenes, from 0 on"),
        ("--skip=4", "32 scenes of the validation set, which has 28 behind 4: give 1 to that many"),
        ("--root=scenes", "--root FOLDER is required with --set photographs, and only there"),
        ("--set=photographs", "--root FOLDER is required with --set photographs, and only there"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_frames, "measure", lambda *given, **options: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["measure_frames.py", "measure", "vggt-mini", f"--out={tmp_path}", argument])
    with pytest.raises(UserError, match=message):
        measure_frames.work(measure_frames.arguments())


def test_the_first_scenes_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["measure_frames.py", "summary", "--set=photographs", "--root=scenes", "--skip=1"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(UserError, match="--skip 1 is only for rendered scenes; give a --root without those"):
        measure_frames.work(measure_frames.arguments())
    found = measure_frames.scenes_of(["64:2", "8"], 3, "report", None, skip=16)
    assert {count: list(seeds) for count, seeds in found.items()} == {64: [8208, 8209], 8: [8208, 8209, 8210]}
