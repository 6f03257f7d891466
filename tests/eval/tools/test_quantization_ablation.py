"""The ablation: every row is what its name says, all rows see the same scenes, and an interrupted one goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geoaccel.eval.metrics.effects import EFFECTS
from geoaccel.eval.tools.ablation import ROWS, Ablation, Rows, ablation_table, run_ablation
from geoaccel.linears import quantized_linears
from geoaccel.models import build
from geoaccel.quantization import W4A16, quantize
from geoaccel.quantization.calibrate.progress import Progress

SMALL = Ablation(
    scenes=2, frames=2, seeds=2, calibration_scenes=1, calibration_frames=2, sensitivity_scenes=4, shortlist=1
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = build(
            "vggt", img_size=28, embed_dim=32, depth=1, num_heads=2, vit_depth=1, vit_num_heads=2,
            camera_head_num_heads=2, camera_trunk_depth=1, dpt_features=8, dpt_out_channels=[8, 8, 8, 8],
            dpt_layers=[0, 0, 0, 0], heads=["camera", "depth", "point"], layer_scale=0.3,
        )  # fmt: skip
    with torch.no_grad():
        model.camera_head.pose_branch.fc2.bias[-2:] = 1.0
    return model.eval()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [layer.dequantize() for layer in quantized_linears(model).values()]


def test_rows_are_what_they_are_called(network: nn.Module) -> None:
    rows = Rows(network, replace(SMALL, shortlist=4))
    made = {name: rows.make(name, seed=0) for name in ROWS}
    assert not quantized_linears(network)
    methods = {
        name: {layer.method.name for layer in quantized_linears(model).values()} for name, (model, _) in made.items()
    }
    assert methods == {name: {"w4a16", "fp8"} if name == "mixed" else {"w4a16"} for name in ROWS}
    groups = {
        name: {layer.method.group_size for layer in quantized_linears(model).values() if layer.method.name == "w4a16"}
        for name, (model, _) in made.items()
    }
    assert groups == {name: {32} if name == "rtn-32" else {128} for name in ROWS}
    plain = rows.make("rtn", seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(weights(made["rtn"][0]), weights(plain), strict=True))
    # What two rows share was not changed by the first of them, and each seed has scales of its own.
    alone = Rows(network, replace(SMALL, shortlist=4)).make("rounding", seed=0)[0]
    assert all(torch.equal(a, b) for a, b in zip(weights(made["rounding"][0]), weights(alone), strict=True))
    other_seed = rows.make("task", seed=1)[0]
    assert not all(torch.equal(a, b) for a, b in zip(weights(made["task"][0]), weights(other_seed), strict=True))
    different = (
        ("rtn", "awq"),
        ("awq", "filter"),
        ("filter", "task"),
        ("task", "rounding"),
        ("rtn", "rounding-only"),
        ("rounding-only", "default"),
        ("filter", "default"),
    )
    for one, other in different:
        pairs = zip(weights(made[one][0]), weights(made[other][0]), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs), (one, other)
    assert {name for name, (_, notes) in made.items() if notes.get("task_terms")} == {"task", "rounding", "mixed"}
    assert made["mixed"][1]["protected"]


def test_the_document_and_its_table(network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def rounded(rows: Rows, name: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        made.append((name, seed))
        if len(made) == 4:
            raise KeyboardInterrupt
        return quantize(build_again(rows.model), W4A16(group_size=8 * (1 + ROWS.index(name)))), {}

    monkeypatch.setattr(Rows, "make", rounded)
    ablation = replace(SMALL, scenes=3)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(network, ablation, progress=Progress(tmp_path / "p", {}))
    document = run_ablation(network, ablation, progress=Progress(tmp_path / "p", {}))
    # The row that was interrupted is made again, and no other; those without data once.
    assert len(made) == 1 + len(set(made)) == 1 + 9 + 7
    assert [row["row"] for row in document["rows"]] == list(ROWS)
    for row in document["rows"]:
        assert set(row["effects"]) == set(EFFECTS)
        assert row["effects"]["pose_deg"]["low"] <= row["effects"]["pose_deg"]["mean"]
    rtn, awq = document["rows"][:2]
    assert set(rtn["minus"]) == {"awq"}
    assert awq["minus"]["rtn"]["pose_deg"]["mean"] == pytest.approx(
        awq["effects"]["pose_deg"]["mean"] - rtn["effects"]["pose_deg"]["mean"], rel=1e-4
    )
    assert all(len(run["effects"]) == 3 for run in document["runs"].values())
    table = ablation_table(document, "Quantization of tiny", ["a note"])
    assert table.startswith("# Quantization of tiny\n\n- a note\n- 3 validation scenes (seeds from 0 on) of 2 ")
    assert table.count("| + token filter |") == 3
    assert f"{awq['effects']['pose_deg']['mean']:.4f} (" in table
    widths = {line.count("|") for line in table.split("## Effects")[1].split("##")[0].splitlines() if line}
    assert widths == {8}


def test_some_rows_alone(network: nn.Module) -> None:
    document = run_ablation(network, replace(SMALL, rows=("rtn", "default")))
    assert set(document["runs"]) == {"rtn/0", "default/0", "default/1"}
    assert [(row["row"], list(row["minus"])) for row in document["rows"]] == [("rtn", []), ("default", ["rtn"])]
    table = ablation_table(document, "Two rows", [])
    assert "## Differences to rounded to nearest" in table
    assert "to AWQ" not in table


def test_one_scene_has_no_interval(network: nn.Module) -> None:
    document = run_ablation(network, replace(SMALL, scenes=1, rows=("rtn", "rtn-32")))
    found = [row["effects"]["pose_deg"] for row in document["rows"]]
    assert [(one["low"], one["high"]) for one in found] == [(None, None)] * 2
    table = ablation_table(document, "Two rows", [])
    assert f" | {found[0]['mean']:.4f} | " in table
    assert "(" not in table.split("## Effects")[1].split("##")[0]


def build_again(model: nn.Module) -> nn.Module:
    network: Any = model
    other = type(network)(network.config)
    other.load_state_dict(network.state_dict())
    return other.eval()


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"scenes": 65}, "scenes=65: give 1 to 64 validation scenes"),
        ({"seeds": 0}, "seeds=0"),
        ({"frames": 1}, "2 frames or more"),
        ({"rows": ("rtn", "gptq")}, "rows=rtn gptq: choose from rtn, awq"),
        ({"rows": ()}, "choose from rtn, awq"),
    ],
)
def test_bad_sizes(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Ablation(**knobs)
