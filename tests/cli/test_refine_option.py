"""``--refine`` and ``--tracks`` are checked before anything is read."""

from __future__ import annotations

import sys

import pytest

from geoaccel.cli import main


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--refine", "slam"], "unknown refinement 'slam'; known: ba"),
        (["--tracks", "guess"], "unknown source of tracks 'guess'; known: auto, head, measure, project"),
    ],
)
def test_unknown_choices(options, line, tmp_path, capsys):
    assert main(["reconstruct", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *options]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--refine", "ba"], ["--tracks", "measure"]])
def test_without_pycolmap_one_line_says_how_to_get_it(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert main(["reconstruct", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert "pip install 'geoaccel[refine]'" in error
    assert len(error.strip().splitlines()) == 1
