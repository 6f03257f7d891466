"""A forward that keeps to a memory plan: the same numbers, and nothing of a plan is left behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.errors import UserError
from geoaccel.memory import Limit, choose, planned
from geoaccel.memory_plan import MemoryPlan
from geoaccel.merging import MERGING, CoMe
from geoaccel.mllm.geometry import geometry_features
from geoaccel.models import BACKBONES, build
from geoaccel.models.da3 import DA3
from geoaccel.models.layers.dpt_head import DPTHead
from geoaccel.models.layers.dual_head import DualHead
from geoaccel.models.layers.pi3_heads import PoseHead
from geoaccel.models.network import Network

FRAMES, SIZE = 5, (84, 98)
PLANS = [MemoryPlan(tokens=1, frames=8), MemoryPlan(tokens=150, frames=8, host_layers=1)]
ACTING: dict[str, dict[str, Any]] = {"asymmetric": {"stride": 2}, "avggt": {"stride": 2, "frame_layers": 1}}
PLANNED = ("vggt", "pi3", "da3", "pi3x")


@functools.cache
def network(backbone: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(backbone, **dataclasses.asdict(BACKBONES[backbone].tiny)).eval()


@functools.cache
def photographs(batch: int = 1) -> Tensor:
    return torch.rand(batch, FRAMES, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def accelerated(backbone: str, name: str) -> nn.Module:
    merging: Any = None
    if name == "come":
        merging = CoMe(predictor="untrained", bypass=False)
    elif name != "dense":
        merging = MERGING[name](bypass=False, **ACTING.get(name, {}))  # type: ignore[arg-type]
    return geoaccel.accelerate(network(backbone), merging=merging)


def differing(model: nn.Module, images: Tensor, plan: MemoryPlan) -> list[str]:
    """Predictions that are others with a plan."""
    with torch.inference_mode():
        before = model(images)
        with planned(model, plan):
            found = model(images)
    assert found.keys() == before.keys()
    # A CPU's attention rounds by how many queries there are: differently for the 43 tokens of a frame of DA3's.
    off = {"rtol": 1e-5, "atol": 1e-6} if isinstance(model, DA3) else {"rtol": 0.0, "atol": 0.0}
    tensors = {name: x for name, x in before.items() if isinstance(x, Tensor)}
    return [name for name, x in tensors.items() if not torch.allclose(found[name], x, **off)]


@pytest.mark.parametrize("name", ["dense", *sorted(MERGING)])
@pytest.mark.parametrize("backbone", PLANNED[:3])
def test_the_numbers_are_the_same(backbone: str, name: str) -> None:
    model = accelerated(backbone, name)
    for plan in PLANS:
        assert not differing(model, photographs(), plan), plan
    geoaccel.restore(model)


@pytest.mark.parametrize("backbone", PLANNED)
def test_heads_see_as_many_frames_as_the_plan_says(backbone: str) -> None:
    model, seen = network(backbone), []
    head = next(one for one in model.modules() if isinstance(one, DPTHead | DualHead | PoseHead))
    part = next(one for one in head.modules() if isinstance(one, nn.Conv2d | nn.Linear))
    hook = part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.inference_mode():
        for frames in (8, 2):
            with planned(model, MemoryPlan(tokens=1, frames=frames)):
                model(photographs())
    hook.remove()
    assert seen == [5, 2, 2, 1]


@pytest.mark.parametrize("backbone", PLANNED)
def test_of_two_scenes(backbone: str) -> None:
    assert not differing(network(backbone), photographs(2), PLANS[1])


def test_tracks_and_chosen_heads() -> None:
    """Query points, one head alone, and the features of a layer for a multimodal host, which nothing is planned for."""
    model, points = network("vggt"), torch.tensor([[10.0, 20.0], [50.0, 40.0]])
    with torch.inference_mode():
        before = model(photographs(), points)
        with planned(model, PLANS[1]):
            found = model(photographs(), points)
            alone = model(photographs(), heads=("camera",))
    for name in ("track", "vis", "conf"):
        assert torch.equal(found[name], before[name]), name
    assert torch.equal(alone["pose_enc"], before["pose_enc"])


def test_maps_to_track_on_are_made_as_many_frames_at_a_time_as_the_plan_says() -> None:
    model, seen = network("vggt"), []
    part = model.track_head.feature_extractor.projects[0]  # type: ignore[union-attr]
    hook = part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.inference_mode(), planned(model, MemoryPlan(tokens=1, frames=2)):
        model(photographs(), torch.tensor([[10.0, 20.0]]), heads=("track",))
    hook.remove()
    assert seen == [2, 2, 1]


def test_tracks_count_where_they_are_asked_for() -> None:
    """Maps of all frames, which no plan divides: four bytes a channel of each cell, three times at once."""
    model: Any = network("vggt")
    without, tracks = ("camera", "depth", "point"), ("camera", "depth", "point", "track")
    assert model.activation_bytes(50, SIZE) == model.activation_bytes(50, SIZE, heads=without)
    maps = 4 * model.config.track_features * (SIZE[0] // 2) * (SIZE[1] // 2)
    for plan in (None, *model.memory_plans("cuda")):
        few, many = (model.activation_bytes(n, SIZE, heads=tracks, plan=plan, device="cuda") for n in (200, 400))
        assert many - few > 3 * maps * 200
        least = model.activation_bytes(400, SIZE, heads=without, plan=plan, device="cuda")
        assert many > least


def test_an_order_of_frames_and_quantized_linears() -> None:
    model = geoaccel.accelerate(
        build("vggt", **dataclasses.asdict(BACKBONES["vggt"].tiny)).eval(), quantization="w4a16"
    )
    model.aggregator.patch_embed.reference = lambda patches, grid: torch.tensor([2, 0, 1, 3, 4])  # type: ignore[union-attr]
    geoaccel.accelerate(model, merging=MERGING["litevggt"](bypass=False))  # type: ignore[arg-type]
    assert not differing(model, photographs(), PLANS[1])


@pytest.mark.parametrize("backbone", PLANNED)
def test_features_for_a_host_follow_no_plan(backbone: str) -> None:
    """They are read of all tokens at once."""
    model = network(backbone)
    with torch.inference_mode():
        before = geometry_features(model, photographs())
        with planned(model, PLANS[1]):
            found = geometry_features(model, photographs())
    assert torch.equal(found.features, before.features)


def test_gradients_are_as_without_a_plan() -> None:
    model, images = network("vggt"), photographs().clone().requires_grad_()
    (before,) = torch.autograd.grad(model(images)["depth"].sum(), images)
    with planned(model, PLANS[1]):
        (found,) = torch.autograd.grad(model(images)["depth"].sum(), images)
    assert torch.equal(found, before)


def test_who_cannot_follow_a_plan_is_given_none() -> None:
    model, cameras = network("pi3"), Limit(heads=("camera",))
    whole, parts = (choose(model, 2000, SIZE, cameras, room).needed for room in (10**12, 0))
    assert parts < whole
    assert choose(model, 2000, SIZE, cameras, parts).plan is not None
    alone = choose(model, 2000, SIZE, cameras, parts, planned=False)
    assert (alone.plan, alone.fits) == (None, False)
    shared = copy.copy(model)
    shared.sharing = object()  # type: ignore[assignment]
    several = choose(shared, 2000, SIZE, cameras, parts)
    assert (several.plan, several.fits) == (None, False)


@pytest.mark.parametrize("backbone", ["vggt", "da3"])
def test_layers_that_no_head_reads_wait_nowhere(backbone: str) -> None:
    """A plan is made for all heads; cameras read one layer."""
    model = network(backbone)
    one, all_of_them = (MemoryPlan(2048, 1, host) for host in (1, model.kept_layers(model.heads)))
    assert all_of_them.host_layers > 1
    for predicted in (model.host_bytes, functools.partial(model.activation_bytes, device="cuda")):
        few, many = (predicted(2000, SIZE, plan=plan, heads=["camera"]) for plan in (one, all_of_them))
        assert few == many > 0
    assert model.host_bytes(2000, SIZE, all_of_them) == all_of_them.host_layers * model.host_bytes(2000, SIZE, one)


def test_networks_without_plans_run_everything_at_once() -> None:
    model = Network(BACKBONES["pi3"].tiny)
    assert model.memory_plans("cuda") == ()
    assert model.host_bytes(4, SIZE, PLANS[1]) == 0
    with pytest.raises(UserError, match="Network has no memory plans"), planned(model, PLANS[0]):
        pass


CAMERAS = {
    "extrinsics": torch.eye(4).repeat(1, FRAMES, 1, 1),
    "intrinsics": torch.tensor([[90.0, 0, 49], [0, 90, 42], [0, 0, 1]]).repeat(1, FRAMES, 1, 1),
}


@pytest.mark.parametrize("out_layers", [(3, 4, 5, 6), (3, 5, 6, 7)])
@pytest.mark.parametrize("alt_start", [1, 2, 3])
def test_layers_that_depth_anything_3_reads(alt_start: int, out_layers: tuple[int, ...]) -> None:
    """Behind blocks within frames, behind those that see the scene, and behind the first of all of these."""
    sizes = {**dataclasses.asdict(BACKBONES["da3"].tiny), "depth": 8, "alt_start": alt_start, "out_layers": out_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build("da3", **sizes).eval()
    for given in ({}, CAMERAS, {"heads": ("camera",)}, {"use_ray_pose": True}):
        with torch.inference_mode():
            before = model(photographs(), **given)
            with planned(model, PLANS[1]):
                found = model(photographs(), **given)
        assert found.keys() == before.keys()
        fitted = ("extrinsics", "intrinsics") if "use_ray_pose" in given else ()  # to rays of no camera: by chance
        for name in before.keys() - fitted:
            torch.testing.assert_close(found[name], before[name], rtol=1e-5, atol=1e-6)


def test_given_depths_are_encoded_a_few_frames_at_a_time() -> None:
    model: Any = network("pi3x")
    has_depth = torch.tensor([[True, True, False, True, True]])
    given = {"depths": 1 + photographs()[:, :, 0], "mask_add_depth": has_depth}
    seen: list[int] = []
    handle = model.depth_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        with torch.inference_mode():
            before = model(photographs(), **given)
            with planned(model, PLANS[0]):
                found = model(photographs(), **given)
    finally:
        handle.remove()
    assert seen == [4, 1, 1, 1, 1]
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_plan_ends_with_its_block() -> None:
    model = network("pi3")
    with pytest.raises(ZeroDivisionError), planned(model, PLANS[0]):
        raise ZeroDivisionError
    assert model.encoder.memory_plan is None  # type: ignore[union-attr]
