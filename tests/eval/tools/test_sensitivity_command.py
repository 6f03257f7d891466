"""``geoaccel quantize sensitivity`` as a user meets it, and what the other actions do with its result."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Interrupted
from quantize_runs import refused
from torch import nn

from geoaccel.eval.tools import quantize as quantization_command
from geoaccel.linears import quantized_linears
from geoaccel.models.files import fingerprint
from geoaccel.models.weights import load_model, save_model


def test_sensitivity_and_the_mix_it_chooses(quantize: Any, source: Path) -> None:
    args = ("--quantization", "w4a16", "--group-size", 16, "--frames", 2, "--draws", 1)
    code, out, err = quantize("sensitivity", *args, "--scenes", 4, "--out", "s.json")
    assert code == 0, err
    assert "blocks protected as fp8" in out
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("s.json.progress").exists()
    document = json.loads(Path("s.json").read_text())
    assert document["allocation"]["protected"]
    assert {"auc_30_loss", "pose_deg"} <= set(document["units"][0]["effects"])
    assert quantize("export", "--allocation", "s.json", "--out", "a.safetensors")[0] == 0
    methods = [layer.method.name for layer in quantized_linears(load_model("a.safetensors")).values()]
    assert {"w4a16", "fp8"} == set(methods)
    header = int.from_bytes(Path("a.safetensors").read_bytes()[:8], "little") + 8
    assert Path("a.safetensors").stat().st_size - header == document["allocation"]["file_bytes"]
    mixed = ("--allocation", "s.json", "--search", "awq", "--scenes", 1, "--frames", 2)
    assert quantize("calibrate", *mixed, "--out", "b.safetensors")[0] == 0
    both = quantize("export", "--allocation", "s.json", "--quantization", "fp8", "--out", "c.safetensors")
    refused(both, "give --quantization fp8 or w4a16, or --allocation FILE, and not both")
    knobs = quantize("export", "--allocation", "s.json", "--group-size", 32, "--out", "c.safetensors")
    refused(knobs, "--group-size does not go with --allocation")
    refused(quantize("sensitivity", *args, "--scenes", 4, "--out", "s.json"), "s.json exists")
    other: nn.Module = load_model(source)
    with torch.no_grad():
        other.aggregator.camera_token.add_(1)  # type: ignore[union-attr, operator]
    save_model(other, "other.safetensors", dtype=torch.float32)
    elsewhere = quantize("export", "--allocation", "s.json", "--out", "c.safetensors", model="other.safetensors")
    refused(elsewhere, "measured on other weights")
    again = quantize("calibrate", "--quantization", "fp8", "--out", "c.safetensors", model="a.safetensors")
    refused(again, "is quantized already")
    refused(quantize("sensitivity", *args, "--out", "t.json", model="a.safetensors"), "is quantized already")


def test_figures_that_another_machine_began_are_not_gone_on_with(
    quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("sensitivity", "--quantization", "w4a16", "--group-size", 16, "--frames", 2, "--draws", 1, "--scenes", 4)
    with monkeypatch.context() as patch:
        patch.setattr(quantization_command, "bar", Interrupted(2, KeyboardInterrupt))
        assert quantize(*args, "--out", "s.json")[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr("geoaccel.runtime.processor", lambda: "another CPU")
        refused(quantize(*args, "--out", "s.json"), "is now 'another CPU'")
    monkeypatch.setattr("geoaccel.eval.tools.quantize.of_others", lambda classes: {"own": "edited"})
    refused(quantize(*args, "--out", "s.json"), "packages.own was None, is now 'edited'")


def test_sensitivity_looks_at_its_place_first(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image file, a folder, a full disk: refused before anything is loaded."""
    monkeypatch.setattr("geoaccel.models.weights.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    args = ("sensitivity", "--quantization", "w4a16", "--out")
    Path("s.png").touch()
    Path("folder.json").mkdir()
    refused(quantize(*args, "s.json"), "s.png exists; choose another name, or overwrite it")
    refused(quantize(*args, "folder.json", "--overwrite"), "folder.json is a folder")
    Path("s.json.progress").mkdir()  # cut off between the picture and the figures
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        quantize(*args, "s.json")
    Path("s.json.progress").rmdir()

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(quantize(*args, "t.json"), "cannot write to . (no space left on device)")
    assert sorted(os.listdir()) == ["folder.json", "s.png"]


def test_a_damaged_allocation(quantize: Any) -> None:
    Path("s.json").write_text('{"allocation": {}}')
    refused(
        quantize("export", "--allocation", "s.json", "--out", "a.safetensors"), "not a result of quantize sensitivity"
    )


def test_an_allocation_that_leaves_every_block_float(quantize: Any, source: Path) -> None:
    Path("s.json").write_text(json.dumps({"allocation": {"methods": []}, "weights": fingerprint(str(source))}))
    refused(quantize("export", "--allocation", "s.json", "--out", "a.safetensors"), "leaves nothing to quantize")
