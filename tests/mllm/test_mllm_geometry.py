"""Geometry features for a host: the right rows in the right order, from dense and accelerated backbones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import Mixer
from geoaccel.merging import MERGING, Alike, FastVGGT
from geoaccel.mllm import Merge3DConfig, plan_merge
from geoaccel.mllm.geometry import geometry_features

SIZE = (70, 98)  # 5 x 7 patches: a row and a column are left out


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def patch_features(model: Any, images: Tensor) -> Tensor:  # [B, S, 5, 7, C]
    """The features that are to be pooled, by the backbone's own calls."""
    with torch.no_grad():
        if hasattr(model, "aggregator"):
            features, start = model.aggregator(images)
            dense = features[-2][:, :, start:]
        elif hasattr(model, "trunk_module"):
            (features,) = model.features(images, [model.config.depth - 1]).layers.values()
            dense = features[:, :, 1:]
        else:
            dense = model.features(images)[:, :, model.config.num_register_tokens :]
    return dense.unflatten(2, (5, 7))


def test_cells_in_the_order_of_the_host(tiny: nn.Module, images: Tensor) -> None:
    dense = patch_features(tiny, images)
    tokens = geometry_features(tiny, images)
    stacked = geometry_features(tiny, images, pool="stack")
    assert tokens.grid == (2, 3)
    assert tokens.cu_seqlens.tolist() == [0, 18, 36]
    assert tokens.frame_of.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [0] * 6 + [1] * 6 + [2] * 6
    assert tokens.xyz is None
    assert tokens.scores is None
    row = 0
    for scene in range(2):
        for frame in range(3):
            for y in range(2):
                for x in range(3):
                    cell = dense[scene, frame, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                    torch.testing.assert_close(tokens.features[row], cell.mean((0, 1)), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(stacked.features[row], cell.flatten(), rtol=1e-4, atol=1e-5)
                    row += 1
    one = geometry_features(tiny, images[1])
    torch.testing.assert_close(one.features, tokens.features[18:], rtol=1e-4, atol=1e-5)


def test_another_grid_is_laid_over_the_photograph(tiny: nn.Module, images: Tensor) -> None:
    dense = patch_features(tiny, images).flatten(0, 1)
    tokens = geometry_features(tiny, images, grid=(5, 7))
    torch.testing.assert_close(tokens.features, dense.flatten(0, 2), rtol=1e-4, atol=1e-5)
    tokens = geometry_features(tiny, images, grid=(1, 1))
    torch.testing.assert_close(tokens.features, dense.mean((1, 2)), rtol=1e-4, atol=1e-5)
    tokens = geometry_features(tiny, images, grid=(5, 1))
    torch.testing.assert_close(tokens.features, dense.mean(2).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_frames_that_share_a_token(tiny: nn.Module, images: Tensor) -> None:
    single = geometry_features(tiny, images, saliency=True, points=True)
    pairs = geometry_features(tiny, images, frames_per_token=2, saliency=True, points=True)
    assert pairs.cu_seqlens.tolist() == [0, 12, 24]
    assert pairs.frame_of.tolist() == ([0] * 6 + [1] * 6) * 2
    for name in ("features", "scores"):
        rows = getattr(single, name).view(2, 3, 6, -1)
        expected = torch.stack([(rows[:, 0] + rows[:, 1]) / 2, rows[:, 2]], dim=1)
        torch.testing.assert_close(getattr(pairs, name).view(2, 2, 6, -1), expected, rtol=1e-4, atol=1e-5)
    assert single.xyz is not None
    assert pairs.xyz is not None
    assert pairs.xyz.view(2, 2, 6, 3).equal(single.xyz.view(2, 3, 6, 3)[:, ::2])


def test_points_lie_in_their_cell_at_its_median_depth(tiny: nn.Module, images: Tensor) -> None:
    tokens = geometry_features(tiny, images, points=True)
    torch.testing.assert_close(tokens.features, geometry_features(tiny, images).features)
    with torch.no_grad():
        geometry = tiny.backbone.geometry(tiny(images), SIZE)  # type: ignore[union-attr, operator]
    assert tokens.xyz is not None
    rows = iter(tokens.xyz)
    for points, depths in zip(geometry.points_world.flatten(0, 1), geometry.depth.flatten(0, 1), strict=True):
        for y in range(2):
            for x in range(3):
                part = (slice(28 * y, 28 * y + 28), slice(28 * x, 28 * x + 28))
                own, row = points[part].flatten(0, 1), next(rows)
                which = (own == row).all(-1).nonzero()[:, 0]
                assert len(which) > 0
                share = float((depths[part] < depths[part].flatten()[which[0]]).float().mean())
                assert 0.1 < share < 0.9  # 64 places of 784 are looked at


def test_attention_received(tiny: nn.Module, images: Tensor) -> None:
    """Against the weights of all heads at once; the mixer is put back."""
    layer = -2 if hasattr(tiny, "aggregator") else -1
    site: Any = tiny.backbone.sites(tiny)["global"][layer]  # type: ignore[union-attr, operator]
    inner, found = site.mixer, []

    class Note(Mixer):
        def __call__(self, q: Tensor, k: Tensor, *rest: Any) -> Any:
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            found.append(weights.mean(1).sum(1))
            return inner(q, k, *rest)

    site.mixer = Note()
    geometry_features(tiny, images)
    site.mixer = inner
    tokens = geometry_features(tiny, images, saliency=True)
    assert site.mixer is inner
    assert tokens.scores is not None
    patches = found[0].view(2, 3, -1)[:, :, -35:].unflatten(2, (5, 7))[:, :, :4, :6]
    cells = patches.unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    torch.testing.assert_close(tokens.scores, cells.flatten(), rtol=1e-4, atol=1e-5)


def test_the_listener_shows_the_photographs_to_the_mixer_it_stands_for(tiny: nn.Module, images: Tensor) -> None:
    layer = -2 if hasattr(tiny, "aggregator") else -1
    site: Any = tiny.backbone.sites(tiny)["global"][layer]  # type: ignore[union-attr, operator]
    site.mixer = MERGING["litevggt"](bypass=False).mixer("sdpa")  # type: ignore[union-attr]
    geometry_features(tiny, images, saliency=True)
    assert site.mixer.effect.effective_ratio > 0


@pytest.mark.parametrize("merging", [FastVGGT(bypass=False), Alike(bypass=False)])
def test_an_accelerated_backbone_answers_alike(tiny: nn.Module, images: Tensor, merging: Any) -> None:
    dense = geometry_features(tiny, images, points=True, saliency=True)
    model = geoaccel.accelerate(tiny, merging=merging)
    merged = geometry_features(model, images, points=True, saliency=True)
    (action,) = geoaccel.describe(model).merging
    assert action.effective_ratio
    assert merged.features.shape == dense.features.shape
    assert not merged.features.allclose(dense.features)
    cosine = torch.nn.functional.cosine_similarity(merged.features, dense.features).mean()
    assert float(cosine) > 0.5
    assert merged.scores is not None
    assert dense.scores is not None
    assert float(merged.scores.sum()) == pytest.approx(float(dense.scores.sum()), rel=0.5)
    config = Merge3DConfig(gate="radius", gate_size=1.0, min_per_frame=1)
    plan = plan_merge(
        merged.scores,
        torch.rand(36, 8),
        merged.features,
        config,
        cu_seqlens=merged.cu_seqlens,
        frame_of=merged.frame_of,
        xyz=merged.xyz,
    )
    assert plan.lengths == (5, 5)


def test_a_quantized_backbone_answers_alike(images: Tensor) -> None:
    model = geoaccel.load_model("vggt-mini")
    dense = geometry_features(model, images)
    quantized = geometry_features(geoaccel.accelerate(model, quantization="w4a16"), images)
    error = float((quantized.features - dense.features).norm() / dense.features.norm())
    assert 0 < error < 0.5


def test_packed_rows_share_what_they_receive(tiny: nn.Module, images: Tensor) -> None:
    """All tokens of all groups stay alone: the packed path measures what the dense one does."""
    dense = geometry_features(tiny, images, saliency=True)
    model = geoaccel.accelerate(tiny, merging=Alike(ratio=0.0, bypass=False))
    packed = geometry_features(model, images, saliency=True)
    torch.testing.assert_close(packed.scores, dense.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"grid": (6, 7)}, r"grid=\(6, 7\) does not fit \(5, 7\) patches; the 2 x 2 cells are \(2, 3\)"),
        ({"grid": (0, 3)}, "does not fit"),
        ({"grid": (3, 3), "pool": "stack"}, "pool='stack' needs cells of 2 x 2"),
        ({"frames_per_token": 2, "pool": "stack"}, "pool='stack' needs .* one frame"),
        ({"layer": 77}, "layer=77"),
        ({"pool": "max"}, "pool='max'; known: mean, stack"),
    ],
)
def test_bad_input(tiny: nn.Module, images: Tensor, knobs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        geometry_features(tiny, images, **knobs)


def test_images_are_a_tensor(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"images is a str; give a tensor, as .*load_images"):
        geometry_features(tiny, "photos")  # type: ignore[arg-type]


def test_only_our_backbones() -> None:
    with pytest.raises(ValueError, match=r"come from one of .*pi3, .*vggt, not from a Linear"):
        geometry_features(nn.Linear(2, 2), torch.rand(1, 3, 28, 28))


def test_hooks_are_gone_after_an_error(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="multiple of the patch size"):
        geometry_features(tiny, images[..., :-1], points=True, saliency=True)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny.modules())
    assert all(type(m.mixer).__name__ == "DenseMixer" for m in tiny.modules() if hasattr(m, "mixer"))
