"""Where a quantized file may be written, what is left where it cannot, and what the command says."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from geoaccel import linears
from geoaccel.cli import main
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization import FP8, W4A16
from geoaccel.quantized_file import export_quantized


def command(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    try:
        code = main(["quantize", "export", *map(str, args)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.safetensors"
    args = ("--model", source, "--quantization", "w4a16", "--out", out)
    code, stdout, err = command(capsys, *args, "--group-size", 32, "--exclude", "*.fc2", "--dtype", "bfloat16")
    assert code == 0, err
    assert f"wrote {out}: " in stdout
    assert "w4a16(exclude=('*.fc2',), group_size=32)" in stdout
    assert "MB in bfloat16 (" in stdout
    assert "MB in float32 (" in stdout
    layers = linears.quantized_linears(load_model(out))
    assert {layer.method for layer in layers.values()} == {W4A16(exclude="*.fc2", group_size=32)}
    code, _, err = command(capsys, *args)
    assert (code, "exists; choose another name, or overwrite it (--overwrite)" in err) == (2, True)
    assert command(capsys, *args, "--overwrite", "--include", "*.qkv", "--include", "*.proj")[0] == 0
    assert all(name.endswith(("qkv", "proj")) for name in linears.quantized_linears(load_model(out)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--quantization": "w4a17"}, "Did you mean 'w4a16'"),
        ({"--quantization": "fp8", "--group-size": 32}, "fp8 has no group_size; leave out --group-size"),
        ({"--group-size": 12}, "group_size=12 must be a positive multiple of 8"),
        ({"--include": "agregator*"}, "matches no linear layer"),
        ({"--out": "missing/a.safetensors"}, "does not exist"),
        ({"--out": "a.pt"}, "must end in .safetensors"),
        ({"--model": "vgt-mini"}, "Did you mean 'vggt-mini'"),
        ({"--dtype": "fp16"}, "invalid choice: 'fp16'"),
    ],
)
def test_bad_commands(source: Path, tmp_path: Path, capsys: Any, change: dict[str, Any], says: str) -> None:
    out = tmp_path / "small.safetensors"
    options = {"--model": source, "--quantization": "w4a16", "--out": out, **change}
    if "--out" in change:
        options["--out"] = tmp_path / change["--out"]
    code, _, err = command(capsys, *(part for option in options.items() for part in option))
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("geoaccel: ")
    assert says in last
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Untouched(FP8):
    """The work must not begin."""

    def encode(self, *args: Any) -> Any:
        raise AssertionError("layers were quantized")


def only_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "source")


def test_places_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the work, and nothing is left there."""
    (tmp_path / "d.safetensors").mkdir()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"d\.safetensors is a folder; give a file"):
            export_quantized(str(source), [Untouched()], tmp_path / "d.safetensors", overwrite=overwrite)
    with pytest.raises(OSError, match=r"cannot write to /proc \(.*\); choose another file, or free some space"):
        export_quantized(str(source), [Untouched()], "/proc/a.safetensors")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write to .* \(no space left on device\)"):
        export_quantized(str(source), [Untouched()], tmp_path / "a.safetensors")
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="layers were quantized"):
        export_quantized(str(source), [Untouched()], tmp_path / "a.safetensors")
    assert only_files(tmp_path) == ["d.safetensors"]


def test_no_traceback_where_nothing_can_be_written(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "d.safetensors").mkdir()
    for out in ("/proc/a.safetensors", tmp_path / "d.safetensors"):
        code, _, err = command(capsys, "--model", source, "--quantization", "fp8", "--out", out, "--overwrite")
        assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert only_files(tmp_path) == ["d.safetensors"]


@pytest.mark.parametrize("error", [SafetensorError, OSError, KeyboardInterrupt])
def test_a_disk_that_fills_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    """An earlier file stays, and nothing of the new one."""
    out = tmp_path / "a.safetensors"
    out.write_text("earlier")

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_text("half")
        raise error("I/O error:\nNo space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    expected, says = (
        (error, "No space")
        if error is KeyboardInterrupt
        else (OSError, r"cannot write .*a\.safetensors \(i/o error: no space")
    )
    with pytest.raises(expected, match=says) as caught:
        export_quantized(str(source), [FP8()], out, overwrite=True)
    assert error is KeyboardInterrupt or "\n" not in str(caught.value)
    assert (only_files(tmp_path), out.read_text()) == (["a.safetensors"], "earlier")


def test_saving_over_a_folder(tiny: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.safetensors: it is a folder; name a file"):
        save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32)
    with pytest.raises(OSError, match=r"cannot write .*missing/a\.safetensors \(no such file or directory\)"):
        save_model(tiny, tmp_path / "missing" / "a.safetensors", dtype=torch.float32)
    assert only_files(tmp_path) == ["a.safetensors"]


def test_checkpoints_have_ordinary_permissions(source: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert source.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_quantizing_twice_and_onto_itself(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "small.safetensors"
    assert command(capsys, "--model", source, "--quantization", "fp8", "--out", out)[0] == 0
    code, _, err = command(capsys, "--model", out, "--quantization", "fp8", "--out", tmp_path / "b.safetensors")
    assert (code, "is quantized already (fp8)" in err) == (2, True)
    code, _, err = command(capsys, "--model", source, "--quantization", "fp8", "--out", source, "--overwrite")
    assert (code, "is the source" in err) == (2, True)
