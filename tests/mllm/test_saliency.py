"""Saliency probes against the attention weights of the encoders' own slow path."""

from __future__ import annotations

import contextlib
import gc
import importlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geoaccel.mllm.saliency import QueriesKeys, SaliencyProbe, received_attention, window_order

QWEN = {
    "qwen2_vl": ("Qwen2VLVisionConfig", "Qwen2VisionTransformerPretrainedModel"),
    "qwen2_5_vl": ("Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen3_vl": ("Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
}
GRIDS = [[1, 10, 14], [2, 6, 8]]  # an image, and a video of two steps


def pair(n: int = 1, heads: int = 3, tokens: int = 20, **more: Any) -> QueriesKeys:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, n, heads, tokens, 8, generator=generator).unbind(0)
    return QueriesKeys(q, k, 8**-0.5, **more)


def test_received_attention_is_a_column_sum() -> None:
    data = pair(n=2)
    weights = (data.q @ data.k.mT * data.scale).softmax(-1)
    torch.testing.assert_close(received_attention(data), weights.mean(1).sum(1))
    torch.testing.assert_close(received_attention(data, signal="cls_attention"), weights.mean(1)[:, 0])
    torch.testing.assert_close(received_attention(data).mean(1), torch.ones(2))


@pytest.mark.parametrize("chunk", [1, 100, 777])
def test_received_attention_in_chunks(chunk: int) -> None:
    data = pair(n=2)
    torch.testing.assert_close(received_attention(data, chunk_elements=chunk), received_attention(data))


def test_received_attention_keeps_segments_apart() -> None:
    data = pair(lengths=(7, 12, 1))
    parts = [
        received_attention(QueriesKeys(data.q[:, :, part], data.k[:, :, part], data.scale))
        for part in (slice(0, 7), slice(7, 19), slice(19, 20))
    ]
    torch.testing.assert_close(received_attention(data), torch.cat(parts, dim=1))


def test_each_segment_has_weights_of_its_own() -> None:
    weight = torch.arange(1.0, 21)
    data = pair(lengths=(7, 13), log_weight=weight.log(), weight=weight)
    parts = [
        received_attention(QueriesKeys(data.q[:, :, p], data.k[:, :, p], data.scale, None, weight[p].log(), weight[p]))
        for p in (slice(0, 7), slice(7, 20))
    ]
    torch.testing.assert_close(received_attention(data), torch.cat(parts, dim=1))


def test_received_attention_of_rows_that_stand_for_several() -> None:
    """A row with weight 3 is three equal tokens."""
    data = pair(tokens=6)
    copies = torch.tensor([1, 3, 1, 2, 1, 1])
    spread = torch.arange(6).repeat_interleave(copies)
    dense = received_attention(QueriesKeys(data.q[:, :, spread], data.k[:, :, spread], data.scale))[0]
    weight = copies.float()
    rows = received_attention(QueriesKeys(data.q, data.k, data.scale, None, weight.log(), weight))[0]
    torch.testing.assert_close((rows / weight)[spread], dense)


def test_received_attention_memory_is_bounded() -> None:
    """What stays in memory does not grow with the square of the length."""
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, Tensor) else [])
            return out

    data = pair(tokens=500)
    with Sizes():
        received_attention(data, chunk_elements=3 * 500 * 4)
    assert max(sizes) <= 3 * 500 * 8


def test_any_callable() -> None:
    """A home-made attention: a module, and how to read its queries and keys."""
    projection = nn.Linear(8, 16)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QueriesKeys:
        q, k = module.forward(args[0])[:, None].chunk(2, -1)
        return QueriesKeys(q, k, 1.0)

    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    probe = SaliencyProbe(projection, read)
    with probe:
        projection(x)
    q, k = projection(x).chunk(2, -1)
    torch.testing.assert_close(probe.scores, (q @ k.mT).softmax(-1).sum(1).flatten())
    assert not probe.scores.requires_grad
    projection(x)
    assert len(probe.scores) == 10
    with probe:
        projection(x)
        projection(x)
    assert len(probe.scores) == 20
    with probe, pytest.raises(ValueError, match="active already"), probe:
        pass
    with pytest.raises(ValueError, match="run the encoder inside"):
        _ = SaliencyProbe(projection, read).scores
    with pytest.raises(ValueError, match="signal='sum'; known"):
        SaliencyProbe(projection, read, signal="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no supported 2D encoder in a Linear"):
        SaliencyProbe.for_model(projection)


