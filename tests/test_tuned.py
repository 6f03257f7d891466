"""Plan files: what is written is read again, other weights are refused, and what is no plan is one line."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.layers import Layers
from geoaccel.models.weights import save_model
from geoaccel.quantization import FP8, W4A16
from geoaccel.tuned import TunedPlan, of_weights


def plan_for(model: nn.Module, path: Path, **more: object) -> Path:
    plan = TunedPlan(of_weights(model), Layers.read({0: "frame-only", 1: Asymmetric(stride=4, bypass=False)}), **more)  # type: ignore[arg-type]
    plan.write(path, depth(model))
    return path


def depth(model: nn.Module) -> int:
    return len(model.backbone.sites(model)["global"])  # type: ignore[union-attr, operator]


def some_linear(model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if name.endswith("attn.qkv"))


def test_a_plan_is_read_as_it_was_written_and_acts(tiny: nn.Module, tmp_path: Path) -> None:
    quantization = (FP8(include=(some_linear(tiny),)),)
    path = plan_for(tiny, tmp_path / "plan.yaml", quantization=quantization, tuned={"frames": 4})
    plan = TunedPlan.read(path)
    assert plan.tuned == {"frames": 4}
    assert plan.quantization == quantization
    geoaccel.accelerate(tiny, plan=path)
    found = geoaccel.describe(tiny)
    assert [action.method.name for action in found.merging] == ["frame-only", "asymmetric"]
    assert [part.linears for part in found.quantization] == [1]
    geoaccel.accelerate(tiny, plan=path)  # the float weights are gone, and it is the same plan
    plan.write(tmp_path / "again.yaml", depth(tiny))
    assert (tmp_path / "again.yaml").read_bytes() == path.read_bytes()


def test_other_weights_are_refused_and_other_dtypes_are_not(tiny: nn.Module, tmp_path: Path) -> None:
    path = plan_for(tiny, tmp_path / "plan.yaml")
    geoaccel.accelerate(copy.deepcopy(tiny).bfloat16(), plan=path)
    for name in ("norm1.weight", "attn.proj.weight"):
        other = copy.deepcopy(tiny)
        with torch.no_grad():
            next(value for key, value in other.named_parameters() if key.endswith(name)).mul_(1.01)
        with pytest.raises(UserError, match="made for other weights") as caught:
            geoaccel.accelerate(other, plan=path)
        assert "\n" not in str(caught.value)
        assert geoaccel.describe(other).merging == ()


def test_a_plan_for_float_weights_is_for_quantized_ones_too(tiny: nn.Module, tmp_path: Path) -> None:
    before, path = of_weights(tiny), plan_for(tiny, tmp_path / "plan.yaml")
    geoaccel.accelerate(tiny, quantization=W4A16(group_size=16, include=(some_linear(tiny),)))
    now = of_weights(tiny)
    assert now["linears"].startswith("quantized-")
    assert now["rest"] == before["rest"]
    geoaccel.accelerate(tiny, plan=path)


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_in_which_the_rest_is_rounded_otherwise_is_told_from_other_weights(
    tiny: nn.Module, tmp_path: Path, loaded: torch.dtype
) -> None:
    plan = plan_for(tiny, tmp_path / "plan.yaml")
    geoaccel.accelerate(tiny, quantization=W4A16(group_size=16))
    found = []
    for stored in (torch.float16, torch.bfloat16):
        save_model(tiny, tmp_path / f"{stored}.safetensors", dtype=stored)
        found.append(geoaccel.load_model(tmp_path / f"{stored}.safetensors", dtype=loaded))
    half, wide = found
    with pytest.raises(
        UserError, match=r"made for other weights \(rest .*write it again with --dtype bfloat16"
    ) as caught:
        geoaccel.accelerate(half, plan=plan)
    assert "\n" not in str(caught.value)
    if loaded != torch.float16:
        geoaccel.accelerate(wide, plan=plan)


def test_a_plan_for_quantized_weights_is_for_these_alone(tiny: nn.Module, tmp_path: Path) -> None:
    name = some_linear(tiny)
    eight, four, same = tiny, copy.deepcopy(tiny), copy.deepcopy(tiny)
    plain = copy.deepcopy(tiny)
    for model, method in ((eight, FP8(include=(name,))), (same, FP8(include=(name,))), (four, W4A16(include=(name,)))):
        geoaccel.accelerate(model, quantization=method)
    path = plan_for(eight, tmp_path / "plan.yaml")
    assert "linears: quantized-" in path.read_text()
    geoaccel.accelerate(same.bfloat16(), plan=path)
    for other in (four, plain):
        with pytest.raises(
            UserError, match=r"made for other weights \(linears quantized-\w+, here .*tune a plan on these"
        ):
            geoaccel.accelerate(other, plan=path)


@pytest.mark.parametrize("weights", [
    {}, {"linears": "a"}, {"linears": "a", "rests": "b"}, {"linear": "a", "others": "b"},
    {"linears": None, "rest": "b"}, {"linears": "a", "rest": 12}, {"linears": "a", "rest": "b", "more": "c"},
])  # fmt: skip
def test_a_plan_says_for_which_weights_it_is(weights: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"geoaccel_plan": 1, "weights": weights, "layers": {0: "frame-only"}}))
    with pytest.raises(UserError, match=r"plan .*weights=.* does not identify the weights") as caught:
        TunedPlan.read(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="give the fingerprints linears and rest"):
        TunedPlan(weights)  # type: ignore[arg-type]


def test_a_plan_stands_alone(tiny: nn.Module, tmp_path: Path) -> None:
    path = plan_for(tiny, tmp_path / "plan.yaml")
    for more in ({"merging": "httm"}, {"quantization": "fp8"}, {"layers": {0: None}}):
        with pytest.raises(UserError, match="a plan already sets merging, layers and quantization"):
            geoaccel.accelerate(tiny, plan=path, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "says"), [
    ("a: [", "is not YAML"),
    ("- 1", "is not a plan for this version"),
    ("layers: {}", "is not a plan for this version"),
    ("geoaccel_plan: 1\nlayers: [1]", r"layers=\[1\] must be a mapping of names"),
    ("geoaccel_plan: 1\nlayers: {0: htm}", "unknown method of a layer 'htm'"),
    ("geoaccel_plan: 1\nquantization: [{name: int3, knobs: {}}]", "unknown quantization method 'int3'"),
    ("geoaccel_plan: 1\nquantization: fp8", "must be a list of methods"),
])  # fmt: skip
def test_what_is_no_plan_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        TunedPlan.read(path)
    assert "\n" not in str(caught.value)
    assert "plan" in str(caught.value)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make one with geoaccel tune"):
        TunedPlan.read(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="is a folder; give the file in it"):
        TunedPlan.read(tmp_path)
