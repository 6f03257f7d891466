"""``geoaccel quantize`` as a user meets it: files, provenance, interruptions, one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from geoaccel import quantized_file
from geoaccel.cli import main
from geoaccel.eval.tools import quantize as quantization_command
from geoaccel.linears import quantized_linears
from geoaccel.models import build
from geoaccel.models.files import fingerprint, read_tensors
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization.calibrate.blocks import find_blocks

SIZES: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8],
    "dpt_layers": [0, 0, 1, 1], "heads": ["camera", "depth", "point"], "layer_scale": 0.3,
}  # fmt: skip
SMALL = ("--scenes", 2, "--frames", 2, "--group-size", 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = build("vggt", **SIZES)
    with torch.no_grad():  # a random camera may have no field of view at all, and then no focal length
        network.camera_head.pose_branch.fc2.bias[-2:] = 1.0
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    save_model(network, path, dtype=torch.float32)
    return path


@pytest.fixture
def quantize(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def command(action: str, *args: Any, model: Path | str = source) -> tuple[int, str, str]:
        try:
            code = main(["quantize", action, "--model", str(model), *map(str, args)])
        except SystemExit as exit:
            code = int(exit.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def provenance(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["provenance"])["calibration"]


@torch.no_grad()
def poses(path: str) -> Tensor:
    return load_model(path)(torch.rand(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0)))["pose_enc"]


def refused(result: tuple[int, str, str], says: str) -> None:
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("geoaccel: ")]
    assert code == 2, err
    assert len(lines) == 1, err
    assert says in lines[0]
    assert "Traceback" not in err


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = torch.randint(0, 255, (30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


# ------------------------------------------------------------------------------------------------- calibrate


def test_calibrate_by_answers(quantize: Any, source: Path) -> None:
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
    answers = [poses(f"{name}.safetensors") for name in "abcde"]
    assert all(not torch.equal(answers[i], answers[j]) for i in range(5) for j in range(i))


def test_calibrate_on_photographs(quantize: Any, tmp_path: Path) -> None:
    photos = photographs(tmp_path / "photos", 3)
    common = ("--quantization", "w4a16", "--search", "awq", "--frames", 2, "--out", "a.safetensors", "--images")
    assert quantize("calibrate", *common, photos)[0] == 0
    assert list(provenance("a.safetensors")["photographs"].values()) == [f"photos/{index}.png" for index in range(3)]
    (tmp_path / "empty").mkdir()
    refused(quantize("calibrate", *common, tmp_path / "empty", "--overwrite"), "the calibration set is empty")
    overlap = quantize("calibrate", *common, photos, "--overwrite", "--evaluation", photos)
    refused(overlap, "is also one of the evaluation")


def test_photographs_in_another_order_are_not_the_same_work(
    quantize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = photographs(tmp_path / "a", 2), photographs(tmp_path / "b", 3)
    args = ("--quantization", "w4a16", "--search", "awq", "--frames", 3, "--out", "a.safetensors", "--images")
    with monkeypatch.context() as patch:
        patch.setattr(quantization_command, "_bar", Interrupted(1))
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
        refused(found, "frame_blocks.1.norm1.weight holds NaN or infinite values; repair the checkpoint")


class Interrupted:
    """A bar at which a user presses Ctrl-C."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, items: Any, what: str, total: int) -> Iterator[Any]:
        for item in items:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield item


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
    told: list[str] = []
    assert not Path("a.safetensors").exists()
    for after in (1, 4, 10):  # while inputs are added up, while scales are searched, while layers are rounded
        with monkeypatch.context() as patch:
            patch.setattr(quantization_command, "_bar", Interrupted(after))
            code, _, err = quantize("calibrate", *args, "a.safetensors")
        assert code == 130
        assert err.splitlines()[-1].endswith("the same command goes on from there")
        assert not Path("a.safetensors").exists()
        told += [line for line in err.splitlines() if "exponent" in line]
    refused(quantize("calibrate", *args, "a.safetensors", "--all-tokens"), "unfinished work with other settings")
    with monkeypatch.context() as patch:
        patch.setattr("geoaccel.quantization.calibrate.calibration.of_networks", lambda: "edited")
        refused(quantize("calibrate", *args, "a.safetensors"), "is now 'edited'")
    code, _, err = quantize("calibrate", *args, "a.safetensors")
    assert code == 0, err
    told += [line for line in err.splitlines() if "exponent" in line]
    expected_lines = [line for line in whole.splitlines() if "exponent" in line]
    assert [line.strip() for line in before] == expected_lines[:4]
    # What was written when the process was killed is not done again; how much that was is chance.
    assert told == expected_lines[-len(told) :]
    assert 0 < len(told) <= len(expected_lines) - 4
    tensors, metadata = read_tensors(Path("a.safetensors"))
    expected, expected_metadata = read_tensors(Path("whole.safetensors"))
    assert all(torch.equal(tensors[name].float(), tensor.float()) for name, tensor in expected.items())
    assert json.loads(metadata["provenance"]) == json.loads(expected_metadata["provenance"])
    assert not Path("a.safetensors.progress").exists()


