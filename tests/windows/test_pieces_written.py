"""Sequences that do not hang together: a folder for each piece, and none of one without a point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, images_of, short_loop

import geoaccel
from geoaccel.errors import UserError


def test_two_clips_are_two_pieces(oracle: Oracle, tmp_path: Path) -> None:
    other = short_loop(48, seed=1001)
    oracle.videos = [oracle.videos[0], other.render(0, 20)]
    result = geoaccel.reconstruct_windows(
        torch.cat([images_of(oracle, slice(20)), other.render(0, 20).images[0]]),
        model=oracle, out=tmp_path / "out", window=16, formats="tum", max_points=500,
    )  # fmt: skip
    assert result.joined.cuts == [20]
    assert [piece.frames for piece in result.pieces] == [list(range(20)), list(range(20, 40))]
    for number in (1, 2):
        rows = np.loadtxt(tmp_path / "out" / f"piece_{number}" / "trajectory.txt")
        assert rows.shape == (20, 8)
        assert rows[:, 0].tolist() == result.pieces[number - 1].frames
    assert all(points <= 500 for points in result.points)


@pytest.mark.parametrize("transparent", [False, True])
def test_a_piece_without_sure_points_does_not_end_the_run(
    transparent: bool, oracle: Oracle, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last frames are the least sure part of their window, or cut-outs of nothing."""
    other = short_loop(48, seed=1001).render(0, 4)
    exact = oracle.backbone.geometry

    def doubtful(predictions: Any, size: Any) -> Any:
        found = exact(predictions, size)
        nearest = (predictions["images"][0][:, None] - other.images[0][None]).abs().mean(dim=(2, 3, 4)).amin(1)
        found.conf[0, nearest < 0.01] *= 1e-3
        return found

    oracle.videos = [oracle.videos[0], other]
    oracle.backbone.geometry = doubtful
    images = torch.cat([images_of(oracle, slice(20)), other.images[0]])
    if transparent:
        opaque = torch.ones(len(images), 1, *images.shape[2:])
        opaque[20:] = 0
        images = torch.cat([images, opaque], dim=1)
    run: dict[str, Any] = {"model": oracle, "out": tmp_path / "out", "window": 16, "formats": "ply,tum", "loops": False}
    result = geoaccel.reconstruct_windows(images, wide=False, conf_percentile=50, **run)
    first, *rest = result.points
    assert first > 0
    assert [points > 0 for points in rest] == [not transparent] * len(rest)
    assert len(rest) >= 1
    left_out = json.loads((tmp_path / "out" / "windows.json").read_text())["pieces_left_out"]
    assert left_out == (list(range(2, 2 + len(rest))) if transparent else [])
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"piece_1"} | (set() if transparent else {"piece_2"})
    listed = json.loads((tmp_path / "out" / "files.json").read_text())["pieces"]
    assert {one["folder"] for one in listed} == folders
    said = "has no points and is left out" if transparent else "so all of them are kept"
    assert said in caplog.text


def test_no_sure_point_anywhere_is_one_line(oracle: Oracle, tmp_path: Path) -> None:
    images = torch.cat([images_of(oracle, slice(20)), torch.zeros(20, 1, 28, 28)], dim=1)
    with pytest.raises(UserError, match=r"no point is left: the images are transparent everywhere") as raised:
        geoaccel.reconstruct_windows(images, model=oracle, out=tmp_path / "out", window=16, loops=False, wide=False)
    assert "same call" not in str(raised.value)
