"""Sequences from images to files: one world, the same bytes after an interruption, and one line for bad input."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, images_of
from own_code import bring, edit
from PIL import Image
from torch import nn

import geoaccel
from geoaccel.claims import resolve
from geoaccel.errors import DiskFull, UserError
from geoaccel.eval.metrics.trajectories import absolute_trajectory_error
from geoaccel.images.sources import FilePicture
from geoaccel.windows import predict
from geoaccel.windows.assemble import Piece
from geoaccel.windows.plot import draw_path
from geoaccel.windows.store import Store, unfinished_folder


def photographs(folder: Path, count: int, size: tuple[int, int] = (42, 42)) -> list[Path]:
    """Views of one picture, each shifted by a few pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    wide = np.random.default_rng(4).integers(0, 255, (size[0], size[1] + 2 * count, 3), np.uint8)
    paths = [folder / f"frame_{i:03d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(wide[:, 2 * i : 2 * i + size[1]]).save(path)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_sequence_in_windows(oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, given_back = tmp_path / "out", []
    monkeypatch.setattr(predict, "give_back_freed_memory", lambda: given_back.append(1))
    result = geoaccel.reconstruct_windows(
        images_of(oracle), model=oracle, out=out, window=16, overlap=8, formats="ply,tum,kitti,glb,colmap"
    )
    (piece,) = result.pieces
    truth = oracle.videos[0].cam_from_world[0]
    errors = absolute_trajectory_error(piece.cam_from_world, truth)
    assert errors["ate_rmse"] < 0.02
    found = json.loads((out / "windows.json").read_text())
    assert (found["frames"], found["windows"], found["window"], found["overlap"]) == (48, 5, 16, 8)
    assert len(given_back) == 5 + len(found["wide_windows"]) + len(found["tried"])  # before each forward
    assert found["loops"] == sum(loop["closed"] for loop in found["tried"])
    rows = np.loadtxt(out / "trajectory.txt")
    assert rows.shape == (48, 8)
    assert np.loadtxt(out / "trajectory_kitti.txt").shape == (48, 12)
    np.testing.assert_allclose(np.loadtxt(out / "trajectory_kitti.txt")[:, [3, 7, 11]], rows[:, 1:4], atol=1e-6)
    assert not unfinished_folder(resolve(out)).exists()
    listed = json.loads((out / "files.json").read_text())
    assert {"path.png", "windows.json", "points.ply", "scene.glb"} <= set(listed["files"])
    assert Image.open(out / "path.png").size[0] > 500


@pytest.mark.parametrize(("count", "rows"), [(5, 2), (40, 10)])
def test_many_pieces_are_drawn_in_rows_and_of_more_the_longest(count: int, rows: int, tmp_path: Path) -> None:
    pieces = [Piece([2 * i, 2 * i + 1], torch.eye(4).double().repeat(2, 1, 1), [i, i]) for i in range(count)]
    draw_path(pieces, [], tmp_path / "path.png", "arbitrary")
    assert Image.open(tmp_path / "path.png").size == (3 * 6 * 130, rows * 6 * 130)


def test_one_frame_more_and_a_still_camera(oracle: Oracle, tmp_path: Path) -> None:
    for name, frames in (("one more", list(range(17))), ("still", [5] * 20)):
        result = geoaccel.reconstruct_windows(
            images_of(oracle, frames), model=oracle, out=tmp_path / name, window=16, overlap=8, formats="tum"
        )
        assert [len(piece.frames) for piece in result.pieces] == [len(frames)]
        assert result.pieces[0].cam_from_world.isfinite().all()


class Stopping(nn.Module):
    """Counts forwards, and raises at one of them."""

    def __init__(self, model: nn.Module, at: int, error: BaseException) -> None:
        super().__init__()
        self.count = 0

        def before(module: nn.Module, inputs: Any) -> None:
            self.count += 1
            if self.count == at:
                raise error

        self.handle = model.register_forward_pre_hook(before)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(tiny: nn.Module, tmp_path: Path) -> None:
    paths = photographs(tmp_path / "photos", 14)
    options: dict[str, Any] = {"model": tiny, "window": 6, "overlap": 3, "size": 28, "formats": "ply,colmap,tum"}
    geoaccel.reconstruct_windows(paths, out=tmp_path / "whole", **options)
    out = tmp_path / "out"
    for at in (2, 1, 3):  # the first window is done, then nothing more, then two more
        stop = Stopping(tiny, at, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            geoaccel.reconstruct_windows(paths, out=out, **options)
        stop.handle.remove()
        assert not out.exists()
    kept = sorted(path.name for path in unfinished_folder(resolve(out)).glob("*.safetensors"))
    assert kept == ["window_00000.safetensors", "window_00001.safetensors", "window_00002.safetensors"]
    rest = Stopping(tiny, -1, KeyboardInterrupt())
    result = geoaccel.reconstruct_windows(paths, out=out, **options)
    rest.handle.remove()
    assert rest.count == 1 + len(result.joined.loops)  # the fourth window
    assert contents(out) == contents(tmp_path / "whole")
    assert not unfinished_folder(resolve(out)).exists()


def test_what_a_loss_of_power_left_is_predicted_anew(
    oracle: Oracle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"window": 16, "formats": "tum", "wide": False, "loops": False, "out": tmp_path / "out"}
    stop = Stopping(oracle, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        geoaccel.reconstruct_windows(images_of(oracle), model=oracle, **options)
    stop.handle.remove()
    kept = unfinished_folder(resolve(tmp_path / "out"))
    for number, size in ((0, 0), (2, 2000)):
        path = kept / f"window_{number:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:size])
    count = Stopping(oracle, -1, KeyboardInterrupt())
    geoaccel.reconstruct_windows(images_of(oracle), model=oracle, **options)
    assert count.count == 2 + 2  # of five windows one was whole
    assert [line.split(" is damaged")[0][-24:] for line in caplog.messages] == [
        f"window_{number:05d}.safetensors"[-24:] for number in (0, 2)
    ]
    whole = tmp_path / "whole"
    geoaccel.reconstruct_windows(images_of(oracle), model=oracle, **{**options, "out": whole})
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("name", ["settings.json", "lengths.json"])
def test_windows_beside_a_damaged_file_are_not_taken(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "out", {"window": "auto"})
    assert store.note("lengths", [8, 4]) == [8, 4]
    (store.folder / name).write_text("")
    again = Store(tmp_path / "out", {"window": "auto"})
    assert again.discarded == f"{name} is damaged"
    assert again.note("lengths", [6, 3]) == [6, 3]


def test_windows_of_other_settings_are_not_taken(tiny: nn.Module, tmp_path: Path) -> None:
    paths = photographs(tmp_path / "photos", 10)
    stop = Stopping(tiny, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        geoaccel.reconstruct_windows(paths, model=tiny, out=tmp_path / "out", window=6, size=28)
    stop.handle.remove()
    told: list[str] = []
    geoaccel.reconstruct_windows(
        paths, model=tiny, out=tmp_path / "out", window=5, size=28, formats="tum", tell=told.append
    )
    assert told
    assert "window was 6, is now 5" in told[0]
    assert json.loads((tmp_path / "out" / "windows.json").read_text())["window"] == 5


def test_windows_of_an_own_method_that_was_edited_are_not_taken(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = bring(tmp_path, "own_of_windows", monkeypatch)
    model, told = geoaccel.accelerate(tiny, merging=own.Own(bypass=False)), list[str]()
    options: dict[str, Any] = {"model": model, "out": tmp_path / "out", "window": 6, "overlap": 3, "size": 28}
    stop = Stopping(tiny, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        geoaccel.reconstruct_windows(photographs(tmp_path / "photos", 10), **options)
    stop.handle.remove()
    edit(own)
    geoaccel.reconstruct_windows(tmp_path / "photos", formats="tum", tell=told.append, **options)
    assert "cannot be reused (packages.own_of_windows was" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "a number of frames from 4 on"),
        ({"window": "all"}, "give auto"),
        ({"window": 20}, "longer than the sequence of 10 frames"),
        ({"window": 6, "overlap": 6}, "at most 5"),
        ({"window": 6, "overlap": 0}, "give 1 or more"),
        ({"window": 6, "reference": 2}, "give auto or first"),
        ({"window": 6, "formats": "npz"}, "npz does not work with --window"),
        ({"window": 6, "images": "none"}, "link or copy"),
    ],
)
def test_what_cannot_be_is_one_line(tiny: nn.Module, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    images = torch.rand(10, 3, 28, 28)
    with pytest.raises(UserError, match=message) as raised:
        geoaccel.reconstruct_windows(images, model=tiny, out=tmp_path / "out", size=28, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert not unfinished_folder(resolve(tmp_path / "out")).exists()


def test_frames_of_another_size_are_named_before_anything_is_predicted_or_left_out(
    tiny: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = photographs(tmp_path / "photos", 10)
    others = photographs(tmp_path / "others", 8, size=(63, 42))
    given = [*paths[:8], others[7], paths[8], paths[9]]
    options: dict[str, Any] = {"model": tiny, "window": 6, "overlap": 3, "size": 28, "formats": "tum", "loops": False}
    stop = Stopping(tiny, 1, AssertionError())
    with pytest.raises(UserError, match=r"frame_007.png is 42x63, .*000.png is 42x42: .*one shape.*--skip-bad"):
        geoaccel.reconstruct_windows(given, out=tmp_path / "out", **options)
    stop.handle.remove()
    assert not unfinished_folder(resolve(tmp_path / "out")).exists()
    result = geoaccel.reconstruct_windows(given, out=tmp_path / "out", skip_bad=True, **options)
    ((name, why),) = result.left_out.items()
    assert name.endswith("others/frame_007.png")
    assert why.startswith("it is 42x63, ")
    assert "1 of 11 images are left out because their shape differs" in caplog.text
    assert result.names == [f"photos/{path.name}" for path in paths]
    stamps = [stamp for path in (tmp_path / "out").rglob("trajectory.txt") for stamp in np.loadtxt(path, ndmin=2)[:, 0]]
    assert sorted(stamps) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]


@dataclass(frozen=True)
class Made:
    """A picture whose size is not known before it is read."""

    picture: FilePicture
    path: None = None

    @property
    def name(self) -> str:
        return self.picture.name

    def read(self) -> Image.Image:
        return self.picture.read()


def test_a_frame_whose_size_shows_late_is_named_and_the_rest_is_kept(tiny: nn.Module, tmp_path: Path) -> None:
    paths = [*photographs(tmp_path / "photos", 8), photographs(tmp_path / "others", 9, size=(63, 42))[8]]
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"frame_008.png is 42x63.*one shape.*finished windows are kept") as raised:
        geoaccel.reconstruct_windows(
            [Made(FilePicture(path, path.name)) for path in paths], model=tiny, out=out, window=6, overlap=3, size=28
        )
    assert "same call" not in str(raised.value)  # which would find it again
    assert (unfinished_folder(resolve(out)) / "window_00000.safetensors").exists()
    assert not out.exists()


def test_a_frame_that_cannot_be_read_ends_it_or_is_left_out(tiny: nn.Module, tmp_path: Path) -> None:
    paths = photographs(tmp_path / "photos", 10)
    paths[7].write_bytes(paths[7].read_bytes()[:60])
    options: dict[str, Any] = {"model": tiny, "window": 6, "overlap": 3, "size": 28, "formats": "tum"}
    with pytest.raises(UserError, match=r"frame_007.*1 finished windows are kept"):
        geoaccel.reconstruct_windows(paths, out=tmp_path / "out", **options)
    forwards = []
    for out in ("good", "out"):  # anew, and from the window that was finished
        count = Stopping(tiny, -1, KeyboardInterrupt())
        result = geoaccel.reconstruct_windows(paths, out=tmp_path / out, skip_bad=True, **options)
        count.handle.remove()
        forwards.append(count.count)
        assert list(result.left_out) == ["frame_007.png"]
        assert len(result.names) == 9
    assert forwards[1] == forwards[0] - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "good")


def test_why_an_image_was_left_out_is_known_after_an_interruption(tiny: nn.Module, tmp_path: Path) -> None:
    paths = photographs(tmp_path / "photos", 14)
    for bad in (1, *range(9, 12)):  # one of the first window, and all that would come with the third
        paths[bad].write_bytes(paths[bad].read_bytes()[:60])
    options: dict[str, Any] = {"model": tiny, "window": 6, "overlap": 3, "size": 28, "formats": "tum", "loops": False}
    options |= {"skip_bad": True, "wide": False}
    whole = geoaccel.reconstruct_windows(paths, out=tmp_path / "whole", **options)
    stop = Stopping(tiny, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        geoaccel.reconstruct_windows(paths, out=tmp_path / "out", **options)
    stop.handle.remove()
    again = geoaccel.reconstruct_windows(paths, out=tmp_path / "out", **options)
    assert again.left_out == whole.left_out
    assert list(again.left_out) == [paths[bad].name for bad in (1, 9, 10, 11)]
    assert all("cannot be decoded" in why for why in again.left_out.values())


def test_windows_with_images_left_out_are_not_taken_where_none_may_be(tmp_path: Path) -> None:
    settings = {"skip_bad": False, "window": 6}
    Store(tmp_path / "out", settings)
    for skip_bad, discarded in ((True, None), (True, None), (False, "skip_bad was True, is now False")):
        assert Store(tmp_path / "out", {**settings, "skip_bad": skip_bad}).discarded == discarded


def test_a_full_disk_is_one_line_and_windows_are_kept(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = photographs(tmp_path / "photos", 10)
    write = Store.write

    def full(self: Store, name: str, window: Any) -> None:
        if name == "window_00001":
            raise DiskFull(errno.ENOSPC, "cannot write")
        write(self, name, window)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(DiskFull, match="1 finished windows are kept"):
        geoaccel.reconstruct_windows(paths, model=tiny, out=tmp_path / "out", window=6, overlap=3, size=28)
    monkeypatch.setattr(Store, "write", write)
    geoaccel.reconstruct_windows(paths, model=tiny, out=tmp_path / "out", window=6, overlap=3, size=28, formats="tum")
    assert (tmp_path / "out" / "files.json").exists()
