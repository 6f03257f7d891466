"""The command line as tests call it, and images and a checkpoint to call it with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from geoaccel.cli import main
from geoaccel.models.weights import save_model


def write_images(folder: Path, count: int = 3, size: tuple[int, int] = (60, 80)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng(index)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture
def checkpoint(tiny: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    save_model(tiny, path, dtype=torch.float32)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys: pytest.CaptureFixture[str], *args: Any, says: str) -> None:
    code, _, err = run(capsys, *args)
    lines = err.strip().splitlines()
    assert code == 2, err
    assert says in lines[-1], err
    assert "Traceback" not in err
    assert len([line for line in lines if line.startswith("geoaccel: ")]) == 1, err


def commands(of: argparse.ArgumentParser, prefix: str = "") -> dict[str, set[str]]:
    """Every command with its options."""
    deeper = [action for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    if not deeper:
        return {prefix.strip(): {o for action in of._actions for o in action.option_strings} - {"-h", "--help"}}
    return {k: v for name, sub in deeper[0].choices.items() for k, v in commands(sub, f"{prefix} {name}").items()}
