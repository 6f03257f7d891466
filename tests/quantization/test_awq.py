"""Scales of input channels: folding is exact in float, the search finds outliers, special tokens do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Golden, relative_error
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.layout import TokenLayout
from geoaccel.quantization import FP8, W4A16, quantize, scale_activations, scope_of
from geoaccel.quantization.calibrate.awq import EXPONENTS, Fold, apply_scale, candidate, find_folds, rank
from geoaccel.quantization.calibrate.statistics import InputStatistics, collect, patch_rows
from geoaccel.quantization.swap import float_linears


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


BLOCKS = {"vggt": 2 + 4 + 4 + 4, "pi3": 2 + 6 + 3 * 2, "pi3x": 2 + 2 + 6 + 2 + 3, "da3": 10 + 2}
"""By backbone, those of conditions included."""

SPECIAL = {"vggt": (5, 5), "pi3": (5, 5), "pi3x": (5, 5), "da3": (1, 1)}
"""By backbone, special tokens of a frame in the encoder and behind it."""


def calibrated(model: nn.Module) -> list[str]:
    """The foldable layers that photographs alone use."""
    taken = set(W4A16().select(float_linears(model), scope_of(model)))
    return [fold.linear for fold in find_folds(model) if fold.linear in taken]


# ------------------------------------------------------------------------------------------------- folding


def test_every_block_has_three_folds(tiny: nn.Module) -> None:
    folds = find_folds(tiny)
    blocks = [name for name, module in tiny.named_modules() if hasattr(module, "norm1") and hasattr(module, "ls1")]
    assert len(blocks) == BLOCKS[tiny.backbone.name]  # type: ignore[union-attr, index]
    assert [fold.linear for fold in folds] == [
        f"{name}.{part}" for name in blocks for part in ("attn.qkv", "attn.proj", "mlp.fc1")
    ]


def test_folding_is_exact(tiny: nn.Module, golden: Golden) -> None:
    before = run(tiny, golden["inputs.images"])
    folds = find_folds(tiny)
    for number, fold in enumerate(folds):
        inputs = tiny.get_submodule(fold.linear).in_features
        apply_scale(tiny, fold, sample(inputs, seed=number).mul(0.7).exp())
    for key, value in run(tiny, golden["inputs.images"]).items():
        assert relative_error(value, before[key]) < 1e-5, key


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1"])
def test_each_fold_moves_the_scale_where_it_belongs(tiny: nn.Module, part: str) -> None:
    fold = next(fold for fold in find_folds(tiny) if fold.linear.endswith(part))
    linear: Any = tiny.get_submodule(fold.linear)
    source: Any = tiny.get_submodule(fold.source)
    weight, above, bias = (tensor.clone() for tensor in (linear.weight, source.weight, source.bias))
    scale = sample(linear.in_features).exp()
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
    x, difference = sample(50, 6), sample(4, 6, seed=1)
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
    names = calibrated(tiny)
    images = torch.rand(2, 3, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    found = collect(tiny, names, [lambda: images, lambda: images[:1]], patches_only=patches_only)
    assert set(found) == set(names)
    patches, frames = 3 * 4, 9
    for name, entry in found.items():
        if name.startswith("camera_head"):
            expected = 4 * frames  # one token a frame, four refinements
        elif "_decoder" in name:
            expected = frames * (patches + 5)
        else:
            encoder, special = SPECIAL[tiny.backbone.name]  # type: ignore[union-attr, index]
            special = encoder if "encoder." in name or "patch_embed." in name else special
            expected = frames * (patches + (0 if patches_only else special))
        assert entry.tokens == expected, name
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_bad_calibration_sets(tiny: nn.Module) -> None:
    names = calibrated(tiny)
    with pytest.raises(ValueError, match="calibration set is empty"):
        collect(tiny, names, [])
    images = torch.rand(1, 2, 3, 42, 56)
    images[0, 1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="images of calibration batch 1 contain NaN or infinite values") as caught:
        collect(tiny, names, [lambda: torch.rand(1, 2, 3, 42, 56), lambda: images])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="1 layers were not used during calibration"):
        collect(tiny, [*names, "camera_head.nothing"], [lambda: torch.rand(1, 2, 3, 42, 56)])
    with pytest.raises(ValueError, match=r"none of the 1 layers .* can be scaled \(first: 0\); .* without scales"):
        scale_activations(nn.Sequential(nn.Linear(8, 8)), FP8(include="0"), [])
    assert not any(module._forward_pre_hooks for module in tiny.modules())


# ------------------------------------------------------------------------------------------------- the search


def with_outliers(tokens: int, special: int, factor: float) -> Tensor:
    """Patches with a few outlier channels, and special tokens with eight other ones."""
    x = sample(tokens, 256)
    x[:, 100:104] *= 20
    x[:special, :8] *= factor
    return x


def errors(x: Tensor, seen: Tensor, special: int) -> tuple[float, float]:
    """Output errors on patches: rounded to nearest, and with scales chosen on what was seen."""
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(sample(64, 256, seed=3))
    statistics = InputStatistics.empty(256, torch.device("cpu"))
    statistics.add(seen)
    method = W4A16(group_size=64)
    scaling = rank(linear, statistics, method, Fold("a", "b"))[0]
    patches = x[special:]
    plain = method.round_trip(linear.weight)
    scaled = method.round_trip(linear.weight * scaling.scale) / scaling.scale
    truth = patches @ linear.weight.T
    return relative_error(patches @ plain.T, truth), relative_error(patches @ scaled.T, truth)


def test_scales_help_where_channels_are_outliers() -> None:
    x = with_outliers(500, 0, 1)
    plain, scaled = errors(x, x, 0)
    assert scaled < 0.7 * plain


def test_special_tokens_mislead_the_search_unless_they_are_left_out() -> None:
    """The numbers behind the token filter: if large enough, five of 500 tokens decide for all."""
    x = with_outliers(500, 5, 3000)
    plain, misled = errors(x, x, 5)
    _, filtered = errors(x, x[5:], 5)
    assert misled > plain
    assert filtered < 0.7 * plain


def test_ranking() -> None:
    x = with_outliers(300, 0, 1)
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    linear.weight.copy_(sample(64, 256, seed=3))
    statistics = InputStatistics.empty(256, torch.device("cpu"))
    statistics.add(x)
    method = W4A16(group_size=64)
    ranked = rank(linear, statistics, method, Fold("a", "b"))
    assert sorted(scaling.exponent for scaling in ranked) == list(EXPONENTS)
    assert [scaling.error for scaling in ranked] == sorted(scaling.error for scaling in ranked)
    truth = x @ linear.weight.T
    for scaling in (ranked[0], ranked[-1]):
        found = x @ (method.round_trip(linear.weight * scaling.scale) / scaling.scale).T
        assert scaling.relative == pytest.approx(relative_error(found, truth) ** 2, rel=1e-3)
    plain = next(scaling for scaling in ranked if scaling.exponent == 0)
    assert plain.error == 1
    assert ranked[0].error == pytest.approx(ranked[0].relative / plain.relative, rel=1e-6)


def test_more_of_the_same_images_choose_the_same_scales() -> None:
    """A channel that is all but silent counts as the smallest magnitude, however many tokens there are."""
    x = with_outliers(40, 0, 1)
    x[:, 0] *= 1e-6
    linear = nn.Linear(256, 8, bias=False).requires_grad_(False)
    scales = []
    for times in (1, 50):
        statistics = InputStatistics.empty(256, torch.device("cpu"))
        statistics.add(x.repeat(times, 1))
        ranked = rank(linear, statistics, W4A16(group_size=64), Fold("a", "b"))
        scales.append({scaling.exponent: scaling.scale for scaling in ranked})
    for exponent in EXPONENTS:
        torch.testing.assert_close(scales[0][exponent], scales[1][exponent], rtol=1e-4, atol=0)


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
    found = scale_activations(tiny, method, [lambda: golden["inputs.images"]], report=lines.append)
    taken = [name for name in calibrated(tiny) if not name.endswith(".0.attn.qkv")]
    assert [scaling.fold.linear for scaling in found.scalings] == taken
    assert len(lines) == len(taken)
    assert all(scaling.error <= 1 for scaling in found.scalings)
    assert any(scaling.error < 0.95 and scaling.exponent > 0 for scaling in found.scalings)
    for key, value in run(tiny, golden["inputs.images"]).items():
        assert relative_error(value, before[key]) < 1e-5, key
    quantize(tiny, method)


def test_each_layer_is_scaled_for_its_own_method(tiny: nn.Module, golden: Golden) -> None:
    first, *_, last = calibrated(tiny)
    methods = [FP8(include=first), W4A16(include=last)]
    found = scale_activations(tiny, methods, [lambda: golden["inputs.images"]])
    assert [scaling.fold.linear for scaling in found.scalings] == [first, last]
    assert found.scalings[0].relative < 0.3 * found.scalings[1].relative
    with pytest.raises(ValueError, match="fp8 and w4a16 both quantize"):
        scale_activations(tiny, [FP8(), W4A16()], [lambda: golden["inputs.images"]])


def test_calibration_leaves_the_random_state_alone(tiny: nn.Module, golden: Golden) -> None:
    before = torch.get_rng_state()
    scale_activations(tiny, W4A16(), [lambda: golden["inputs.images"]])
    assert torch.equal(before, torch.get_rng_state())
