"""What every merging method must hold, on every backbone: the suite runs over the registry.

A method is looked at from outside. Whole models are compared with the dense model; mixers are called with a kernel that
answers its queries, which shows after the restore, token by token, which group each token is in and what stood for it.

Tiny models have so few tokens that every method would leave them alone: the suite switches bypassing off. A method with
other knobs has a line in KNOBS or NOTHING.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error
from merging_scenes import Scene, groups_of, photographs
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import KERNELS, AttentionContext, prepare
from geoaccel.layout import Packing
from geoaccel.merging import MERGING, AttentionMerging, SpanMerging
from geoaccel.models import build
from geoaccel.plan import MergePlan

# Knobs with which a method merges nothing, where that is not ratio=0.
NOTHING: dict[str, dict[str, Any]] = {}
SHARES = ("ratio", "protect")
KEPT = ("query_keep", "key_keep")
DEEP: dict[str, Any] = {
    "img_size": 28, "embed_dim": 32, "depth": 8, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
    "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_layers": [0, 2, 4, 7], "heads": ["camera"],
    "layer_scale": 0.3,
}  # fmt: skip
GRIDS = [(4, 6), (5, 7), (7, 4)]


def knobs_of(name: str) -> list[str]:
    return list(inspect.signature(MERGING[name]).parameters)


def make(name: str, **knobs: Any) -> Any:
    """A method that never bypasses itself."""
    assert "bypass" in knobs_of(name), f"{name} needs the knob bypass, or nothing of it is tested"
    return MERGING[name](**{"bypass": False, **knobs})


def nothing(name: str) -> Any:
    return make(name, **NOTHING.get(name, {"ratio": 0}))


@pytest.fixture(params=sorted(MERGING))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def method(name: str) -> Any:
    return make(name)


@pytest.fixture
def mixing(method: Any) -> AttentionMerging:
    """Methods that act in one attention."""
    if not isinstance(method, AttentionMerging):
        pytest.skip("acts on the token stream")
    return method


@pytest.fixture
def packing(method: Any) -> SpanMerging:
    """Methods that act on the token stream."""
    if not isinstance(method, SpanMerging):
        pytest.skip("acts in one attention")
    return method


@torch.no_grad()
def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in model(images).items() if isinstance(value, Tensor) and key != "images"}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


IMAGES = photographs(3, (5, 7))


# ------------------------------------------------------------------------------------------------- whole models


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
    from geoaccel.models.weights import cast

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


# ---------------------------------------------------------------------------------------- bypass, errors, composition


def test_one_frame_is_dense_and_says_so(tiny: nn.Module, mixing: AttentionMerging) -> None:
    images = photographs(1, (4, 6))
    dense = run(tiny, images)
    geoaccel.accelerate(tiny, merging=mixing)
    assert equal(run(tiny, images), dense)
    (action,) = geoaccel.describe(tiny).merging
    assert list(action.bypassed) == ["one frame"]
    assert "one frame" in str(geoaccel.describe(tiny))


def test_few_tokens_are_left_dense_by_default(tiny: nn.Module, mixing: AttentionMerging) -> None:
    dense = run(tiny, IMAGES)
    geoaccel.accelerate(tiny, merging=mixing.name)
    assert equal(run(tiny, IMAGES), dense)
    (action,) = geoaccel.describe(tiny).merging
    assert sum(action.bypassed.values()) == len(action.effects)


def test_made_and_run_in_inference_mode(tiny: nn.Module, name: str) -> None:
    knobs = {"choose": "least_confident", "predictor": "untrained"} if name == "come" else {}
    with torch.inference_mode():
        geoaccel.accelerate(tiny.bfloat16(), merging=make(name, **knobs))
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


def test_rows_of_whole_numbers_come_in_any_kind(name: str) -> None:
    for knob, good, bad in (
        ("group", np.array([2, 3]), (3, (2.5, 2), "23")),
        ("block", np.array([8, 2]), (128, (8, 2.5))),
        ("refresh", np.arange(0, 24, 6), (6, (0.5,))),
    ):
        if knob not in knobs_of(name):
            continue
        assert getattr(make(name, **{knob: good}), knob) == tuple(good.tolist())
        for value in bad:
            with pytest.raises(ValueError, match=rf"{name}: {knob}="):
                make(name, **{knob: value})


@pytest.mark.parametrize("value", ["no", "false", 0, None])
def test_flags_are_true_or_false(name: str, value: Any) -> None:
    flags = [knob.name for knob in dataclasses.fields(MERGING[name]) if isinstance(knob.default, bool)]  # type: ignore[arg-type]
    assert "bypass" in flags
    for flag in flags:
        with pytest.raises(ValueError, match=f"{name}: {flag}={value!r} is neither true nor false"):
            make(name, **{flag: value})


def test_photographs_with_nan_are_one_clear_line(tiny: nn.Module, name: str) -> None:
    images = photographs(3, (4, 6))
    images[0, 1, 0, 5, 5] = torch.nan
    for knobs in ({}, {"bypass": True}):
        geoaccel.accelerate(tiny, merging=make(name, **knobs))
        with pytest.raises(ValueError, match="photograph 1 of scene 0 holds NaN") as caught:
            run(tiny, images)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 0, 1, 1.5, float("nan"), "half"])
def test_shares_outside_the_range_are_refused(name: str, value: Any) -> None:
    assert "ratio" in knobs_of(name)
    for knobs, allowed, fine in ((SHARES, r"\[0, 1\)", 0), (KEPT, r"\(0, 1\]", 1)):
        if value == fine:
            continue
        for knob in set(knobs) & set(knobs_of(name)):
            with pytest.raises(ValueError, match=rf"{name}.*{knob}.*{allowed}") as caught:
                make(name, **{knob: value})
            assert "\n" not in str(caught.value)


def test_methods_are_frozen_and_print_their_knobs(method: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.bypass = True
    assert "bypass=False" in repr(method)
    assert hash(method) == hash(make(method.name))


# --------------------------------------------------------------------------------------------------- one mixer


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A kernel that answers its queries; gives the number of keys of each call."""
    keys: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        keys.append(k.shape[2])
        return q

    monkeypatch.setitem(KERNELS._entries, "echo", kernel)
    return keys


