"""Sensitivity of blocks: what an effect is, its interval, the sweep, its controls and its plot."""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted import Interrupted, Stop
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.cameras import unproject_depth
from geoaccel.eval.data.calibration import predict
from geoaccel.eval.metrics.effects import effects, for_json, interval, summary, with_interval
from geoaccel.eval.tools import sensitivity as quantization_sensitivity
from geoaccel.eval.tools.sensitivity import Sensitivity, measure_sensitivity
from geoaccel.eval.tools.sensitivity_plot import sensitivity_plot
from geoaccel.linears import quantized_linears
from geoaccel.quantization import FP8, W4A16, quantize
from geoaccel.quantization.calibrate.allocation import find_units, from_records
from geoaccel.quantization.calibrate.clip import Clip
from geoaccel.quantization.calibrate.progress import Progress

LOW, HIGH = W4A16(group_size=16), FP8(activations=False)


def turned(degrees: float) -> Tensor:  # [4, 4]
    angle = torch.tensor(degrees).deg2rad()
    pose = torch.eye(4)
    pose[0, 0] = pose[1, 1] = angle.cos()
    pose[0, 1], pose[1, 0] = -angle.sin(), angle.sin()
    return pose


def geometry() -> Geometry:
    cameras = torch.eye(4).repeat(1, 3, 1, 1)
    cameras[0, :, 0, 3] = torch.tensor([0.0, 1.0, 3.0])
    intrinsics = torch.tensor([[9.0, 0, 4], [0, 9, 3], [0, 0, 1]]).repeat(1, 3, 1, 1)
    depth = 2 + torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return Geometry(cameras, intrinsics, depth, unproject_depth(depth, intrinsics, cameras), depth)


# -------------------------------------------------------------------------------------------------- effects


def test_no_change_has_no_effect() -> None:
    found = effects(geometry(), geometry(), geometry().cam_from_world[0].double())
    assert set(found) == {
        *("pose_deg", "pose_median_deg", "rotation_deg", "translation_deg", "depth_rel", "points"),
        *("auc_30_loss", "auc_5_loss"),
    }
    assert all(abs(value) < 1e-6 for value in found.values())