# ----------------------------------------------------------------------------------------------- sensitivity


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
    refused(both, "give --quantization or --allocation, and not both")
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
        patch.setattr(quantization_command, "_bar", Interrupted(2))
        assert quantize(*args, "--out", "s.json")[0] == 130
    monkeypatch.setattr("geoaccel.runtime.processor", lambda: "another CPU")
    refused(quantize(*args, "--out", "s.json"), "is now 'another CPU'")


def test_sensitivity_looks_at_its_place_first(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of somebody's, a folder, a full disk: all before anything is loaded."""
    monkeypatch.setattr("geoaccel.models.weights.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    args = ("sensitivity", "--quantization", "w4a16", "--out")
    Path("s.png").touch()
    Path("folder.json").mkdir()
    refused(quantize(*args, "s.json"), "s.png exists; choose another, or overwrite it")
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


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--scenes", 0), "nothing to calibrate on"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--frames", 0), "nothing to calibrate on"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--first-seed", 3), "on seed 3"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--first-seed", 8192), "of the report set"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--first-seed", 8192), "of the report set"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--shortlist", 0), "shortlist=0"),
        (("calibrate", "--quantization", "w4a16", "--out", "a.safetensors", "--co3d", "nowhere"), "nowhere"),
        (("calibrate", "--out", "a.safetensors"), "give --quantization or --allocation"),
        (("export", "--allocation", "nothing.json", "--out", "a.safetensors"), "nothing.json"),
        (("sensitivity", "--out", "s.json"), "give --quantization; known: fp8, w4a16"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.png"), "must be named .json"),
        (("sensitivity", "--quantization", "w4a16", "--out", "no/s.json"), "no folder no"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--rank-by", "poses"), "unknown effect 'poses'"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--scenes", 3), "too few to rank"),
        (("sensitivity", "--quantization", "w4a16", "--out", "s.json", "--budget-gb", 1e-6, "--scenes", 4), "a budget"),
    ],
)
def test_bad_options(quantize: Any, args: tuple[Any, ...], says: str) -> None:
    refused(quantize(*args), says)
    assert not list(Path().glob("*.safetensors"))


def test_a_damaged_allocation(quantize: Any) -> None:
    Path("s.json").write_text('{"allocation": {}}')
    refused(quantize("export", "--allocation", "s.json", "--out", "a.safetensors"), "no result of quantize sensitivity")


def test_an_allocation_that_leaves_every_block_float(quantize: Any, source: Path) -> None:
    Path("s.json").write_text(json.dumps({"allocation": {"methods": []}, "weights": fingerprint(str(source))}))
    refused(quantize("export", "--allocation", "s.json", "--out", "a.safetensors"), "leaves nothing to quantize")


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