SCENES = [(2, (4, 6), 1), (3, (5, 7), 1), (3, (7, 4), 2), (5, (3, 3), 1)]


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_every_query_is_answered_by_the_mean_of_its_group(
    mixing: AttentionMerging, echo: list[int], frames: int, grid: tuple[int, int], batch: int
) -> None:
    """So groups are a partition, merging takes means and unmerging finds its way back; and the effect counts right."""
    scene = Scene(frames, grid, batch)
    mixers = mixing.mixers("echo", 3)
    for index, mixer in enumerate(mixers):
        out = scene.through(mixer, index)
        assert out.shape == scene.q.shape
        counted = 0
        for b in range(batch):
            for head in range(scene.heads):
                groups = groups_of(out[b, head])
                counted += len(groups)
                for members in groups:
                    mean = scene.q[b, head, members].mean(0)
                    assert torch.allclose(out[b, head, members[0]], mean, atol=1e-5)
        effect = mixer.effect
        assert effect is not None
        assert effect.tokens == scene.layout.tokens_per_scene
        assert effect.queries == pytest.approx(counted / batch / scene.heads)
        assert effect.effective_ratio == pytest.approx(1 - counted / batch / scene.heads / effect.tokens)
        assert effect.keys <= max(echo)
        assert effect.keys < effect.tokens


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_no_two_special_tokens_share_a_group(
    mixing: AttentionMerging, echo: list[int], frames: int, grid: tuple[int, int], batch: int
) -> None:
    """Camera and register tokens survive: alone, or as the destination of patches."""
    scene = Scene(frames, grid, batch)
    out = scene.through(mixing.mixers("echo", 1)[0])[:, :, scene.special]
    for row in out.flatten(0, 1):
        assert len(row.unique(dim=0)) == len(row)


