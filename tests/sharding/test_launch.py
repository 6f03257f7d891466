"""``torchrun -m geoaccel reconstruct``: the files of one process, and how all end where one cannot go on."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import checkpoint, write_images
from rank_processes import Ended, in_processes
from torch import nn

from geoaccel import prediction
from geoaccel.cli import main
from geoaccel.errors import UserError
from geoaccel.models.weights import save_model
from geoaccel.scene_command import OPTIONS as OPTIONS_OF_RECONSTRUCT
from geoaccel.sharding import launch

__all__ = ["checkpoint"]  # a fixture
OPTIONS = ("--formats", "npz,colmap-text", "--size", "56", "--device", "cpu")


def reconstruct(photos: Path, out: Path, checkpoint: Path, *more: str) -> int:
    return main(["reconstruct", str(photos), "--out", str(out), "--model", str(checkpoint), *OPTIONS, *more])


def arrays(out: Path) -> dict[str, np.ndarray]:
    (file,) = out.glob("*.npz")
    return dict(np.load(file))


def refused(ended: list[Ended], line: str, code: int = 2) -> None:
    """Every process ended with one line."""
    for one in ended:
        assert one.code == code, one.said
        (said,) = [line for line in one.said.splitlines() if line.startswith("geoaccel: ")]
        assert line in said
        assert "Traceback" not in one.said
    assert max(one.seconds for one in ended) - min(one.seconds for one in ended) < 10


@pytest.mark.parametrize("size", [2, 3])
def test_the_files_of_one_process(size: int, checkpoint: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 5)
    write_images(tmp_path / "taller", 1, size=(72, 80))
    shutil.move(tmp_path / "taller" / "0.jpg", photos / "4.jpg")  # of another shape, so that others are padded
    assert reconstruct(photos, tmp_path / "alone", checkpoint) == 0
    work = tmp_path / "processes"
    ended = in_processes(size, lambda _: reconstruct(photos, tmp_path / "shared", checkpoint), work, launched=True)
    assert [one.code for one in ended] == [0] * size, "\n".join(one.said for one in ended)
    alone, shared = arrays(tmp_path / "alone"), arrays(tmp_path / "shared")
    assert alone.keys() == shared.keys()
    for name, expected in alone.items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(shared[name], expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
        else:
            np.testing.assert_array_equal(shared[name], expected)
    printed = [(work / f"{rank}.out").read_text() for rank in range(size)]
    assert json.loads(printed[0])["frames"] == 5
    assert printed[1:] == [""] * (size - 1)
    assert f"{size} processes; global attention brought" in ended[0].said
    assert "5 cameras in " in ended[0].said
    assert not any("cameras" in one.said or "wrote" in one.said for one in ended[1:])


def test_what_differs_between_the_processes(checkpoint: Path, tiny: nn.Module, tmp_path: Path) -> None:
    photos = [write_images(tmp_path / f"photos{rank}", 4 - rank) for rank in range(2)]
    ended = in_processes(
        2, lambda rank: reconstruct(photos[rank], tmp_path / "a", checkpoint), tmp_path / "p", launched=True
    )
    refused(ended, "rank 1 has a different number of images from rank 0 (3, not 4)")
    other = tmp_path / "other.safetensors"
    with torch.no_grad():
        next(tiny.parameters()).mul_(1.5)
    save_model(tiny, other, dtype=torch.float32)
    models = [checkpoint, other]
    ended = in_processes(
        2, lambda rank: reconstruct(photos[0], tmp_path / "a", models[rank]), tmp_path / "q", launched=True
    )
    refused(ended, "rank 1 has a different checkpoint from rank 0")
    assert not (tmp_path / "a").exists()


def test_too_few_images_for_so_many(checkpoint: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 2)
    ended = in_processes(3, lambda _: reconstruct(photos, tmp_path / "a", checkpoint), tmp_path / "p", launched=True)
    refused(ended, "2 frames are too few for 3 processes; start at most 2")


def test_who_dies_or_fails_ends_the_others(checkpoint: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 4)
    usual = prediction._forward

    def dies(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*args)

    def fails(*args: Any) -> Any:
        if os.environ["RANK"] == "1":
            raise UserError("the images of this rank are bad")
        return usual(*args)

    def with_forward(forward: Callable[..., Any]) -> int:
        prediction._forward = forward  # in a process of its own
        return reconstruct(photos, tmp_path / "a", checkpoint)

    ended = in_processes(2, lambda _: with_forward(dies), tmp_path / "p", launched=True)
    assert ended[1].code == -signal.SIGKILL
    refused(ended[:1], "rank 1 (process ", code=1)
    assert abs(ended[0].seconds - ended[1].seconds) < 10

    ended = in_processes(2, lambda _: with_forward(fails), tmp_path / "q", launched=True)
    refused(ended, "the images of this rank are bad")
    assert ended[0].said.splitlines()[-1].startswith("geoaccel: rank 1: ")
    assert not (tmp_path / "a").exists()


# What each process does by itself, for its own images.
BY_ITSELF = {"points", "size", "mode", "masks", "square_pixels", "max_frames", "max_memory", "recursive", "tracks"}


def test_every_option_needs_all_images_or_not() -> None:
    assert set(OPTIONS_OF_RECONSTRUCT) - {*launch.ALL_FRAMES} == BY_ITSELF
    session = launch.SharedSession(ranks=None, watch=None, local=0)  # type: ignore[arg-type]
    usual = argparse.Namespace(**dict.fromkeys(launch.ALL_FRAMES), tracks="measure")
    session.check(usual)
    with pytest.raises(UserError, match="--tracks head needs all images in one process"):
        session.check(argparse.Namespace(**{**vars(usual), "tracks": "head"}))
    for option in launch.ALL_FRAMES:
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} needs all images in one process"):
            session.check(argparse.Namespace(**{**vars(usual), option: "given"}))


def test_what_needs_all_images(checkpoint: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 3)
    work = tmp_path / "p"
    ended = in_processes(
        2, lambda _: reconstruct(photos, tmp_path / "a", checkpoint, "--reference", "auto"), work, launched=True
    )
    refused(ended, "--reference needs all images in one process; leave it out under torchrun")


@pytest.mark.slow
def test_torchrun_itself(checkpoint: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "geoaccel"]
    command += ["reconstruct", str(photos), "--out", str(tmp_path / "a"), "--model", str(checkpoint), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "2 processes; global attention brought" in done.stderr
    assert (tmp_path / "a" / "files.json").exists()
