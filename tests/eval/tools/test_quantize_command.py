"""``geoaccel quantize`` as a user meets it: files, provenance, interruptions, one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import Interrupted
from PIL import Image
from quantize_runs import SMALL, provenance, refused
from torch import Tensor

from geoaccel import quantized_file
from geoaccel.cli import main
from geoaccel.eval.tools import quantize as quantization_command
from geoaccel.models.files import read_tensors
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization.calibrate.blocks import find_blocks


@torch.no_grad()
def poses(path: str) -> Tensor:
    return load_model(path)(torch.rand(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0)))["pose_enc"]


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = torch.randint(0, 255, (30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


def test_calibrate_by_outputs(quantize: Any, source: Path) -> None:
    code, out, err = quantize(
        "calibrate",
        "--quantization",
        "w4a16",
        "--search",
        "task",
        "--out",
        "a.safetensors",
        *SMALL,
        "--shortlist",
        1,
        "--camera-token",
    )
    assert code == 0, err
    assert "w4a16(group_size=16)" in out
    assert "exponent" in err
    assert "camera token" in err
    said = provenance("a.safetensors")
    assert said["rendered_seeds"] == [1_000_000, 1_000_001]
    assert (said["search"], said["patches_only"], said["task"]["shortlist"]) == ("task", True, 1)
    assert said["rounding"] == "compensated"
    assert 0 < said["mean_error_over_nearest"] < 1
    assert set(said["task_terms"]) == {"rounded", "scaled"}
    assert set(said["exponents"]) == {
        f"{name}.{part}" for name in find_blocks(load_model(source)) for part in ("attn.qkv", "attn.proj", "mlp.fc1")
    }
    assert poses("a.safetensors").isfinite().all()
    assert hasattr(load_model("a.safetensors").camera_head, "compensation_token") == said["camera_token"]["kept"]
    assert not Path("a.safetensors.progress").exists()


def test_calibrate_layer_by_layer(quantize: Any) -> None:
    common = ("--quantization", "w4a16", *SMALL)
    assert quantize("calibrate", *common, "--out", "a.safetensors")[0] == 0
    assert quantize("calibrate", *common, "--all-tokens", "--out", "b.safetensors")[0] == 0
    assert quantize("export", "--quantization", "w4a16", "--group-size", 16, "--out", "c.safetensors")[0] == 0
    assert [provenance(f"{name}.safetensors")["patches_only"] for name in "ab"] == [True, False]
    assert provenance("a.safetensors")["search"] == "awq"
    assert provenance("a.safetensors")["mean_error_over_unscaled"] < 1
    assert quantize("calibrate", *common, "--rounding", "nearest", "--out", "d.safetensors")[0] == 0
    assert provenance("d.safetensors")["rounding"] == "nearest"
    assert quantize("calibrate", *common, "--search", "none", "--out", "e.safetensors")[0] == 0
    assert (provenance("e.safetensors")["search"], provenance("e.safetensors")["scaled_layers"]) == ("none", 0)
    refused(
        quantize("calibrate", *common, "--search", "none", "--rounding", "nearest", "--out", "f.safetensors"),
        "nothing to calibrate",
    )
    outputs = [poses(f"{name}.safetensors") for name in "abcde"]
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(5) for j in range(i))


def test_images_that_would_change_nothing_are_not_read(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--scenes", 2, "--frames", 2, "--out", "a.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(quantization_command, "_scenes", lambda args: SimpleNamespace())
        for args, why in (
            (("fp8", "--search", "none"), ", which fp8 cannot do,"),
            (("fp8", "--search", "none", "--rounding", "nearest"), ""),
            (("w4a16", "--search", "none", "--rounding", "nearest"), ""),
        ):
            says = f"without compensated rounding{why} there is nothing to calibrate; quantize without data"
            refused(quantize("calibrate", "--quantization", *args, *small), says)
    code, _, err = quantize("calibrate", "--quantization", "fp8", "--search", "none", "--camera-token", *small)
    assert code == 0, err
    assert "camera token: " in err
    assert (provenance("a.safetensors")["search"], provenance("a.safetensors")["rounding"]) == ("none", "nearest")


def test_rounding_is_called_compensated_where_it_is(quantize: Any) -> None:
    code, _, err = quantize(
        "calibrate", "--quantization", "fp8", "--scenes", 2, "--frames", 2, "--out", "a.safetensors"
    )
    assert code == 0, err
    assert (provenance("a.safetensors")["search"], provenance("a.safetensors")["rounding"]) == ("awq", "nearest")
    assert "mean_error_over_nearest" not in provenance("a.safetensors")


def test_calibrate_on_images(quantize: Any, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 3)
    common = ("--quantization", "w4a16", "--search", "awq", "--frames", 2, "--out", "a.safetensors", "--images")
    assert quantize("calibrate", *common, photos)[0] == 0
    assert list(provenance("a.safetensors")["photographs"].values()) == [f"photos/{index}.png" for index in range(3)]
    (tmp_path / "empty").mkdir()
    refused(quantize("calibrate", *common, tmp_path / "empty", "--overwrite"), "the calibration set is empty")
    overlap = quantize("calibrate", *common, photos, "--overwrite", "--evaluation", photos)
    refused(overlap, "is also in the evaluation set")


def test_images_in_another_order_are_not_the_same_work(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_images(tmp_path / "a", 2), write_images(tmp_path / "b", 3)
    args = ("--quantization", "w4a16", "--search", "awq", "--frames", 3, "--out", "a.safetensors", "--images")
    with monkeypatch.context() as patch:
        patch.setattr(quantization_command, "bar", Interrupted(1, KeyboardInterrupt))
        assert quantize("calibrate", *args, first, second)[0] == 130
    refused(quantize("calibrate", *args, second, first), "unfinished work with other settings (clips was")
    assert quantize("calibrate", *args, first, second)[0] == 0


def test_weights_that_are_no_numbers_are_refused_at_once(quantize: Any, source: Path) -> None:
    network: Any = load_model(source)
    with torch.no_grad():
        network.aggregator.frame_blocks[1].norm1.weight[2] = torch.nan
    save_model(network, "nan.safetensors", dtype=torch.float32)
    for action in (("export",), ("calibrate", *SMALL)):
        found = quantize(*action, "--quantization", "w4a16", "--out", "a.safetensors", model="nan.safetensors")
        refused(found, "frame_blocks.1.norm1.weight contains NaN or infinite values; repair the checkpoint")


def test_interrupted_calibration_goes_on(
    quantize: Any, source: Path, monkeypatch: pytest.MonkeyPatch, this_processor: None
) -> None:
    args = ("--quantization", "w4a16", "--search", "task", *SMALL, "--shortlist", 1, "--out")
    code, _, whole = quantize("calibrate", *args, "whole.safetensors")
    assert code == 0
    # Without a chance to say anything, in the middle of the search.
    script = "from geoaccel.cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", script, "quantize", "calibrate", "--model", source, *args, "a.safetensors"]
    killed = subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums depend on it in the last bit
    )  # fmt: skip
    assert killed.stderr is not None
    before = [next(line for line in killed.stderr if "exponent" in line) for _ in range(4)]
    killed.kill()
    killed.wait(timeout=20)
    reported: list[str] = []
    assert not Path("a.safetensors").exists()
    for after in (1, 4, 10):  # while inputs are added up, while scales are searched, while layers are rounded
        with monkeypatch.context() as patch:
            patch.setattr(quantization_command, "bar", Interrupted(after, KeyboardInterrupt))
            code, _, err = quantize("calibrate", *args, "a.safetensors")
        assert code == 130
        assert err.splitlines()[-1].endswith("the same command goes on from there")
        assert not Path("a.safetensors").exists()
        reported += [line for line in err.splitlines() if "exponent" in line]
    refused(quantize("calibrate", *args, "a.safetensors", "--all-tokens"), "unfinished work with other settings")
    with monkeypatch.context() as patch:
        patch.setattr("geoaccel.quantization.calibrate.calibration.of_networks", lambda: "edited")
        refused(quantize("calibrate", *args, "a.safetensors"), "is now 'edited'")
    with monkeypatch.context() as patch:
        patch.setattr("geoaccel.quantization.calibrate.calibration.of_others", lambda classes: {"own": "edited"})
        refused(quantize("calibrate", *args, "a.safetensors"), "packages.own was None, is now 'edited'")
    code, _, err = quantize("calibrate", *args, "a.safetensors")
    assert code == 0, err
    reported += [line for line in err.splitlines() if "exponent" in line]
    expected_lines = [line for line in whole.splitlines() if "exponent" in line]
    assert [line.strip() for line in before] == expected_lines[:4]
    # What was written when the process was killed is not done again; how much that was is chance.
    assert reported == expected_lines[-len(reported) :]
    assert 0 < len(reported) <= len(expected_lines) - 4
    tensors, metadata = read_tensors(Path("a.safetensors"))
    expected, expected_metadata = read_tensors(Path("whole.safetensors"))
    assert all(torch.equal(tensors[name].float(), tensor.float()) for name, tensor in expected.items())
    assert json.loads(metadata["provenance"]) == json.loads(expected_metadata["provenance"])
    assert not Path("a.safetensors.progress").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--scenes", 0), "nothing to calibrate on"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--frames", 0), "nothing to calibrate on"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--first-seed", 3), "on seed 3"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--first-seed", 8192), "in the report set"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--first-seed", 8192), "in the report set"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--shortlist", 0), "shortlist=0"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--co3d", "nowhere"), "nowhere"),
        (
            ("calibrate", "--out", "a.safetensors"),
            "give --quantization fp8 or w4a16, or --allocation FILE, and not both",
        ),
        (("export", "--allocation", "nothing.json", "--out", "a.safetensors"), "nothing.json"),
        (("sensitivity", "--out", "s.json"), "give --quantization fp8 or w4a16"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.png"), "must end in .json"),
        (("sensitivity", "--quantization", "w4a16", "--out", "no/s.json"), "the folder no"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--rank-by", "poses"), "unknown effect 'poses'"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--scenes", 3), "too few to rank"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--budget-gb", 1e-6, "--scenes", 4), "a budget"),
    ],
)
def test_bad_options(quantize: Any, args: tuple[Any, ...], says: str) -> None:
    refused(quantize(*args), says)
    assert not list(Path().glob("*.safetensors"))


def test_info_knows_the_licence_of_what_a_file_was_made_from(
    quantize: Any, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def licence() -> str:
        assert main(["info", "a.safetensors"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("licence"))

    args = ("export", "--quantization", "w4a16", "--group-size", 16, "--out", "a.safetensors", "--overwrite")
    assert quantize(*args, model="vggt-mini")[0] == 0
    assert licence().endswith("scenes; made from vggt-mini)")
    assert quantize(*args)[0] == 0
    assert "not recorded" in licence()
    monkeypatch.setattr(quantized_file, "provenance_of", lambda *_: {"source": "facebook/VGGT-1B"})
    assert quantize(*args)[0] == 0
    assert licence() == "licence: VGGT License v1, non-commercial use only; made from facebook/VGGT-1B"
