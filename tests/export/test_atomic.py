"""Result folders: complete or not there, and no other file is touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from analytic_scene import load
from export_scenes import checked_memory, small  # noqa: F401 (fixtures)
from safetensors.torch import load_file

from geoaccel import atomic, export
from geoaccel.errors import DiskFull
from geoaccel.reconstruction import reconstruct

pytestmark = pytest.mark.usefixtures("checked_memory")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(small, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    assert "npz" in export.FORMATS
    monkeypatch.setitem(export.FORMATS._entries, "npz", fail)
    with pytest.raises(error):
        small.save(tmp_path / "out", ["ply", "npz"])
    assert os.listdir(tmp_path) == []

    monkeypatch.undo()
    small.save(tmp_path / "out", ["ply"])
    assert "npz" in export.FORMATS
    monkeypatch.setitem(export.FORMATS._entries, "npz", fail)
    with pytest.raises(error):
        small.save(tmp_path / "out", ["npz"], overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "points.ply").exists()


def test_overwriting_replaces_an_earlier_result_and_nothing_else(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is free
    small.save(out, ["ply"])
    with pytest.raises(FileExistsError, match="not empty"):
        small.save(out, ["npz"])
    small.save(out, ["npz"], overwrite=True)
    assert sorted(os.listdir(out)) == [atomic.MANIFEST, "reconstruction.npz"]
    assert os.listdir(tmp_path) == ["out"]

    (out / "images").mkdir()
    (out / "images" / "mine.jpg").touch()
    with pytest.raises(FileExistsError, match=r"images/mine\.jpg"):
        small.save(out, ["npz"], overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(FileExistsError, match=r"a\.jpg"):
        small.save(tmp_path / "photos", ["npz"], overwrite=True)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    with atomic.atomic_folder(tmp_path / "out") as work:
        (work / "old").touch()

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr(atomic.os, "rename", fail)
    with pytest.raises(OSError, match="disk"), atomic.atomic_folder(tmp_path / "out", overwrite=True) as work:
        (work / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "old").exists()


@pytest.mark.parametrize("place", ["mount point", "working folder"])
def test_a_folder_that_exists_stays_the_same_one(small, tmp_path, monkeypatch, place):
    out = tmp_path / "out"
    out.mkdir()
    number, rename = out.stat().st_ino, os.rename

    def busy(source, target):
        if out in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(out))
        rename(source, target)

    if place == "mount point":
        monkeypatch.setattr(os, "rename", busy)  # Path.rename calls it, too
    else:
        monkeypatch.chdir(out)
        out = Path(".")
    small.save(out, ["ply"])
    small.save(out, ["npz", "nerfstudio"], overwrite=True)
    assert sorted(os.listdir(out)) == [
        atomic.MANIFEST, "images", "points.ply", "reconstruction.npz", "transforms.json"
    ]  # fmt: skip
    assert out.stat().st_ino == (tmp_path / "out").stat().st_ino == number
    listed = json.loads((out / atomic.MANIFEST).read_text())["files"]
    assert {*listed, atomic.MANIFEST} == {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}


def test_what_marks_a_result_as_complete_goes_first_and_comes_last(tmp_path, monkeypatch):
    out, rename, seen = tmp_path / "out", os.rename, []
    out.mkdir()

    def watch(source, target):
        rename(source, target)
        seen.append((Path(source).name, (out / atomic.MANIFEST).exists()))

    monkeypatch.setattr(atomic.os, "rename", watch)
    for names in ("az", "by"):
        with atomic.atomic_folder(out, overwrite=True) as work:
            for name in names:
                (work / name).touch()
    M = atomic.MANIFEST
    assert seen == [
        ("a", False), ("z", False), (M, True),
        (M, False), ("z", False), ("a", False), ("b", False), ("y", False), (M, True),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(5))
def test_a_replacement_that_fails_anywhere_is_undone(tmp_path, monkeypatch, step, after, error):
    out, rename, calls = tmp_path / "out", os.rename, []
    with atomic.atomic_folder(out) as work:
        (work / "points").write_text("old")
        (work / "old").touch()
    before = {path.name: path.read_text() for path in out.iterdir()}

    def fail_once(source, target):
        calls.append(source)
        if len(calls) == step + 1 and not after:
            raise error("disk")
        rename(source, target)
        if len(calls) == step + 1:
            raise error("disk")

    monkeypatch.setattr(atomic.os, "rename", fail_once)
    with pytest.raises(error, match="disk"), atomic.atomic_folder(out, overwrite=True) as work:
        (work / "points").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_two_runs_in_one_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with atomic.atomic_folder(out) as work:
        (work / "a").touch()
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=r"another run is writing to the output folder .*out; wait"):
                atomic.check_output_folder(out, overwrite=overwrite)
    assert sorted(os.listdir(out)) == ["a", atomic.MANIFEST]

    # What another process puts there meanwhile is not replaced.
    def write_beside_another():
        with atomic.atomic_folder(out, overwrite=True) as work:
            (work / "mine").write_text("new")
            (out / "mine").write_text("theirs")

    with pytest.raises(FileExistsError, match="contains mine"):
        write_beside_another()
    assert (out / "mine").read_text() == "theirs"
    assert sorted(os.listdir(out)) == ["a", atomic.MANIFEST, "mine"]


def test_overwriting_spares_the_images(tmp_path):
    """Also as links, from either side."""
    batch, model = load(tmp_path / "photos", "crop")
    result = reconstruct(batch, model=model)
    out = tmp_path / "out"
    with atomic.atomic_folder(out) as work:
        for path in result.paths:
            (work / path.name).write_bytes(path.read_bytes())
        (work / "link.png").symlink_to(result.paths[0])
    (tmp_path / "link.png").symlink_to(out / "photo_0.png")
    before = sorted(os.listdir(out))
    for path in (out / "photo_0.png", out / "link.png", tmp_path / "link.png"):
        result.paths[0] = path
        with pytest.raises(FileExistsError, match=r"which lies in the output folder .* choose another output folder"):
            result.save(out, ["npz"], overwrite=True)
        assert sorted(os.listdir(out)) == before
    result.paths[0] = batch.paths[1]
    result.save(out, ["npz"], overwrite=True)
    assert sorted(os.listdir(out)) == [atomic.MANIFEST, "reconstruction.npz"]


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    """One that still makes folders."""

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    for out in (tmp_path, tmp_path / "new" / "out"):
        with pytest.raises(OSError, match=r"cannot write to .* \(no space left on device\); choose another"):
            atomic.check_output_folder(out)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(small, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        small.save(tmp_path / "file", ["npz"])
    with pytest.raises(OSError, match=r"cannot write to .*not a directory"):
        small.save(tmp_path / "file" / "out", ["npz"])

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"cannot write to .* \(permission denied\)") as caught:
        small.save(tmp_path / "out", ["npz"])
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_new_folders_have_ordinary_permissions(small, tmp_path):
    small.save(tmp_path / "out", ["npz"])
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_appears_whole_and_an_earlier_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    atomic.write_text(path, "{}")

    def fail(temporary):
        temporary.write_text("half")
        assert (temporary.parent, path.read_text()) == (tmp_path, "{}")
        raise RuntimeError

    with pytest.raises(RuntimeError), atomic.atomic_file(path) as temporary:
        fail(temporary)
    with pytest.raises(KeyboardInterrupt), atomic.atomic_tensors(path, {"a": torch.ones(2)}, {}):
        raise KeyboardInterrupt
    assert (os.listdir(tmp_path), path.read_text()) == (["notes.json"], "{}")
    monkeypatch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        atomic.write_bytes(path, b"new")
    assert (os.listdir(tmp_path), path.read_text()) == (["notes.json"], "{}")


@pytest.mark.parametrize("error", [None, errno.EINVAL, errno.ENOSPC])
def test_a_file_is_on_disk_before_it_has_its_name(error, tmp_path, monkeypatch):
    did = []
    replace = os.replace

    def fsync(handle):
        did.append("flushed")
        assert os.fstat(handle).st_size == 3
        if error is not None:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    monkeypatch.setattr(atomic.os, "replace", lambda *paths: (did.append("named"), replace(*paths)))
    path = tmp_path / "notes.json"
    if error == errno.ENOSPC:  # which some systems say only now
        with pytest.raises(DiskFull, match="no space left"):
            atomic.write_bytes(path, b"new")
        assert (did, os.listdir(tmp_path)) == (["flushed"], [])
    else:  # a file system that cannot
        atomic.write_bytes(path, b"new")
        assert (did, os.listdir(tmp_path)) == (["flushed", "named"], ["notes.json"])


def test_tensors_may_be_read_by_whom_any_new_file_may(tmp_path):
    atomic.write_text(tmp_path / "any", "")
    atomic.write_tensors(tmp_path / "t.safetensors", {"a": torch.arange(6).view(2, 3).T}, {"notes": "x"})
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert load_file(tmp_path / "t.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_files_are_renamed_in_one_place():
    """One atomic write for the package and its scripts."""
    root = Path(atomic.__file__).parents[1]
    sources = [p for folder in ("geoaccel", "models", "eval", "scripts") for p in (root / folder).rglob("*.py")]
    assert len(sources) > 150
    assert [str(p) for p in sources if "os.replace(" in p.read_text() and p.name != "atomic.py"] == []
