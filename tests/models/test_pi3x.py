"""Pi3X against the released code's outputs, without conditions and with every mix of them."""

from __future__ import annotations

import pytest
import torch
from references import Golden, golden_fixture, key_list, predict, relative_error
from torch import Tensor

import geoaccel
from geoaccel.attention import ForwardState
from geoaccel.conditions import Conditions
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging import Alike
from geoaccel.models import BACKBONES
from geoaccel.models.layers.given import given
from geoaccel.models.pi3x import Pi3X, Pi3XConfig

PARITY = 1e-5
CASES = ("images", "intrinsics", "depths", "full", "poses", "poses_static", "masks", "one_pose")


pi3x = golden_fixture("pi3x")


@pytest.fixture(scope="module")
def model(pi3x: Golden) -> Pi3X:
    return pi3x.network_of(Pi3X)


@pytest.mark.parametrize("case", CASES)
def test_outputs(model: Pi3X, pi3x: Golden, case: str) -> None:
    conditions = pi3x.inputs(case)
    before = {name: value.clone() for name, value in conditions.items()}
    errors = pi3x.compare(predict(model, pi3x["inputs.images"], **conditions), case)
    assert {"camera_poses", "conf", "local_points", "metric"} <= errors.keys()
    assert max(errors.values()) < PARITY, errors
    assert all(torch.equal(conditions[name], value) for name, value in before.items())


def test_every_case_and_output_of_the_file_is_compared(model: Pi3X, pi3x: Golden) -> None:
    assert set(pi3x.cases) == set(CASES)
    found = pi3x.compare(predict(model, pi3x["inputs.images"]), "images")
    assert found.keys() == {"camera_poses", "conf", "local_points", "metric", "points", "rays"}


@pytest.mark.parametrize("case", CASES)
def test_tokens_on_the_way(model: Pi3X, pi3x: Golden, case: str) -> None:
    images, conditions = pi3x["inputs.images"], pi3x.inputs(case)
    told = given((2, 3, 70, 98), images.device, **conditions) if conditions else None
    with torch.no_grad():
        encoded = model.encoder((images - model.image_mean) / model.image_std)
        encoded = encoded if told is None else model.with_maps(encoded, told)
        decoded = model.features(images, told).flatten(0, 1)
    expected = pi3x.tensors.get(f"outputs.{case}.{'encoded' if conditions else 'patch_tokens'}")
    assert expected is not None or case not in ("images", "full", "masks")
    if expected is not None:
        assert relative_error(encoded.x[:, :, 5:].flatten(0, 1), expected) < PARITY
    decoded, key = (decoded[:, ::4], "decoder_t4") if conditions else (decoded, "decoder")
    assert relative_error(decoded, pi3x[f"outputs.{case}.{key}"]) < PARITY


def test_redundant_sizes_of_the_file_are_ours(pi3x: Golden, model: Pi3X) -> None:
    assert pi3x.upstream_config["vit_num_register_tokens"] == model.encoder.num_registers
    assert pi3x.upstream_config["mlp_ratio"] == 4


def test_rays_may_stand_for_intrinsics(model: Pi3X, pi3x: Golden) -> None:
    from geoaccel.cameras import unproject_depth

    images, intrinsics = pi3x["inputs.images"], pi3x["inputs.intrinsics"]
    directions = 3 * unproject_depth(torch.ones(2, 3, 70, 98), intrinsics)  # of any length
    expected = predict(model, images, intrinsics=intrinsics)
    found = predict(model, images, rays=directions)
    assert max(relative_error(found[key], value) for key, value in expected.items()) < PARITY
    with pytest.raises(ValueError, match="intrinsics and rays were both given"):
        predict(model, images, rays=directions, intrinsics=intrinsics)


def test_conditions_of_no_frame_are_none(model: Pi3X, pi3x: Golden) -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    masks = dict.fromkeys(("mask_add_depth", "mask_add_ray", "mask_add_pose"), none)
    found = predict(model, pi3x["inputs.images"], **pi3x.inputs("full"), **masks)
    expected = predict(model, pi3x["inputs.images"])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_first_scene_of_a_batch_needs_no_second(model: Pi3X, pi3x: Golden) -> None:
    conditions = pi3x.inputs("masks")
    both = predict(model, pi3x["inputs.images"], **conditions)
    alone = predict(model, pi3x["inputs.images"][0], **{name: value[0] for name, value in conditions.items()})
    assert max(relative_error(alone[key], value[:1]) for key, value in both.items()) < PARITY


