"""Scales of input channels: folding is exact in float, the search finds loud channels, special tokens do not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Golden, relative_error
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import AttentionContext
from geoaccel.calibration import Photographs, awq_on
from geoaccel.cli import main
from geoaccel.layout import TokenLayout
from geoaccel.models.vggt import VGGT
from geoaccel.models.weights import load_model, save_model
from geoaccel.quantization import FP8, W4A16, quantize
from geoaccel.quantization.awq import Fold, apply_scale, candidate, choose, find_folds, scale_activations
from geoaccel.quantization.statistics import InputStatistics, collect, patch_rows


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


# ------------------------------------------------------------------------------------------------- folding


def test_every_block_has_three_folds(tiny: nn.Module) -> None:
    folds = find_folds(tiny)
    blocks = [name for name, module in tiny.named_modules() if hasattr(module, "norm1") and hasattr(module, "ls1")]
    assert len(blocks) == (2 + 4 + 4 + 4 if isinstance(tiny, VGGT) else 2 + 6 + 3 * 2)
    assert [fold.linear for fold in folds] == [
        f"{name}.{part}" for name in blocks for part in ("attn.qkv", "attn.proj", "mlp.fc1")
    ]


def test_folding_is_exact(tiny: nn.Module, golden: Golden) -> None:
    before = run(tiny, golden["inputs.images"])
    folds = find_folds(tiny)
    for number, fold in enumerate(folds):
        inputs = tiny.get_submodule(fold.linear).in_features
        apply_scale(tiny, fold, draw(inputs, seed=number).mul(0.7).exp())
    for key, value in run(tiny, golden["inputs.images"]).items():
        assert relative_error(value, before[key]) < 1e-5, key


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_each_fold_moves_the_scale_where_it_belongs(tiny: nn.Module, part: str) -> None:
    fold = next(fold for fold in find_folds(tiny) if fold.linear.endswith(part))
    linear: Any = tiny.get_submodule(fold.linear)
    source: Any = tiny.get_submodule(fold.source)
    weight, above, bias = (tensor.clone() for tensor in (linear.weight, source.weight, source.bias))
    scale = draw(linear.in_features).exp()
    apply_scale(tiny, fold, scale)
    assert torch.allclose(linear.weight, weight * scale)
    if part == "attn.proj":  # queries and keys, two thirds of the fused layer, stay as they are
        kept = 2 * linear.in_features
        assert len(bias) == 3 * linear.in_features
        assert torch.equal(source.weight[:kept], above[:kept])
        assert torch.equal(source.bias[:kept], bias[:kept])
        assert torch.allclose(source.weight[kept:], above[kept:] / scale[:, None])
        assert torch.allclose(source.bias[kept:], bias[kept:] / scale)
    else:
        assert torch.allclose(source.weight, above / scale)
        assert torch.allclose(source.bias, bias / scale)


def test_folding_writes_to_no_tensor_of_others(tiny: nn.Module) -> None:
    theirs = dict(tiny.named_parameters())
    copies = {name: parameter.detach().clone() for name, parameter in theirs.items()}
    for fold in find_folds(tiny):
        apply_scale(tiny, fold, torch.full((tiny.get_submodule(fold.linear).in_features,), 2.0))
    assert all(torch.equal(theirs[name], copies[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------- statistics


def test_statistics_tell_the_output_error() -> None:
    x, difference = draw(50, 6), draw(4, 6, seed=1)
    statistics = InputStatistics.empty(6, torch.device("cpu"))
    statistics.add(x[:20])
    statistics.add(x[20:])
    assert statistics.tokens == 50
    assert statistics.error(difference) == pytest.approx(float((x @ difference.T).square().sum(1).mean()), rel=1e-5)
    assert torch.allclose(statistics.magnitude, x.abs().sum(0), atol=1e-5)


@pytest.mark.parametrize("kind", ["frame", "global"])
def test_patches_alone(kind: Any) -> None:
    layout = TokenLayout(2, 3, (2, 2), 5)
    x = torch.arange(2 * 3 * 9).float().view(2, 3, 9, 1)
    rows = x.flatten(1, 2) if kind == "global" else x.flatten(0, 1)
    expected = x[:, :, 5:].flatten()
    assert torch.equal(patch_rows(rows, AttentionContext(kind, 0, layout))[:, 0], expected)
    assert torch.equal(patch_rows(rows.flatten(0, 1), AttentionContext(kind, 0, layout))[:, 0], expected)
    assert torch.equal(patch_rows(rows, None)[:, 0], x.flatten())
    assert torch.equal(patch_rows(rows, AttentionContext("head", 0))[:, 0], x.flatten())
    with pytest.raises(ValueError, match="whole frames"):
        patch_rows(rows.flatten(0, 1)[:-1], AttentionContext(kind, 0, layout))


@pytest.mark.parametrize("patches_only", [True, False])
def test_what_enters_each_layer_is_counted_once(tiny: nn.Module, patches_only: bool) -> None:
    names = [fold.linear for fold in find_folds(tiny)]
    images = torch.rand(2, 3, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    found = collect(tiny, names, [images, images[:1]], patches_only=patches_only)
    assert set(found) == set(names)
    patches, frames = 3 * 4, 9
    for name, entry in found.items():
        if name.startswith("camera_head"):
            expected = 4 * frames  # one token a frame, four refinements
        elif "_decoder" in name:
            expected = frames * (patches + 5)
        else:
            expected = frames * (patches + (0 if patches_only else 5))
        assert entry.tokens == expected, name
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_bad_calibration_sets(tiny: nn.Module) -> None:
    names = [fold.linear for fold in find_folds(tiny)]
    with pytest.raises(ValueError, match="calibration set is empty"):
        collect(tiny, names, [])
    images = torch.rand(1, 2, 3, 42, 56)
    images[0, 1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="photographs of calibration batch 1 hold NaN or infinite values") as caught:
        collect(tiny, names, [torch.rand(1, 2, 3, 42, 56), images])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="1 layers were not used while calibrating"):
        collect(tiny, [*names, "camera_head.nothing"], [torch.rand(1, 2, 3, 42, 56)])
    with pytest.raises(ValueError, match=r"none of the 1 layers .* is in a transformer block"):
        scale_activations(nn.Sequential(nn.Linear(8, 8)), FP8(include="0"), [])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


# ------------------------------------------------------------------------------------------------- the search


def loud(tokens: int, special: int, factor: float) -> Tensor:
    """Patches with a few loud channels, and special tokens that shout in eight other ones."""
    x = draw(tokens, 256)
    x[:, 100:104] *= 20
    x[:special, :8] *= factor
    return x


def errors(x: Tensor, seen: Tensor, special: int) -> tuple[float, float]:
    """Output errors on patches: rounded to nearest, and with scales chosen on what was seen."""
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(draw(64, 256, seed=3))
    statistics = InputStatistics.empty(256, torch.device("cpu"))
    statistics.add(seen)
    method = W4A16(group_size=64)
    scaling = choose(linear, statistics, method, Fold("a", "b"))
    patches = x[special:]
    plain = method.round_trip(linear.weight)
    scaled = method.round_trip(linear.weight * scaling.scale) / scaling.scale
    truth = patches @ linear.weight.T
    return relative_error(patches @ plain.T, truth), relative_error(patches @ scaled.T, truth)


def test_scales_help_where_channels_are_loud() -> None:
    x = loud(500, 0, 1)
    plain, scaled = errors(x, x, 0)
    assert scaled < 0.7 * plain


def test_special_tokens_mislead_the_search_unless_they_are_left_out() -> None:
    """The numbers behind the token filter: loud enough, five of 500 tokens decide for all."""
    x = loud(500, 5, 3000)
    plain, misled = errors(x, x, 5)
    _, filtered = errors(x, x[5:], 5)
    assert misled > plain
    assert filtered < 0.7 * plain


def test_candidates() -> None:
    magnitude = torch.tensor([0.0, 1.0, 16.0])
    assert torch.equal(candidate(magnitude, 0), torch.ones(3))
    scale = candidate(magnitude, 0.5)
    assert scale[2] / scale[1] == pytest.approx(4)
    assert scale[1] / scale[0] == pytest.approx(100)
    assert scale.max() * scale.min() == pytest.approx(1)


def test_never_worse_than_rounding_on_what_was_seen(tiny: nn.Module, golden: Golden) -> None:
    before = run(tiny, golden["inputs.images"])
    lines: list[str] = []
    method = W4A16(exclude="*.0.attn.qkv")
    scalings = scale_activations(tiny, method, [golden["inputs.images"]], report=lines.append)
    taken = [fold.linear for fold in find_folds(tiny) if not fold.linear.endswith(".0.attn.qkv")]
    assert [scaling.fold.linear for scaling in scalings] == taken
    assert len(lines) == len(taken)
    assert all(scaling.error <= 1 for scaling in scalings)
    assert any(scaling.error < 0.95 and scaling.exponent > 0 for scaling in scalings)
    for key, value in run(tiny, golden["inputs.images"]).items():
        assert relative_error(value, before[key]) < 1e-5, key
    quantize(tiny, method)


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture
def source(tiny: nn.Module, tmp_path: Path) -> Path:
    save_model(tiny, tmp_path / "float.safetensors", dtype=torch.bfloat16)
    return tmp_path / "float.safetensors"


def command(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    try:
        code = main(["quantize", "calibrate", *map(str, args)])
    except SystemExit as exit:
        code = int(exit.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        picture = torch.randint(0, 255, (60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(picture.numpy()).save(folder / f"{index}.png")
    return folder


def provenance(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["provenance"])


def test_command_on_rendered_scenes(source: Path, tmp_path: Path, golden: Golden, capsys: Any) -> None:
    common = ("--model", source, "--quantization", "w4a16", "--group-size", 16, "--scenes", 1, "--frames", 2)
    code, out, err = command(capsys, *common, "--out", tmp_path / "a.safetensors")
    assert code == 0, err
    assert "w4a16(group_size=16)" in out
    assert "exponent" in err
    said = provenance(tmp_path / "a.safetensors")["calibration"]
    assert said["rendered_seeds"] == [1_000_000, 1_000_000]
    assert said["patches_only"] is True
    assert said["mean_error_over_unscaled"] < 1
    model = load_model(tmp_path / "a.safetensors")
    assert all(value.isfinite().all() for value in run(model, golden["inputs.images"]).values())
    assert command(capsys, *common, "--all-tokens", "--out", tmp_path / "b.safetensors")[0] == 0
    assert provenance(tmp_path / "b.safetensors")["calibration"]["patches_only"] is False
    name = next(
        fold.source for fold in find_folds(load_model(source)) if "frame" in fold.source or "decoder" in fold.source
    )
    other = load_model(tmp_path / "b.safetensors")
    assert not torch.equal(model.get_submodule(name).weight, other.get_submodule(name).weight)


def test_command_on_photographs(source: Path, tmp_path: Path, capsys: Any) -> None:
    folder = photographs(tmp_path / "photos", 3)
    common = ("--model", source, "--quantization", "w4a16", "--out", tmp_path / "a.safetensors", "--images")
    code, _, err = command(capsys, *common, folder, "--frames", 2)
    assert code == 0, err
    said = provenance(tmp_path / "a.safetensors")["calibration"]
    assert said["photographs"] == {"photos": ["0.png", "1.png", "2.png"]}
    (tmp_path / "empty").mkdir()
    code, _, err = command(capsys, *common, tmp_path / "empty", "--overwrite")
    assert (code, "is empty" in err.strip().splitlines()[-1]) == (2, True)


@pytest.mark.parametrize(("option", "value"), [("--scenes", 0), ("--frames", 0)])
def test_bad_options(source: Path, tmp_path: Path, capsys: Any, option: str, value: int) -> None:
    args = ("--model", source, "--quantization", "w4a16", "--out", tmp_path / "a.safetensors", option, value)
    code, _, err = command(capsys, *args)
    assert (code, "leaves nothing to calibrate on" in err) == (2, True)
    assert not (tmp_path / "a.safetensors").exists()


def test_batches(tiny: nn.Module, tmp_path: Path) -> None:
    folders = (str(photographs(tmp_path / "a", 3)), str(photographs(tmp_path / "b", 2)))
    assert [load().shape[:2] for load in Photographs(folders, frames=2).batches(tiny)] == [(1, 2), (1, 1), (1, 2)]
    first, second = Photographs(scenes=2, frames=2).batches(tiny)
    assert first().shape == (1, 2, 3, 112, 112)
    assert torch.equal(first(), first())
    assert not torch.equal(first(), second())
    with pytest.raises(ValueError, match="rendered scenes before 1000000 are for evaluation, got first_seed=0"):
        Photographs(first_seed=0)


def test_calibration_leaves_the_random_state_alone(tiny: nn.Module) -> None:
    before = torch.get_rng_state()
    awq_on(Photographs(scenes=1, frames=2), W4A16())(tiny)
    assert torch.equal(before, torch.get_rng_state())
    assert not geoaccel.describe(tiny).quantization