@pytest.mark.parametrize(("frames", "grid", "batch"), SCENES)
def test_a_constant_comes_back(mixing: AttentionMerging, frames: int, grid: tuple[int, int], batch: int) -> None:
    """Whatever is attended to: no empty group is seen as a key, nothing is lost or doubled on the way back."""
    scene = Scene(frames, grid, batch)
    scene.v = torch.full_like(scene.v, 0.7)
    for index, mixer in enumerate(mixing.mixers("sdpa", 3)):
        assert torch.allclose(scene.through(mixer, index), scene.v, atol=1e-5)


def test_what_the_backbone_left_is_read_before_the_first_block(mixing: AttentionMerging) -> None:
    """Photographs and the encoder's tokens are let go then; no layer may need them."""
    scene = Scene(3, (5, 7))
    mixers = mixing.mixers("sdpa", 2)
    for index, mixer in enumerate(mixers):
        context = AttentionContext("global", index, scene.layout, state=scene.state)
        prepare(mixer, scene.heads, scene.head_dim, scene.x.device, context)
    del scene.state["images"], scene.state["patches"]
    for index, mixer in enumerate(mixers):
        mixer(scene.q, scene.k, scene.v, scene.x, AttentionContext("global", index, scene.layout, state=scene.state))
        assert mixer.effect is not None
        assert mixer.effect.effective_ratio > 0


def test_plans_are_partitions(mixing: AttentionMerging, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[MergePlan] = []
    init = MergePlan.__init__

    def record(self: MergePlan, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        plans.append(self)

    monkeypatch.setattr(MergePlan, "__init__", record)
    Scene(3, (5, 7), 2).through(mixing.mixers("sdpa", 1)[0])
    assert plans
    for plan in plans:
        assert plan.group_of.min() >= 0
        assert plan.group_of.max() < plan.num_groups
        assert int(plan.counts.sum()) == plan.group_of.numel()
        for row, length in zip(plan.counts.flatten(0, -2), plan.lengths.flatten(), strict=True):
            assert (row[:length] > 0).all()
            assert (row[length:] == 0).all()


def test_scenes_of_a_batch_do_not_see_each_other(mixing: AttentionMerging, echo: list[int]) -> None:
    out = Scene(3, (5, 7), 2).through(mixing.mixers("echo", 1)[0])
    both = Scene(3, (5, 7), 2)
    both.q[1] = torch.randn(both.q[1].shape)
    both.k[1] = torch.randn(both.k[1].shape)
    both.x[1] = torch.randn(both.x[1].shape)
    both.state = {"images": both.state["images"].flip(0).roll(1, 2), "patches": both.state["patches"].flip(0)}
    both.state["images"][0] = Scene(3, (5, 7), 2).state["images"][0]
    both.state["patches"][0] = Scene(3, (5, 7), 2).state["patches"][0]
    assert torch.equal(both.through(mixing.mixers("echo", 1)[0])[0], out[0])


# --------------------------------------------------------------------------------------------------- one packer


@pytest.mark.parametrize(("frames", "grid"), [(1, (4, 6)), (3, (5, 7)), (2, (7, 4))])
def test_packed_rows_are_the_means_of_their_tokens(
    tiny: nn.Module, packing: SpanMerging, monkeypatch: pytest.MonkeyPatch, frames: int, grid: tuple[int, int]
) -> None:
    """Special tokens stand alone, every row stands for someone, and the weights say for how many."""
    packings: list[Packing] = []
    init = Packing.__init__

    def record(self: Packing, *args: Any, **knobs: Any) -> None:
        init(self, *args, **knobs)
        packings.append(self)

    monkeypatch.setattr(Packing, "__init__", record)
    geoaccel.accelerate(tiny, merging=packing)
    run(tiny, photographs(frames, grid))
    assert packings
    for found in packings:
        counts = found.owner.flatten().bincount(minlength=len(found.weight))
        assert torch.equal(counts, found.weight.long())
        assert (counts > 0).all()
        special = found.owner.shape[2] - grid[0] * grid[1]
        assert (found.weight[found.owner[:, :, :special]] == 1).all()
        rows = torch.randn(len(found.weight), 4)
        dense = found.unpack(rows)
        total = torch.zeros_like(rows).index_add_(0, found.owner.flatten(), dense.flatten(0, -2))
        assert torch.allclose(total / found.weight[:, None], rows, atol=1e-5)