class Alone:
    """A packer behind which every token stands for itself."""

    layer = 0

    def __init__(self, packed: bool) -> None:
        self.packed = packed

    def __call__(self, x: Tensor, layout: TokenLayout, state: ForwardState) -> tuple[Tensor, Packing]:
        return (x.flatten(0, 2) if self.packed else x), Packing.identity(layout)


@pytest.mark.parametrize("packed", [True, False])
def test_conditions_reach_packed_tokens(model: Pi3X, pi3x: Golden, packed: bool) -> None:
    images, conditions = pi3x["inputs.images"], pi3x.inputs("masks")
    expected = predict(model, images, **conditions)
    network = pi3x.network()
    network.encoder.token_packer = Alone(packed)  # type: ignore[union-attr, assignment]
    found = predict(network, images, **conditions)
    assert max(relative_error(found[key], value) for key, value in expected.items()) < PARITY
    merged = geoaccel.accelerate(network, merging=Alike(bypass=False, variant="packed" if packed else "direct"))
    found = predict(merged, images, **conditions)
    assert 1e-4 < max(relative_error(found[key], value) for key, value in expected.items()) < 0.5
    without = predict(merged, images, **{**conditions, "poses": None, "mask_add_pose": None})
    assert relative_error(found["camera_poses"], without["camera_poses"]) > 1e-4


def test_house_conditions_under_upstreams_names(model: Pi3X, pi3x: Golden) -> None:
    """Poses the other way round, and unknown ones never read."""
    from geoaccel.cameras import invert_rigid

    conditioning = model.backbone.conditions
    assert conditioning is not None
    known = torch.tensor([True, False, True])
    poses = invert_rigid(pi3x["inputs.poses"][0])
    poses[1] = torch.nan
    depths = pi3x["inputs.depths"][0].clone()
    depths[1] = torch.nan
    house = Conditions(poses, pi3x["inputs.intrinsics"][0], depths, has_pose=known, has_depth=known)
    house.check(3, (70, 98))
    found = predict(model, pi3x["inputs.images"][:1], **conditioning.arguments(house))
    assert all(value.isfinite().all() for value in found.values())
    theirs = conditioning.arguments(Conditions(invert_rigid(pi3x["inputs.poses"][0])))
    assert relative_error(theirs["poses"], pi3x["inputs.poses"][:1]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": torch.ones(2, 3, 70, 97)}, r"depths are torch.float32 \[2, 3, 70, 97\]; expected floats"),
        ({"depths": torch.full((2, 3, 70, 98), torch.nan)}, "depths of frame 0 of scene 0 contain NaN"),
        ({"intrinsics": torch.zeros(2, 3, 3, 3)}, "intrinsics of frame 0 of scene 0 are singular"),
        ({"poses": 2 * torch.eye(4).expand(2, 3, 4, 4)}, "poses of frame 0 of scene 0 contain no rotation"),
        ({"mask_add_depth": torch.ones(2, 3, dtype=torch.bool)}, "mask_add_depth was given without"),
        ({"mask_add_pose": torch.ones(2, 3)}, "mask_add_pose is torch.float32"),
        ({"rays": torch.ones(2, 3, 3)}, "got rays"),
    ],
)
def test_bad_conditions_are_one_line_before_the_model_runs(
    model: Pi3X, pi3x: Golden, monkeypatch: pytest.MonkeyPatch, change: dict[str, Tensor], message: str
) -> None:
    monkeypatch.setattr(model.encoder, "forward", lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message) as caught:
        predict(model, pi3x["inputs.images"], **change)
    assert "\n" not in str(caught.value)


def test_its_checkpoint_is_told_from_pi3s() -> None:
    for name in ("pi3", "pi3x"):
        names = key_list(f"{name}_keys.txt")
        owners = [backbone for backbone in BACKBONES.values() if backbone.owns(names)]
        assert max(owners, key=lambda backbone: len(backbone.children)).name == name


def test_sizes_fit() -> None:
    with pytest.raises(ValueError, match=r"pose_inject_after \[1, 9\] reach beyond the last of 6 blocks"):
        Pi3XConfig(decoder_depth=6, pose_inject_after=(1, 9))
