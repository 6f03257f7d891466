"""What reconstruct says of a run, and how it compares with the dense model."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import checkpoint, refused, run, write_images  # noqa: F401 (a fixture)
from torch import nn

import geoaccel
from geoaccel import account
from geoaccel.account import stages, watched
from geoaccel.backbone import BACKBONES
from geoaccel.merging.layers import Layers
from geoaccel.models.weights import save_model
from geoaccel.quantization import W4A16
from geoaccel.testing import tiny_network
from geoaccel.tuned import TunedPlan, of_weights


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_bar_over_encoder_layers_and_heads(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    model = tiny_network(name)
    parts = stages(model)
    order = list(dict.fromkeys(parts.values()))
    assert order == ["encoder", "heads"] if name == "da3" else order[:3] == ["encoder", "layers", "heads"]  # one trunk
    with watched(model, shows=True) as found:
        model(torch.rand(1, 2, 3, 28, 28))
    assert found["memory_gib"] >= 0
    shown = capsys.readouterr().err
    assert "reconstructing" in shown
    assert not any(part._forward_hooks for part in model.modules() if isinstance(part, nn.Module))


def test_what_was_done_is_said(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos")
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "npz", "--size", "56", "--dtype", "float32")
    code, out, err = run(capsys, *args, "--merging", "httm", "--quantization", "w4a16", "--out", tmp_path / "scene")
    assert code == 0, err
    assert "HTTM in global attention: 0% of the queries and 0% of the keys left out" in err
    assert "x dense: " in err  # so few tokens are left alone
    (packed,) = (line for line in err.splitlines() if line.startswith("quantization of "))
    assert ": w4a16; " in packed
    assert "s dense" in err
    assert "predicted" in err
    said = json.loads(out)
    assert said["predicted_dense_seconds"] > 0
    assert said["predicted_memory_gib"] > 0
    assert said["memory_gib"] >= 0


def test_the_result_names_what_acts(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    model = geoaccel.accelerate(geoaccel.load_model(checkpoint), quantization=W4A16(group_size=16))
    plan, quantized = tmp_path / "plan.yaml", tmp_path / "w4.safetensors"
    save_model(model, quantized, dtype=torch.float32)
    TunedPlan(of_weights(model), Layers.read({0: "httm", 1: "frame-only"})).write(plan, 2)
    args = (
        "reconstruct",
        write_images(tmp_path / "photos", 6),
        "--model",
        quantized,
        "--dtype",
        "float32",
        "--size",
        56,
    )
    args = (*args, "--plan", plan, "--attention", "matmul")
    acts = {"merging": "httm,frame-only", "quantization": "w4a16", "plan": str(plan), "attention": "matmul"}
    for number, more in enumerate((["--formats", "npz"], ["--formats", "tum", "--window", 4])):
        code, out, err = run(capsys, *args, *more, "--out", tmp_path / str(number))
        assert code == 0, err
        assert acts.items() <= json.loads(out).items()


def test_compare_dense(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos = write_images(tmp_path / "photos")
    args = ("reconstruct", photos, "--model", checkpoint, "--formats", "npz", "--size", "56", "--dtype", "float32")
    code, out, err = run(capsys, *args, "--quantization", "w4a16", "--compare", "dense", "--out", tmp_path / "scene")
    assert code == 0, err
    said = json.loads(out)
    assert f"against the dense model: {said['dense_seconds']:.1f} s dense, {said['seconds']:.1f} s" in err
    dense = geoaccel.reconstruct(photos, model=geoaccel.load_model(checkpoint), size=56)
    packed = geoaccel.accelerate(geoaccel.load_model(checkpoint), quantization="w4a16")
    fast = geoaccel.reconstruct(photos, model=packed, size=56)
    wanted = ((fast.depth - dense.depth).abs() / dense.depth)[dense.mask].mean().item()
    assert said["fidelity_depth_abs_rel"] == pytest.approx(wanted, rel=0.05)
    assert wanted > 0
    refused(
        capsys, *args, "--compare", "dense", "--out", tmp_path / "b", says="--compare dense needs an accelerated model"
    )
    # Where nothing acts, a ratio of times would be one of chance.
    _, _, err = run(capsys, *args, "--merging", "asymmetric", "--compare", "dense", "--out", tmp_path / "c")
    (line,) = (line for line in err.splitlines() if line.startswith("against the dense model"))
    assert "outputs are identical, so times differ only by chance" in line
    assert not re.search(r"\d+\.\d\dx", line)


def test_what_is_compared_with_warns_no_more(
    checkpoint: Path, tmp_path: Path, capsys: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geoaccel.outliers.unlike", lambda alike: [1])
    args = ("reconstruct", write_images(tmp_path / "photos"), "--model", checkpoint, "--formats", "npz", "--size", "56")
    code, _, err = run(capsys, *args, "--quantization", "w4a16", "--compare", "dense", "--out", tmp_path / "scene")
    assert code == 0, err
    assert [record.name for record in caplog.records].count("geoaccel.outliers") == 1


def test_models_that_name_other_outliers_are_compared_on_the_same_images(
    checkpoint: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = iter([[1]])
    monkeypatch.setattr("geoaccel.outliers.unlike", lambda alike: next(named, []))
    photographs = write_images(tmp_path / "photos")
    args = ("reconstruct", photographs, "--model", checkpoint, "--formats", "npz", "--size", "56", "--drop-outliers")
    code, out, err = run(capsys, *args, "--quantization", "w4a16", "--compare", "dense", "--out", tmp_path / "scene")
    assert code == 0, err
    assert json.loads(out)["frames"] == len(list(photographs.iterdir())) - 1
    assert "against the dense model: " in err


@pytest.mark.parametrize(
    ("dense", "fast", "runs", "says"),
    [
        ([9.0, 2.0, 2.1, 2.2], [1.0, 1.0, 1.05], 3, "2.1 s dense, 1.0 s: 2.10x; depth"),
        ([0.0, 5.2, 2.0, 2.1], [1.0, 1.0, 1.0], 3, "2.1 s dense, 1.0 s: 2.10x (unreliable: times varied by 152 %, the"),
        ([0.0, 900.0], [400.0], 1, "900.0 s dense, 400.0 s: 2.25x; depth"),  # nobody waits for it three times
    ],
)
def test_a_gain_is_of_medians_and_says_how_rough_it_is(
    dense: list[float], fast: list[float], runs: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, asked = {"dense": iter(dense), "fast": iter(fast)}, []

    def again(model: str) -> Any:
        asked.append(model)
        return SimpleNamespace(found={"seconds": next(times[model])})

    changes = {"fidelity_depth_abs_rel": 0.1, "fidelity_point_distance": 0.1}
    replaced = {"accelerated": lambda _: nullcontext("dense"), "as_geometry": str, "fidelity": lambda *_: changes}
    for name, stand_in in replaced.items():
        monkeypatch.setattr(account, name, stand_in)
    found = account.against_dense(None, "fast", again)  # type: ignore[arg-type]
    assert asked == ["dense", *["fast", "dense"] * runs]  # the first is compared, and warms up
    assert says in account.compared(found)
