"""Depth Anything 3 against the released code's outputs: without cameras, with them, and every number of frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from references import Golden, golden_fixture, key_list, predict, relative_error
from safetensors.torch import save_file
from torch import nn
from upstream_objects import upstream_double

import geoaccel
from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.conditions import Conditions
from geoaccel.models import build
from geoaccel.models.da3 import DA3, DA3Config
from geoaccel.models.layers.any_view import REFERENCES
from geoaccel.models.layers.given_cameras import normalised, scale_between
from geoaccel.models.layers.ray_pose import cameras_from_rays
from geoaccel.models.weights import load_model, save_model

PARITY = 1e-5
FRAMES = {"images": 3, "first": 3, "middle": 3, "poses": 3, "two_views": 2, "one_view": 1}
DENSE = {"depth", "depth_conf", "ray", "ray_conf", "extrinsics", "intrinsics", "pose_enc"}
SIZES = {
    size: DA3.backbone.origins[f"depth-anything/DA3-{size.upper()}"].config
    for size in ("small", "base", "large", "giant")
}


da3 = golden_fixture("da3")


@pytest.fixture(scope="module")
def model(da3: Golden) -> DA3:
    return da3.network_of(DA3)


def without_memory(**config: Any) -> nn.Module:
    with torch.device("meta"):
        return build("da3", **config)


@pytest.mark.parametrize("case", FRAMES)
def test_outputs(model: DA3, da3: Golden, case: str) -> None:
    errors = da3.compare(predict(model, da3["inputs.images"][:, : FRAMES[case]], **da3.inputs(case)), case)
    assert errors.keys() == DENSE
    assert max(errors.values()) < PARITY, errors


def test_every_case_of_the_file_is_compared(da3: Golden) -> None:
    assert {case: settings.get("frames", 3) for case, settings in da3.cases.items()} == FRAMES


def test_features_and_the_chosen_frame(model: DA3, da3: Golden) -> None:
    """Upstream's exported layers are in the order in which the reference comes first; ours never leave their own."""
    with torch.no_grad():
        features = model.features(da3["inputs.images"], range(2, 10))
        vit = model.trunk_module
        for place, layer in enumerate(model.config.out_layers):
            patches, expected = vit.patches(features.layers[layer]), da3[f"outputs.images.feat.{place}"]
            assert relative_error(patches if place == 3 else patches[:, :, ::4], expected) < PARITY
        assert features.reference is not None
        assert torch.equal(features.reference, da3["outputs.images.reference_view"])
        for layer in (4, 9):
            own = vit.norm(features.layers[layer].chunk(2, dim=-1)[1])[:, :, 1:].unflatten(2, (5, 7))[:, :, ::2, ::2]
            for scene, first in enumerate(features.reference.tolist()):
                order = [first, *(frame for frame in range(3) if frame != first)]
                found = da3[f"outputs.images.aux.feat_layer_{layer}"][scene]
                assert relative_error(own[scene, order], found) < PARITY
        for case in ("first", "middle"):
            chosen = model.features(da3["inputs.images"], [9], ref_view_strategy=case).reference
            assert torch.equal(chosen, da3[f"outputs.{case}.reference_view"])
    camera = features.layers[9][:, :, 0]
    assert relative_error(camera, da3["outputs.images.camera_feature"]) < PARITY


def test_tokens_of_given_cameras(model: DA3, da3: Golden) -> None:
    with torch.no_grad():
        tokens = model.cam_enc(da3["inputs.extrinsics_normalised"], da3["inputs.intrinsics"], (70, 98))
    assert relative_error(tokens, da3["outputs.poses.camera_tokens"]) < PARITY
    for scene in range(2):
        found = normalised(da3["inputs.extrinsics"][scene])
        assert relative_error(found, da3["inputs.extrinsics_normalised"][scene]) < PARITY


def test_cameras_from_rays(model: DA3, da3: Golden) -> None:
    """Of known cameras; other draws make no difference, and torch's generator is left alone."""
    before = torch.get_rng_state()
    for seed in (0, 1):
        found = cameras_from_rays(da3["inputs.ray_pose.ray"], da3["inputs.ray_pose.ray_conf"], (70, 98), seed=seed)
        for name, value in zip(("extrinsics", "intrinsics"), found, strict=True):
            assert relative_error(value, da3[f"outputs.ray_pose.{name}"]) < 1e-3, name
    assert torch.equal(torch.get_rng_state(), before)
    predictions = predict(model, da3["inputs.images"], use_ray_pose=True)
    found = cameras_from_rays(predictions["ray"], predictions["ray_conf"], (70, 98))
    assert torch.equal(predictions["extrinsics"], found[0])
    with pytest.raises(ValueError, match="use_ray_pose needs the head 'ray'"):
        predict(model, da3["inputs.images"], use_ray_pose=True, heads=["camera"])