def test_effects_of_known_changes() -> None:
    dense = geometry()
    cameras = dense.cam_from_world.clone()
    cameras[0, 2] = turned(6.0) @ cameras[0, 2]  # pairs 0-2 and 1-2 turn by six degrees
    found = effects(replace(dense, cam_from_world=cameras), dense, dense.cam_from_world[0].double())
    assert found["rotation_deg"] == pytest.approx(4, abs=1e-3)
    assert found["pose_median_deg"] >= 6 - 1e-3  # of two pairs in three; their mean is lower
    assert found["pose_deg"] >= found["rotation_deg"]
    assert found["auc_5_loss"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["auc_30_loss"] == pytest.approx(2 / 3 * 6 / 30, abs=0.03)
    assert found["depth_rel"] == found["points"] == 0
    deeper = effects(replace(dense, depth=dense.depth * 1.1), dense, None)
    assert deeper["depth_rel"] == pytest.approx(0.1, rel=1e-4)
    assert "auc_30_loss" not in deeper
    assert effects(replace(dense, points_world=dense.points_world + 1), dense, None)["points"] > 0.1


def test_a_mirrored_camera_is_far_away() -> None:
    """Though VGGT's evaluation, by which nothing is lost then, takes the opposite direction for the same."""
    dense = geometry()
    cameras = dense.cam_from_world.clone()
    cameras[0, :, 0, 3] *= -1
    found = effects(replace(dense, cam_from_world=cameras), dense, dense.cam_from_world[0].double())
    assert found["pose_deg"] == found["translation_deg"] == pytest.approx(180)
    assert found["auc_30_loss"] == 0


def test_a_gain_is_a_negative_loss() -> None:
    truth = geometry().cam_from_world[0].double()
    wrong = replace(geometry(), cam_from_world=geometry().cam_from_world.clone())
    wrong.cam_from_world[0, 2] = turned(6.0) @ wrong.cam_from_world[0, 2]
    assert effects(geometry(), wrong, truth)["auc_5_loss"] < -0.5


def test_intervals_hold_the_mean_and_shrink(this_processor: None) -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    many = interval(values)
    for found, sample in ((interval(values[:20]), values[:20]), (many, values)):
        assert found["low"] < found["mean"] < found["high"]
        # 95 % of a normal distribution; the quantiles of 2,000 resamples are exact to about 2 % of that.
        expected = 2 * 1.96 * statistics.pstdev(sample) / len(sample) ** 0.5
        assert found["high"] - found["low"] == pytest.approx(expected, rel=0.06)
    assert interval(values) == many
    assert interval([2.0, 2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize("values", [[0.25], [[0.0], [0.5]]], ids=["one run", "two runs"])
def test_one_scene_has_no_interval(values: Any) -> None:
    found = interval(values)
    assert found["mean"] == 0.25
    assert math.isnan(found["low"])
    assert math.isnan(found["high"])
    assert for_json(found) == {"mean": 0.25, "low": None, "high": None}
    assert [with_interval(one, "+.2f", scale=-1) for one in (found, for_json(found))] == ["-0.25"] * 2  # type: ignore[list-item]


def test_an_interval_as_text() -> None:
    found = {"mean": 0.2, "low": -0.1, "high": 0.34567}
    assert with_interval(found, "+.2f") == "+0.20 (-0.10 to +0.35)"
    assert with_interval(found, "+.2f", scale=-1) == "-0.20 (-0.35 to +0.10)"
    assert with_interval(found, ".0f", scale=100) == "20 (-10 to 35)"
    assert for_json(found, 2) == {"mean": 0.2, "low": -0.1, "high": 0.35}


def test_intervals_over_runs_count_their_differences() -> None:
    scenes = torch.randn(40, generator=torch.Generator().manual_seed(0))
    same, apart = scenes.expand(5, 40), scenes + torch.linspace(-2, 2, 5)[:, None]
    narrow, wide = interval(same.tolist()), interval(apart.tolist())
    assert narrow["mean"] == pytest.approx(wide["mean"])
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_scores_that_some_scenes_lack_are_left_out() -> None:
    assert set(summary([{"pose_deg": 1.0, "auc_5_loss": 0.1}, {"pose_deg": 2.0}])) == {"pose_deg"}


class Broken(nn.Linear):
    """Outputs with depth that is not finite."""

    backbone: Any

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_outputs_that_are_not_finite_are_named() -> None:
    model = Broken(1, 1)
    model.backbone = SimpleNamespace(geometry=lambda output, size: replace(geometry(), depth=geometry().depth / 0))
    with pytest.raises(ValueError, match="NaN or infinite numbers in depth on here; leave it out"):
        predict(model, clip(0, "here"))


# ---------------------------------------------------------------------------------------------------- sweep


def clip(seed: int, name: str | None = None) -> Clip:
    images = torch.rand(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(seed))
    return Clip(name or f"scene{seed}", lambda: images)


class Faked:
    """Effects that are known: a sum over the blocks that are quantized in four bits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, worth: dict[str, float]) -> None:
        self.worth, self.trials = worth, 0
        monkeypatch.setattr(quantization_sensitivity, "predict", self.predict)
        monkeypatch.setattr(quantization_sensitivity, "effects", self.effects)

    def predict(self, model: nn.Module, clip: Clip) -> Any:
        low = {name for name, layer in quantized_linears(model).items() if layer.method.name == "w4a16"}
        self.trials += 1
        return sum(value for block, value in self.worth.items() if any(_inside(name, block) for name in low))

    def effects(self, quantized: float, dense: float, truth: Tensor | None) -> dict[str, float]:
        assert dense == 0
        return dict.fromkeys(("pose_deg", "depth_rel", "points"), quantized)


def _inside(layer: str, block: str) -> bool:
    return layer == block or layer.startswith(f"{block}.")


@pytest.fixture
def faked(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Faked:
    worth = {unit.name: 0.01 for unit in find_units(tiny, LOW, HIGH)}
    blocks = [name for name in worth if name.rpartition(".")[2].isdigit()]
    worth[blocks[1]], worth[blocks[3]] = 5.0, 3.0
    return Faked(monkeypatch, worth)


CLIPS = [clip(seed) for seed in range(4)]


def test_the_blocks_that_matter_are_found(tiny: nn.Module, faked: Faked) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    document = measure_sensitivity(tiny, Sensitivity(LOW, HIGH, max_effect=1.0), CLIPS)
    important = {name for name, worth in faked.worth.items() if worth > 1}
    assert set(document["allocation"]["protected"]) == important
    found = {unit["name"]: unit["effects"]["pose_deg"]["mean"] for unit in document["units"]}
    assert found == pytest.approx({name: faked.worth[name] for name in found})
    controls = {control["name"]: control["effects"]["pose_deg"]["mean"] for control in document["controls"]}
    assert controls["nothing protected"] == pytest.approx(sum(faked.worth.values()))
    assert controls["protected by sensitivity"] < 1
    assert controls["protected at random, draw 0"] > controls["protected by sensitivity"]
    assert document["agreement"]["halves_spearman"] == pytest.approx(1)
    assert document["allocation"]["file_bytes"] > document["allocation"]["file_bytes_low"]
    assert tiny.state_dict().keys() == before.keys()
    after = tiny.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    methods = from_records(document["allocation"]["methods"])
    quantize(tiny, *methods)
    high = {name for name, layer in quantized_linears(tiny).items() if layer.method.name == "fp8"}
    assert high == {layer for unit in document["units"] if unit["name"] in important for layer in unit["layers"]}


@pytest.mark.parametrize("high", [HIGH, None], ids=str)
def test_every_block_may_be_protected(tiny: nn.Module, faked: Faked, high: Any) -> None:
    document = measure_sensitivity(tiny, Sensitivity(LOW, high, max_effect=0.0), CLIPS)
    assert len(document["allocation"]["protected"]) == len(document["units"])
    assert document["allocation"]["predicted_effect"] == 0
    methods = from_records(document["allocation"]["methods"])
    assert [method.name for method in methods] == ([] if high is None else ["fp8"])
    controls = {control["name"]: control["effects"]["pose_deg"]["mean"] for control in document["controls"]}
    assert controls["protected by sensitivity"] == 0
    quantize(tiny, *methods)
    assert len(quantized_linears(tiny)) == sum(len(unit["layers"]) for unit in document["units"]) * len(methods)


def test_a_budget_in_bytes_is_kept(tiny: nn.Module, faked: Faked) -> None:
    units = find_units(tiny, LOW, HIGH)
    least = measure_sensitivity(tiny, Sensitivity(LOW, HIGH, max_effect=1e9), CLIPS)["allocation"]["file_bytes"]
    room = max(unit.high_bytes - unit.low_bytes for unit in units)
    document = measure_sensitivity(tiny, Sensitivity(LOW, HIGH, budget_bytes=least + room), CLIPS)
    assert least < document["allocation"]["file_bytes"] <= least + room
    for control in document["controls"]:
        added = sum(unit.high_bytes - unit.low_bytes for unit in units if unit.name in control["protected"])
        assert added <= room
    with pytest.raises(ValueError, match=r"a budget of .* GB is less than the .* GB with all blocks as w4a16"):
        measure_sensitivity(tiny, Sensitivity(LOW, HIGH, budget_bytes=least - 1), CLIPS)


def test_controls_are_judged_on_scenes_that_did_not_choose(
    tiny: nn.Module, faked: Faked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Effects on even scenes point at one block, those on odd ones at another."""
    blocks = [name for name, worth in faked.worth.items() if worth > 1]
    current = [""]

    def predict(model: nn.Module, clip: Clip) -> Any:
        current[0] = clip.name
        even = int(clip.name[-1]) % 2 == 0
        faked.worth = {blocks[0]: 5.0, blocks[1]: 0.1} if even else {blocks[0]: 0.1, blocks[1]: 5.0}
        return Faked.predict(faked, model, clip)

    monkeypatch.setattr(quantization_sensitivity, "predict", predict)
    document = measure_sensitivity(tiny, Sensitivity(LOW, HIGH, max_effect=1.0), CLIPS)
    chosen = next(c for c in document["controls"] if c["name"] == "protected by sensitivity")
    assert chosen["protected"] == [blocks[0]]
    assert chosen["effects"]["pose_deg"]["mean"] == pytest.approx(5.0)
    assert document["agreement"]["halves_spearman"] < 1


def test_an_interrupted_sweep_goes_on(tiny: nn.Module, faked: Faked, tmp_path: Path) -> None:
    settings = Sensitivity(LOW, HIGH, draws=1)
    expected = measure_sensitivity(copy.deepcopy(tiny), settings, CLIPS)
    trials = faked.trials

    with pytest.raises(Stop):
        measure_sensitivity(tiny, settings, CLIPS, progress=Progress(tmp_path / "p", {}), track=Interrupted(3))
    faked.trials = 0
    assert measure_sensitivity(tiny, settings, CLIPS, progress=Progress(tmp_path / "p", {})) == expected
    assert faked.trials == trials - 3 * len(CLIPS)


def test_on_a_real_network_it_is_float_again(tiny: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    blocks = [unit.name for unit in find_units(tiny, LOW, None)][1:4]
    low = replace(LOW, include=tuple(f"{name}.*" for name in blocks))
    document = measure_sensitivity(tiny, Sensitivity(low, None, draws=1), CLIPS)
    assert [unit["name"] for unit in document["units"]] == blocks
    for unit in document["units"]:
        assert max(found["mean"] for found in unit["effects"].values()) > 0, unit["name"]
    after = tiny.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    png = sensitivity_plot(document)
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"rank_by": "pose"}, "unknown effect 'pose'"),
        ({"budget_bytes": 1, "max_effect": 1.0}, "choose one"),
        ({"max_effect": -1.0}, "max_effect=-1.0"),
        ({"draws": 0}, "draws=0"),
    ],
)
def test_bad_settings(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sensitivity(LOW, **knobs)


def test_what_cannot_be_ranked(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match="3 scenes are too few to rank"):
        measure_sensitivity(tiny, Sensitivity(LOW), CLIPS[:3])
    with pytest.raises(ValueError, match="auc_30_loss needs true cameras"):
        measure_sensitivity(tiny, Sensitivity(LOW, rank_by="auc_30_loss"), CLIPS)
