"""Unfinished work on disk: it goes on with the same settings alone, appears whole, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geoaccel.quantization.calibrate.progress import Progress


class Stop(Exception):
    """An interruption."""


def test_unfinished_work_with_other_settings_is_not_taken(tmp_path: Path) -> None:
    Progress(tmp_path / "p", {"frames": 8, "search": "awq"}).write("scales", {})
    with pytest.raises(ValueError, match=r"other settings \(search was 'awq', is now 'task'\)"):
        Progress(tmp_path / "p", {"frames": 8, "search": "task"})


def test_other_settings_take_over_where_nothing_was_found_yet(tmp_path: Path) -> None:
    Progress(tmp_path / "p", {"frames": 8})
    Progress(tmp_path / "p", {"frames": 4}).write("scales", {})
    assert Progress(tmp_path / "p", {"frames": 4}).read("scales") == {}


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match="is in the way"):
        Progress(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_damaged_progress_says_so(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "p", {})
    progress.write_tensors("statistics", {"a": torch.ones(2)}, {"tokens": {}})
    path = tmp_path / "p" / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"statistics\.safetensors is damaged"):
        progress.read_tensors("statistics")
    progress.write("scales", {})
    (tmp_path / "p" / "scales.json").write_text("{")
    with pytest.raises(ValueError, match=r"scales\.json is damaged"):
        progress.read("scales")


def test_what_is_kept_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(tmp_path / "p", {})
    progress.write("scales", {"a": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        progress.write("scales", {"a": 2})
    assert progress.read("scales") == {"a": 1}


def test_nothing_found_leaves_nothing(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "p", {"frames": 8})
    assert progress.read("scales") is None
    assert not (tmp_path / "p").exists()
    progress.finish()
    progress.write_tensors("codes", {"q": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="frames was 8, is now 4"):
        Progress(tmp_path / "p", {"frames": 4})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is in the way"):
        Progress(tmp_path / "file", {})
