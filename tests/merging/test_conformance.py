"""What every merging method must hold in a whole model, on every backbone, compared with the dense model.

Groups are looked at in ``test_conformance_groups.py``, knobs and bad input in ``test_conformance_knobs.py``.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from conformance import IMAGES, equal, make, nothing, run
from merging_scenes import photographs
from references import relative_error
from torch import Tensor, nn

import geoaccel
from geoaccel.merging import MERGING, AttentionMerging
from geoaccel.models import build

DEEP: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 8, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_layers": [0, 2, 4, 7], "heads": ["camera"],
    "layer_scale": 0.3,
}  # fmt: skip
GRIDS = [(4, 6), (5, 7), (7, 4)]


def test_ratio_zero_is_the_dense_model_bit_for_bit(tiny: nn.Module, name: str) -> None:
    dense = run(tiny, IMAGES)
    geoaccel.accelerate(tiny, merging=nothing(name))
    assert equal(run(tiny, IMAGES), dense)
    (action,) = geoaccel.describe(tiny).merging
    assert (action.effective_ratio, action.effective_key_ratio) == (0, 0)
    assert action.bypassed


def test_it_acts_and_leaves_the_shape_of_everything_alone(tiny: nn.Module, method: Any) -> None:
    dense, keys = run(tiny, IMAGES), list(tiny.state_dict())
    geoaccel.accelerate(tiny, merging=method)
    merged = run(tiny, IMAGES)
    assert list(tiny.state_dict()) == keys
    assert merged.keys() == dense.keys()
    for key, value in merged.items():
        assert (value.shape, value.dtype) == (dense[key].shape, dense[key].dtype), key
        assert value.isfinite().all(), key
        assert not torch.equal(value, dense[key]), key
    (action,) = geoaccel.describe(tiny).merging
    assert action.effective_ratio > 0.1
    assert not action.bypassed


def test_restore_is_bit_exact(tiny: nn.Module, method: Any) -> None:
    dense = run(tiny, IMAGES)
    run(geoaccel.accelerate(tiny, merging=method), IMAGES)
    assert equal(run(geoaccel.restore(tiny), IMAGES), dense)
    assert geoaccel.describe(tiny).merging == ()


def test_twice_is_once_and_a_later_call_replaces(tiny: nn.Module, name: str, method: Any) -> None:
    once = run(geoaccel.accelerate(tiny, merging=method), IMAGES)
    again = run(tiny, IMAGES)
    twice = run(geoaccel.accelerate(geoaccel.accelerate(tiny, merging=method), merging=method), IMAGES)
    assert equal(once, again)
    assert equal(once, twice)
    description = geoaccel.describe(geoaccel.accelerate(tiny, merging=nothing(name)))
    assert [action.method for action in description.merging] == [nothing(name)]


def test_every_site_has_an_object_of_its_own(tiny: nn.Module, mixing: AttentionMerging) -> None:
    sites = tiny.backbone.sites(geoaccel.accelerate(tiny, merging=mixing))
    assert len({id(site.mixer) for site in sites["global"]}) == len(sites["global"])
    assert all(site.mixer.method == mixing for site in sites["global"])
    assert not any(hasattr(site.mixer, "method") for kind in ("encoder", "frame") for site in sites[kind])


def test_only_the_own_seed_matters_and_nothing_global_is_touched(tiny: nn.Module, method: Any) -> None:
    flags = [
        torch.is_grad_enabled,
        torch.get_default_dtype,
        torch.get_num_threads,
        torch.are_deterministic_algorithms_enabled,
        torch.is_autocast_enabled,
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.benchmark,
        lambda: torch.backends.cudnn.deterministic,
    ]
    outputs = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            before = torch.get_rng_state(), [flag() for flag in flags]
            outputs.append(run(geoaccel.accelerate(copy.deepcopy(tiny), merging=method), IMAGES))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert [flag() for flag in flags] == before[1]
    assert equal(*outputs)


def test_a_batch_of_two_equals_two_runs(tiny: nn.Module, method: Any) -> None:
    images = photographs(3, (5, 7), batch=2)
    geoaccel.accelerate(tiny, merging=method)
    both, first, second = run(tiny, images), run(tiny, images[:1]), run(tiny, images[1:])
    for key, value in both.items():
        assert relative_error(value, torch.cat([first[key], second[key]])) < 1e-5, key


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_answer_the_same(tiny: nn.Module, method: Any, twin: Any) -> None:
    expected = run(geoaccel.accelerate(tiny, merging=method), IMAGES)
    other = twin(tiny)
    mine, theirs = (
        {
            id(thing)
            for module in model.modules()
            for thing in (getattr(module, "mixer", None),)
            if hasattr(thing, "method")
        }
        for model in (tiny, other)
    )
    assert not mine & theirs
    assert equal(run(other, IMAGES), expected)
    assert geoaccel.describe(other).merging == geoaccel.describe(tiny).merging


@pytest.mark.slow
def test_compiled_models_answer_the_same(tiny: nn.Module, method: Any) -> None:
    geoaccel.accelerate(tiny, merging=method)
    expected = run(tiny, IMAGES)
    torch.compiler.reset()
    compiled = torch.compile(tiny, backend="eager")
    with torch.no_grad():
        camera = compiled(IMAGES, heads=["camera"])
    for key, value in camera.items():
        if isinstance(value, Tensor) and key != "images":
            assert relative_error(value, expected[key]) < 1e-5, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_any_number_of_frames_and_both_dtypes(
    tiny: nn.Module, method: Any, grid: tuple[int, int], dtype: torch.dtype
) -> None:
    from geoaccel.precision import cast

    cast(tiny, dtype)
    for frames in (1, 2, 3, 5):
        images = photographs(frames, grid)
        dense = run(geoaccel.restore(tiny), images)
        merged = run(geoaccel.accelerate(tiny, merging=method), images)
        for key, value in merged.items():
            assert (value.shape, value.dtype) == (dense[key].shape, dense[key].dtype), (frames, key)
            assert value.isfinite().all(), (frames, key)
        (action,) = geoaccel.describe(tiny).merging
        assert action.effective_ratio > 0 or frames == 1


def test_gradients_flow(tiny: nn.Module, method: Any) -> None:
    tiny.requires_grad_(True)
    geoaccel.accelerate(tiny, merging=method)
    output = tiny(photographs(3, (4, 6)))
    output["pose_enc" if "pose_enc" in output else "camera_poses"].square().sum().backward()
    for site in tiny.backbone.sites(tiny)["global"]:
        assert site.qkv.weight.grad is not None
        assert site.qkv.weight.grad.abs().sum() > 0


def test_one_frame_is_dense_and_says_so(tiny: nn.Module, mixing: AttentionMerging) -> None:
    images = photographs(1, (4, 6))
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=mixing)
    assert equal(run(tiny, images), dense)
    (action,) = geoaccel.describe(tiny).merging
    assert list(action.bypassed) == ["one frame"]
    assert "one frame" in str(geoaccel.describe(tiny))


def test_few_tokens_are_left_dense_by_default(tiny: nn.Module, name: str) -> None:
    assert MERGING[name].bypass is True  # type: ignore[attr-defined]
    dense = run(tiny, IMAGES)
    geoaccel.accelerate(tiny, merging=make(name, bypass=True))
    assert equal(run(tiny, IMAGES), dense)
    (action,) = geoaccel.describe(tiny).merging
    assert sum(action.bypassed.values()) == len(action.effects)


def test_made_and_run_in_inference_mode(tiny: nn.Module, name: str) -> None:
    with torch.inference_mode():
        geoaccel.accelerate(tiny.bfloat16(), merging=make(name))
        assert all(value.isfinite().all() for value in run(tiny, IMAGES.bfloat16()).values())
        run(tiny.float(), IMAGES)


def test_gradients_are_the_same_under_checkpointing(name: str) -> None:
    """Layers that run again in the backward pass find what they found before."""
    from torch.utils.checkpoint import checkpoint

    model: Any = build("vggt", **DEEP).requires_grad_()
    geoaccel.accelerate(model, merging=make(name))

    def gradient() -> Tensor:
        model.zero_grad()
        model(IMAGES, heads=["camera"])["pose_enc"].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.aggregator.parameters() if p.grad is not None])

    expected = gradient()
    for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    assert relative_error(gradient(), expected) < 1e-4


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_other_defaults_of_torch_change_nothing(tiny: nn.Module, name: str, default: Any) -> None:
    geoaccel.accelerate(tiny, merging=make(name))
    expected = run(tiny, IMAGES)
    before = torch.get_default_dtype()
    try:
        torch.set_default_device("meta") if default == "meta" else torch.set_default_dtype(default)
        found = run(tiny, IMAGES)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    assert equal(found, expected)