def tiny_qwen(family: str) -> tuple[Any, Any]:
    """A random encoder of four blocks and four heads, and its module."""
    pytest.importorskip("transformers")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    sizes: dict[str, Any] = {"depth": 4, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
    sizes |= {"out_hidden_size": 24, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        sizes |= {"fullatt_block_indexes": [1, 2], "window_size": 56}
    elif family == "qwen2_vl":
        sizes |= {"embed_dim": 32, "hidden_size": 24}
    else:
        sizes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    torch.manual_seed(0)
    config_name, model_name = QWEN[family]
    model = getattr(modeling, model_name)(getattr(configuration, config_name)(**sizes)).eval()
    for parameter in model.parameters():  # sharper attention than at initialisation
        parameter.data.mul_(3)
    return model, modeling


def pixels() -> tuple[Tensor, Tensor]:
    grid = torch.tensor(GRIDS)
    count = int(grid.prod(-1).sum())
    return torch.randn(count, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1)), grid


@pytest.mark.parametrize("fails", [False, True])
def test_a_probe_that_is_left_holds_no_pixels(fails: bool) -> None:
    model, _ = tiny_qwen("qwen2_5_vl")
    values, grid = pixels()
    held = weakref.ref(values)
    probe = SaliencyProbe.for_model(model)
    with contextlib.suppress(RuntimeError), probe, torch.no_grad():
        model(values, grid_thw=grid)
        if fails:
            raise RuntimeError
    del values
    gc.collect()
    assert held() is None
    assert len(probe.scores) > 0


@pytest.mark.parametrize("family", sorted(QWEN))
@pytest.mark.parametrize("layer", [-1, -2])
def test_qwen_equals_its_own_weights(family: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per cell, in the order of the language model: the row that a cell's feature has in ``pooler_output``."""
    model, modeling = tiny_qwen(family)
    values, grid = pixels()
    probe = SaliencyProbe.for_model(nn.ModuleDict({"visual": model}), layer=layer)
    with probe, torch.no_grad():
        stock = model(values, grid_thw=grid)
    with torch.no_grad():
        assert stock.pooler_output.equal(model(values, grid_thw=grid).pooler_output)
    assert probe.layer == {("qwen2_5_vl", -1): 2, ("qwen2_5_vl", -2): 1}.get((family, layer), 4 + layer)

    weights: list[Tensor] = []
    eager = modeling.eager_attention_forward

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = eager(module, *args, **kwargs)
        if module is model.blocks[probe.layer].attn:
            weights.append(out[1])
        return out

    monkeypatch.setattr(modeling, "eager_attention_forward", recorded)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        again = model(values, grid_thw=grid)
    assert len(weights) == 3  # one image and two steps of a video
    patches = torch.cat([w.mean(1).sum(1).flatten() for w in weights])
    cells = patches.view(-1, 4).mean(-1)
    if family == "qwen2_5_vl":
        utils = importlib.import_module("transformers.vision_utils")
        order = utils.get_vision_window_index(grid, spatial_merge_size=2, window_size=56, patch_size=14)[0]
        assert not order.equal(torch.arange(len(order)))
        cells = cells[order.argsort()]
        torch.testing.assert_close(again.pooler_output, model.merger(again.last_hidden_state)[order.argsort()])
    assert len(probe.scores) == len(stock.pooler_output)
    torch.testing.assert_close(probe.scores, cells, rtol=1e-4, atol=1e-5)
    assert float(cells.std()) > 0.05
    for step in probe.scores.split([35, 12, 12]):
        assert float(step.mean()) == pytest.approx(1, abs=1e-5)


def test_windows_like_transformers() -> None:
    utils = importlib.import_module(pytest.importorskip("transformers").__name__ + ".vision_utils")
    for grids in (GRIDS, [[3, 8, 8]], [[1, 2, 2], [1, 30, 18]], [[2, 28, 36], [1, 16, 16]]):
        for side in (1, 2, 4):
            order, _ = utils.get_vision_window_index(
                torch.tensor(grids), spatial_merge_size=2, window_size=28 * side, patch_size=14
            )
            assert window_order(grids, 2, side).equal(order)


def test_qwen_refuses_windowed_blocks() -> None:
    model, _ = tiny_qwen("qwen2_5_vl")
    assert SaliencyProbe.for_model(model, layer=1).layer == 1
    with pytest.raises(ValueError, match=r"layer=3 attends within windows.*\[1, 2\]"):
        SaliencyProbe.for_model(model, layer=3)
    for layer in (4, -3):
        with pytest.raises(ValueError, match=f"layer={layer} does not exist: 4 blocks, 2 of them"):
            SaliencyProbe.for_model(model, layer=layer)
    with pytest.raises(ValueError, match="needs a class token"):
        SaliencyProbe.for_model(model, signal="cls_attention")


def tiny_vit(family: str) -> Any:
    """SigLIP or CLIP with its text half, which a probe must pass over."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 84, "patch_size": 14}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(text_config={**sizes, "vocab_size": 50}, vision_config=vision)
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_vit_equals_its_own_weights(family: str, layer: int) -> None:
    model = tiny_vit(family)
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    signals = ["received_attention", "cls_attention"] if family == "CLIP" else ["received_attention"]
    probes = [SaliencyProbe.for_model(model, layer=layer, signal=signal) for signal in signals]  # type: ignore[arg-type]
    for probe in probes:
        with probe, torch.no_grad():
            model.vision_model(pixel_values=images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.vision_model(pixel_values=images, output_attentions=True).attentions[layer].mean(1)
    special = int(family == "CLIP")
    torch.testing.assert_close(probes[0].scores, weights.sum(1)[:, special:].flatten(), rtol=1e-3, atol=1e-4)
    if special:
        torch.testing.assert_close(probes[1].scores, weights[:, 0, 1:].flatten(), rtol=1e-4, atol=1e-6)
    assert float(weights.sum(1).std()) > 0.05


def test_vit_pools_like_its_host() -> None:
    model = tiny_vit("Siglip")
    images = torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(1))
    plain, pooled = (
        SaliencyProbe.for_model(model, pool=pool) for pool in (None, lambda x: nn.functional.avg_pool2d(x, 2))
    )
    with plain, pooled, torch.no_grad():
        model.vision_model(pixel_values=images)
    torch.testing.assert_close(pooled.scores, plain.scores.view(2, 3, 2, 3, 2).mean((2, 4)).flatten())
    with pytest.raises(ValueError, match=r"a SiglipVision.* has none"):
        SaliencyProbe.for_model(model, signal="cls_attention")