def test_rays_that_lie_are_outvoted(da3: Golden) -> None:
    ray, conf = da3["inputs.ray_pose.ray"].clone(), da3["inputs.ray_pose.ray_conf"]
    ray[:, :, ::4, ::3, :3] = torch.randn(ray[:, :, ::4, ::3, :3].shape, generator=torch.Generator().manual_seed(0))
    _, intrinsics = cameras_from_rays(ray, conf, (70, 98))
    assert relative_error(intrinsics, da3["outputs.ray_pose.intrinsics"]) < 0.05


def test_redundant_sizes_of_the_file_are_ours(da3: Golden, model: DA3) -> None:
    extra = {name: value for name, value in da3.upstream_config.items() if name not in da3.config}
    assert extra == {
        "mlp_ratio": 4, "qknorm_start": 2, "rope_start": 2, "cat_token": True, "num_register_tokens": 0,
        "head_dim_in": 64, "head_output_dim": 2, "cam_enc_dim_out": 32, "cam_dec_dim_in": 64,
    }  # fmt: skip


@pytest.mark.parametrize("size", ["small", "base"])
def test_full_size_has_the_published_names_and_shapes(size: str) -> None:
    network = without_memory(**SIZES[size])
    shapes = {f"model.{name}": list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == 443
    assert shapes == key_list(f"da3_{size}_keys.txt")


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_read_off_the_tensors(size: str) -> None:
    network: Any = without_memory(**SIZES[size])
    found = DA3Config(**DA3.backbone.config_from_names(network.state_dict()))
    assert found == network.config


@pytest.mark.parametrize("aliases", [True, False])
def test_published_files_are_read_strictly(da3: Golden, tmp_path: Path, aliases: bool) -> None:
    """Under the prefix of upstream's class; safetensors may have dropped three names of the shared norm."""
    dropped = () if aliases else tuple(f"head.scratch.output_conv2_aux.{level}.2." for level in (1, 2, 3))
    tensors = {f"model.{name}": value for name, value in da3.weights.items() if not name.startswith(dropped)}
    assert aliases or len(tensors) == len(da3.weights) - 6
    tensors["model.gs_head.norm.weight"] = torch.ones(3)
    config = '{"out_layers": [3, 5, 7, 9], "num_heads": 2, "cam_enc_num_heads": 4, "anything": 1}'
    (tmp_path / "config.json").write_text(config)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    found, expected = predict(loaded, da3["inputs.images"]), predict(da3.network(), da3["inputs.images"])
    assert max(relative_error(found[key], value) for key, value in expected.items()) < PARITY
    # One module has become four: they can be written again.
    save_model(loaded, tmp_path / "again.safetensors", dtype=torch.float32)
    again = predict(load_model(tmp_path / "again.safetensors"), da3["inputs.images"])
    assert max(relative_error(again[key], value) for key, value in expected.items()) < PARITY
    save_file({**tensors, "model.head.more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected \(first: head.more\)"):
        load_model(tmp_path)


def test_an_object_with_one_norm_in_four_places_is_adopted(da3: Golden) -> None:
    theirs: Any = upstream_double(da3.network())
    outputs = theirs.head.scratch.output_conv2_aux
    for output in outputs:
        output[2] = outputs[3][2]
    theirs.gs_head = nn.Linear(2, 2)
    expected = predict(theirs, da3["inputs.images"])
    ours: Any = geoaccel.adopt(theirs)
    assert type(ours) is DA3
    assert ours.head.scratch.output_conv2_aux[3][2].weight is outputs[3][2].weight
    found = predict(ours, da3["inputs.images"])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_gated_networks_run(da3: Golden) -> None:
    torch.manual_seed(0)
    network = build("da3", **{**da3.config, "swiglu": 1}).eval()
    with torch.no_grad():
        x = torch.randn(3, 32)
        mlp: Any = network.get_submodule("backbone.pretrained.blocks.0.mlp")
        gate, value = (x @ mlp.w12.weight.T + mlp.w12.bias).chunk(2, dim=-1)
        expected = (gate * gate.sigmoid() * value) @ mlp.w3.weight.T + mlp.w3.bias
        assert mlp.w3.weight.shape == (32, 88)
        torch.testing.assert_close(mlp(x), expected)
    assert predict(network, da3["inputs.images"])["depth"].isfinite().all()


def test_the_balanced_reference_in_ones_head() -> None:
    """Of three frames two are extreme in every respect."""
    tokens = torch.tensor([[[4.0, 0, 0, 0], [2.0, 1, 0, 0], [0.5, 0.5, 0.5, 0.5]]])
    assert REFERENCES["saddle_balanced"](tokens).tolist() == [1]
    assert REFERENCES["middle"](tokens).tolist() == [1]
    assert REFERENCES["first"](tokens).tolist() == [0]
    assert REFERENCES["saddle_sim_range"](tokens).shape == (1,)


def test_a_child_called_like_the_descriptor_is_found(model: DA3) -> None:
    assert model.backbone.name == "da3"
    assert model.get_submodule("backbone.pretrained") is model.trunk_module
    assert model.get_submodule("backbone") is not model.backbone


# ------------------------------------------------------------------------------------------------- given cameras


def scene(da3: Golden, **changes: Any) -> Conditions:
    poses, intrinsics = da3["inputs.extrinsics"][0], da3["inputs.intrinsics"][0]
    return Conditions(**{"poses": poses, "intrinsics": intrinsics, **changes})


def test_house_conditions_under_upstreams_names(model: DA3, da3: Golden) -> None:
    conditioning = model.backbone.conditions
    assert conditioning is not None
    given = conditioning.arguments(scene(da3))
    found, expected = (
        predict(model, da3["inputs.images"][:1], **given),
        predict(model, da3["inputs.images"], **da3.inputs("poses")),
    )
    assert max(relative_error(found[key], value[:1]) for key, value in expected.items()) < 1e-4


def test_depth_comes_in_the_scale_of_given_poses(model: DA3) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 3, generator=generator)
    centres[3] = 50  # one that was predicted elsewhere
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    turn = turn * torch.linalg.det(turn)
    predicted = 2.5 * centres @ turn.T + 1
    predicted[3] = 0
    assert float(scale_between(centres, predicted)) == pytest.approx(2.5, rel=1e-4)
    assert float(scale_between(torch.ones(4, 3), torch.randn(4, 3, generator=generator))) == 1
    world_from_cam = to_homogeneous(torch.cat([torch.eye(3).expand(12, 3, 3), predicted[..., None]], dim=-1))
    maps = torch.full((1, 12, 4, 4), 5.0)
    intrinsics = torch.eye(3).expand(1, 12, 3, 3)
    geometry = Geometry(
        invert_rigid(world_from_cam)[None], intrinsics, maps, maps[..., None].expand(-1, -1, -1, -1, 3), maps
    )
    poses = invert_rigid(to_homogeneous(torch.cat([torch.eye(3).expand(12, 3, 3), centres[..., None]], dim=-1)))
    conditioning = model.backbone.conditions
    assert conditioning is not None
    settled = conditioning.settle(geometry, Conditions(poses, 2 * intrinsics[0]))
    assert torch.allclose(settled.depth, torch.tensor(2.0), rtol=1e-4)
    assert torch.equal(settled.cam_from_world[0], poses)
    assert torch.equal(settled.intrinsics, 2 * intrinsics)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intrinsics": None}, "da3 takes poses together with intrinsics and nothing else; got poses"),
        (
            {"depths": torch.ones(3, 70, 98)},
            "intrinsics and nothing else; got poses and intrinsics and depths",
        ),
        ({"has_pose": torch.tensor([True, False, True])}, "da3 takes poses for all frames or for none; frame 1"),
    ],
)
def test_mixes_that_it_does_not_take(model: DA3, da3: Golden, changes: dict[str, Any], message: str) -> None:
    conditioning = model.backbone.conditions
    assert conditioning is not None
    with pytest.raises(ValueError, match=message):
        conditioning.arguments(scene(da3, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intrinsics": None}, "extrinsics were given without intrinsics"),
        ({"extrinsics": None}, "intrinsics were given without extrinsics"),
        ({"extrinsics": torch.ones(2, 3, 4, 4)}, "poses of frame 0 of scene 0 contain no rotation"),
        ({"intrinsics": torch.zeros(2, 3, 3, 3)}, "intrinsics of frame 0 of scene 0 are singular"),
        ({"extrinsics": torch.eye(4)}, "poses are torch.float32"),
        ({"ref_view_strategy": "last"}, "unknown choice of the reference view 'last'"),
    ],
)
def test_bad_cameras_are_one_line_before_the_model_runs(
    model: DA3, da3: Golden, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(model.trunk_module, "encode", lambda *_: pytest.fail("the encoder ran"))
    with pytest.raises(ValueError, match=message) as caught:
        predict(model, da3["inputs.images"], **{**da3.inputs("poses"), **changes})
    assert "\n" not in str(caught.value)


def test_a_scene_without_a_batch(model: DA3, da3: Golden) -> None:
    given = da3.inputs("poses")
    both = predict(model, da3["inputs.images"], **given)
    alone = predict(model, da3["inputs.images"][0], **{name: value[0] for name, value in given.items()})
    assert max(relative_error(alone[key], value[:1]) for key, value in both.items()) < PARITY


def test_packing_does_not_move_the_reference(da3: Golden) -> None:
    """Tokens are merged behind the first block, in front of the choice."""
    network: Any = geoaccel.accelerate(da3.network(), merging=geoaccel.merging.Alike(tap=0, bypass=False))  # type: ignore[attr-defined]
    with torch.no_grad():
        features = network.features(da3["inputs.images"], [9])
    assert features.layers[9].shape == (2, 3, 36, 64)
    assert features.reference.shape == (2,)


def test_sizes_fit() -> None:
    with pytest.raises(ValueError, match=r"out_layers \[3, 5, 7, 12\] are not four blocks in order"):
        DA3Config(out_layers=(3, 5, 7, 12))
