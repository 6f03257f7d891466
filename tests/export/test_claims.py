"""Output folders and several processes: one at a time, nothing stays of a dead one, and full disks name the file."""

from __future__ import annotations

import errno
import fcntl
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import refused, run, write_images
from references import Golden

import geoaccel
from geoaccel import atomic, claims
from geoaccel.atomic import atomic_folder, check_output_folder
from geoaccel.claims import claimed
from geoaccel.errors import DiskFull, UserError
from geoaccel.eval.run.engines import predict_one
from geoaccel.models.weights import save_model
from geoaccel.workers import reason_to_go_on


@contextmanager
def another_process(context: str, out: Path) -> Iterator[int]:
    """A process that is in one of the two contexts with `out` until it is killed at the end."""
    program = f"""
import signal, sys
from pathlib import Path
from geoaccel.atomic import atomic_folder
from geoaccel.claims import claimed

with {context}(Path(sys.argv[1])) as place:
    (place / "half").write_text("x") if place else None
    print("entered", flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "entered\n", "it ended early"
            yield process.pid
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with another_process("atomic_folder", out):
        before = names(tmp_path)
        assert any(name.endswith(".geoaccel.tmp/half") for name in before)
        for attempt in (lambda: check_output_folder(out), lambda: atomic_folder(out).__enter__()):
            with pytest.raises(FileExistsError, match=r"another run is writing to .*/out; wait until"):
                attempt()
        assert names(tmp_path) == before
    assert names(tmp_path) == before  # it was killed
    with claimed(out):
        assert names(claims.hidden_folder(out)) == []
    with atomic_folder(out) as work:
        assert list(work.iterdir()) == []
        (work / "points").touch()
    assert names(tmp_path) == ["out", f"out/{atomic.MANIFEST}", "out/points"]


def test_the_second_process_is_refused_before_it_computes(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(geoaccel, "load_model", None)
    monkeypatch.setattr("geoaccel.eval.tools.demo.load_model", None)
    out, photos = tmp_path / "out", write_images(tmp_path / "photos")
    with another_process("claimed", out):
        refused(capsys, "reconstruct", photos, "--out", out, says=f"writing to the output folder {out}")
        refused(capsys, "demo", "--out", out, says="another run is writing")


def test_commands_have_their_folder_from_before_the_model_is_loaded(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out, photos = tmp_path / "out", write_images(tmp_path / "photos")

    def load(*_: Any, **__: Any) -> None:
        with pytest.raises(FileExistsError, match="another run is writing"), claimed(out):
            pass
        raise UserError("it has the folder")

    monkeypatch.setattr(geoaccel, "load_model", load)
    monkeypatch.setattr("geoaccel.eval.tools.demo.load_model", load)
    refused(capsys, "reconstruct", photos, "--out", out, says="it has the folder")
    refused(capsys, "demo", "--out", out, says="it has the folder")
    assert names(tmp_path) == ["photos", *(f"photos/{i}.jpg" for i in range(3))]


def test_a_claim_is_for_its_process_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with claimed(out):
        check_output_folder(out)
        with pytest.raises(FileExistsError, match="another run"), claimed(out):
            pass
        with atomic_folder(out) as work:
            (work / "points").touch()
        with atomic_folder(out, overwrite=True) as work:
            (work / "more").touch()
        assert names(out) == [atomic.MANIFEST, "more"]
    assert names(tmp_path / "a" / "b") == ["out", f"out/{atomic.MANIFEST}", "out/more"]
    with claimed(tmp_path / "c" / "d"):
        pass
    assert names(tmp_path)[-1] == "a/b/out/more"  # no folder c


def test_the_loser_is_told(tmp_path: Path) -> None:
    """Two that were begun by means that do not know of each other."""
    out = tmp_path / "out"

    def write() -> None:
        with atomic_folder(out) as work:
            (work / "points").touch()
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(FileExistsError, match=r"created by another program meanwhile, and this result is lost; choose"):
        write()
    assert names(tmp_path) == ["out", "out/theirs"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    out = tmp_path / "out"
    with atomic_folder(out) as work:
        (work / "points").touch()
    left = claims.hidden_folder(out)
    left.mkdir()
    with pytest.raises(FileExistsError, match=r"was killed; choose another output folder, or delete it if no other"):
        check_output_folder(out, overwrite=True)
    assert left.is_dir()


def test_a_run_that_was_killed_while_it_replaced_a_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as work:
        (work / "points").touch()
    (out / ".geoaccel.old").mkdir()  # before the first file was moved, or after the last
    check_output_folder(out, overwrite=True)
    assert names(out) == [atomic.MANIFEST, "points"]
    (out / ".geoaccel.old").mkdir()
    (out / atomic.MANIFEST).rename(out / ".geoaccel.old" / atomic.MANIFEST)
    with pytest.raises(
        FileExistsError,
        match=r"contains \.geoaccel\.old, an earlier result that a run was",
    ):
        check_output_folder(out, overwrite=True)


# ---------------------------------------------------------------------------------------------- full disks


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """The system refuses to make a file larger; what it says differs from a full disk in the number alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_there_is_no_room_for_are_named(tmp_path: Path) -> None:
    def folder() -> None:
        with atomic_folder(tmp_path / "out") as work:
            (work / "points").write_bytes(bytes(100_000))

    path = tmp_path / "a.safetensors"
    for write, named in (
        (lambda: atomic.write_tensors(path, {"a": torch.zeros(30_000)}, {}), path),
        (lambda: atomic.write_bytes(path, bytes(100_000)), path),
        (folder, tmp_path / "out"),
    ):
        with (
            pytest.raises(DiskFull, match=rf"^cannot write {named} \(.*file too large.*\); free some") as e,
            room_for(9999),
        ):
            write()
        assert "\n" not in str(e.value)
        assert names(tmp_path) == []


def test_libraries_that_only_say_that_nothing_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save() -> None:
        with atomic.atomic_file(tmp_path / "a.npy") as path:
            np.zeros(100_000, np.uint8).tofile(path)

    with pytest.raises(OSError, match="requested and"), room_for(9999):
        save()
    monkeypatch.setattr(atomic, "_no_room", lambda folder: True)
    with pytest.raises(DiskFull, match=r"cannot write .*/a\.npy"), room_for(9999):
        save()


def test_an_evaluation_stops_at_a_full_disk_and_says_how_it_goes_on() -> None:
    class Full:
        def unfinished(self, name: str) -> None: ...

        def write(self, name: str, prediction: Any) -> None:
            raise DiskFull("cannot write a (no space left on device); free some space")

    class Scene:
        name = "a"

    with pytest.raises(DiskFull, match=r"cannot write a .*; predictions of finished scenes are kept, and the same"):
        predict_one(lambda scene, unfinished: None, Scene(), Full())
    assert reason_to_go_on(DiskFull("full")) is None
    assert reason_to_go_on(OSError("an image is gone")) == "an image is gone"


def test_commands_on_a_full_disk(tmp_path: Path, capsys: Any) -> None:
    """One line that names the place, nothing left, and the same command works when there is room."""
    model, photos = tmp_path / "tiny.safetensors", write_images(tmp_path / "photos")
    save_model(Golden("vggt_tiny", "vggt").network(), model, dtype=torch.float32)
    before = names(tmp_path)
    command = ("reconstruct", photos, "--out", tmp_path / "out", "--model", model, "--size", "56", "--formats", "npz")
    with room_for(20_000):
        refused(capsys, *command, says=f"cannot write {tmp_path / 'out'} (file too large); free some space")
    assert names(tmp_path) == before
    assert run(capsys, *command)[0] == 0
