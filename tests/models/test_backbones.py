"""Names and shapes of the published checkpoints, and properties that hold for every backbone."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from references import Golden, key_list, relative_error
from torch import nn

from geoaccel.api import place_mixer
from geoaccel.attention import DENSE, AttentionContext, DenseMixer, ForwardState, FrameOnly
from geoaccel.errors import UserError, UserTypeError
from geoaccel.layout import Packing, TokenLayout
from geoaccel.models import build
from geoaccel.models.layers import encoder

KEY_LISTS = {"vggt": ("vggt_1b_keys.txt", 1797), "pi3": ("pi3_keys.txt", 1210), "pi3x": ("pi3x_keys.txt", 1873)}
# The two sizes of Depth Anything 3 are compared in its own file.


def few_patches(model: nn.Module) -> tuple[int, int]:
    """(H, W) of a grid of 4 x 5 patches."""
    patch = model.preprocess.patch_size
    return 4 * patch, 5 * patch


@pytest.mark.parametrize("name", KEY_LISTS)
def test_full_size_has_the_published_names_and_shapes(name: str) -> None:
    listing, count = KEY_LISTS[name]
    with torch.device("meta"):
        model = build(name)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(shapes) == count
    assert shapes == key_list(listing)


def test_unknown_backbone_and_keyword_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown backbone 'vgt'; known: .*vggt. Did you mean 'vggt'\?"):
        build("vgt")
    with pytest.raises(ValueError, match=r"vggt takes no keyword 'embed_dims'; known keywords: .*embed_dim"):
        build("vggt", embed_dims=32)


def test_batch_of_two_equals_two_runs(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"]
    with torch.no_grad():
        both = tiny(images)
        for index in range(2):
            alone = tiny(images[index : index + 1])
            for key, value in alone.items():
                if isinstance(value, torch.Tensor) and key != "images":
                    assert relative_error(both[key][index : index + 1], value) < 1e-5, key


def test_four_dimensional_input_gets_a_batch(tiny: nn.Module, golden: Golden) -> None:
    images = golden["inputs.images"][:1]
    with torch.no_grad():
        dense, short = tiny(images), tiny(images[0])
    for key in dense:
        if isinstance(dense[key], torch.Tensor):
            assert torch.equal(dense[key], short[key]), key


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 70, 99), (1, 2, 4, 70, 98), (70, 98), (1, 0, 3, 70, 98), (0, 2, 3, 70, 98), (0, 3, 70, 98)]
)
def test_wrong_shapes_are_refused(tiny: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"got|multiple|are empty"):
        tiny(torch.zeros(shape))


@pytest.mark.parametrize("images", [None, "photos/", np.zeros((1, 2, 3, 70, 98)), [torch.zeros(3, 70, 98)]])
def test_what_is_no_tensor_is_refused(tiny: nn.Module, images: Any) -> None:
    with pytest.raises(UserTypeError, match=r"as images; give a tensor \[B, S, 3, H, W\].*geoaccel.reconstruct takes"):
        tiny(images)


def test_bytes_are_refused(tiny: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got torch.uint8; divide by 255"):
        tiny(torch.zeros(1, 2, 3, 56, 70, dtype=torch.uint8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused_by_the_dense_model(tiny: nn.Module, value: float) -> None:
    images = torch.rand(2, 3, 3, *few_patches(tiny))
    images[1, 2, 0, 5, 5] = value
    with pytest.raises(ValueError, match="image 2 of scene 1 holds NaN or infinite values; leave it out"):
        tiny(images)


def test_images_are_looked_at_once_a_forward(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[torch.Size] = []
    monkeypatch.setattr(encoder, "_check_finite", lambda images: looked.append(images.shape))
    images = torch.zeros(1, 2, 3, *few_patches(tiny))
    tiny(images)
    assert looked == [images.shape]


def test_large_finite_images_are_not_taken_for_infinite() -> None:
    assert encoder.check_images(torch.full((1, 1, 3, 28, 28), 3e38), 14) == (2, 2)


def test_unknown_head_is_refused(tiny: nn.Module, golden: Golden) -> None:
    with pytest.raises(ValueError, match="unknown head 'depths'"):
        tiny(golden["inputs.images"], heads=["depths"])


def test_heads_left_out_do_not_run(tiny: nn.Module, golden: Golden) -> None:
    with torch.no_grad():
        images, chosen = golden["inputs.images"], "camera" if "camera" in tiny.heads else tiny.heads[0]
        everything, alone = tiny(images), tiny(images, heads=[chosen])
        others = tiny(images, heads=[head for head in tiny.heads if head != chosen])
    own = {key for key, value in alone.items() if isinstance(value, torch.Tensor)} - {"images"}
    assert own <= set(everything)
    assert all(torch.equal(everything[key], alone[key]) for key in own)
    own = {key for key in own if alone[key].ndim > 1}  # what is one number of the scene belongs to several heads
    assert own
    assert not own & set(others)


def test_frame_chunks_do_not_change_the_output(tiny: nn.Module, golden: Golden) -> None:
    if "frames_chunk_size" not in inspect.signature(tiny.forward).parameters:
        pytest.skip("its heads do not run in chunks of frames")
    with torch.no_grad():
        whole, chunked = (tiny(golden["inputs.images"], frames_chunk_size=n) for n in (8, 1))
    for key, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert relative_error(chunked[key], value) < 1e-5, key


def test_bfloat16_runs_end_to_end_and_stays_close(tiny: nn.Module, golden: Golden) -> None:
    narrow = copy.deepcopy(tiny).to(torch.bfloat16)
    with torch.no_grad():
        predictions = narrow(golden["inputs.images"].bfloat16())
        reference = tiny(golden["inputs.images"])
    for key, value in reference.items():
        if isinstance(value, torch.Tensor) and key != "images":
            assert predictions[key].isfinite().all(), key
            assert relative_error(predictions[key].float(), value) < 0.1, key
    geometry = narrow.backbone.geometry(predictions, tuple(golden["inputs.images"].shape[-2:]))
    assert geometry.cam_from_world.dtype == torch.float32


def test_geometry_has_house_shapes(tiny: nn.Module, golden: Golden) -> None:
    size = tuple(golden["inputs.images"].shape[-2:])
    with torch.no_grad():
        geometry = tiny.backbone.geometry(tiny(golden["inputs.images"]), size)
    assert geometry.cam_from_world.shape == (2, 3, 4, 4)
    assert geometry.intrinsics.shape == (2, 3, 3, 3)
    assert geometry.depth.shape == geometry.conf.shape == (2, 3, *size)
    assert geometry.points_world.shape == (2, 3, *size, 3)
    identity = geometry.cam_from_world[..., :3, :3] @ geometry.cam_from_world[..., :3, :3].transpose(-1, -2)
    assert torch.allclose(identity, torch.eye(3).expand_as(identity), atol=1e-5)


class Curious:
    """A mixer that looks at what the encoder left, and in its own block at whether it is gone."""

    def __init__(self) -> None:
        self.shown: list[tuple] = []
        self.later: list[tuple] = []

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        assert context.layout is not None
        batch, frames, patches = (context.layout.batch, context.layout.frames, context.layout.num_patches)
        assert context.state.images.shape[:2] == (batch, frames)
        assert context.state.patches.shape[:3] == (batch, frames, patches)
        self.shown.append((heads * head_dim, device.type, context.kind, context.index))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, x: torch.Tensor, context: AttentionContext):
        self.later.append((x.shape[-1], x.device.type, context.kind, context.index))
        assert context.state.images is None
        assert context.state.patches is None
        return DENSE(q, k, v, x, context)


def test_what_the_encoder_left_is_shown_to_mixers_and_released(tiny: nn.Module, golden: Golden) -> None:
    """It would live as long as the last block, where memory is scarcest."""
    mixer = Curious()
    place_mixer(tiny, mixer)
    with torch.no_grad():
        tiny(golden["inputs.images"])
    assert mixer.shown == mixer.later
    assert [shown[-2:] for shown in mixer.shown] == [("global", index) for index in range(len(mixer.shown))]


class Alone:
    """A packer behind which every token stands for itself."""

    def __init__(self, layer: int, *, packed: bool) -> None:
        self.layer = layer
        self.packed = packed
        self.calls = 0

    def __call__(self, x: torch.Tensor, layout: TokenLayout, state: ForwardState) -> tuple[torch.Tensor, Packing]:
        self.calls += 1
        assert state.images.shape[:2] == x.shape[:2]
        return (x.flatten(0, 2) if self.packed else x), Packing.identity(layout)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_packing_every_token_alone_changes_nothing(tiny: nn.Module, golden: Golden, layer: int, packed: bool) -> None:
    """Packed segments and dense batches are the same computation, from any encoder block on."""
    packer = Alone(layer, packed=packed)
    with torch.no_grad():
        dense = tiny(golden["inputs.images"])
        (slot,) = (module for module in tiny.modules() if hasattr(module, "token_packer"))
        slot.token_packer = packer  # type: ignore[assignment]
        merged = tiny(golden["inputs.images"])
    assert packer.calls == 1
    for key, value in dense.items():
        if isinstance(value, torch.Tensor):
            assert relative_error(merged[key], value) < 1e-5, key


def test_frame_only_attention_cuts_the_frames_apart(tiny: nn.Module, golden: Golden) -> None:
    """With the control in place a frame's depth does not depend on the other frames; only the scene's scale may."""
    images = golden["inputs.images"][:1, :2]  # of three, some backbones choose one that stands out
    other = images.clone()
    other[:, 1:] = other[:, 1:].flip(-1)

    def first_depth(images: torch.Tensor) -> torch.Tensor:
        depth = tiny.backbone.geometry(tiny(images), tuple(images.shape[-2:])).depth[:, 0]
        return depth / depth.mean()

    with torch.no_grad():
        assert relative_error(first_depth(other), first_depth(images)) > 1e-4
        place_mixer(tiny, FrameOnly())
        assert relative_error(first_depth(other), first_depth(images)) < 1e-6


def test_kernels_agree(tiny: nn.Module, golden: Golden) -> None:
    with torch.no_grad():
        reference = tiny(golden["inputs.images"])
        for kind in ("encoder", "frame", "global"):
            place_mixer(tiny, DenseMixer("matmul"), kind)
        plain = tiny(golden["inputs.images"])
    for key, value in reference.items():
        if isinstance(value, torch.Tensor):
            assert relative_error(plain[key], value) < 1e-5, key


def test_mixers_stay_out_of_the_state_dict_and_survive_copies(tiny: nn.Module, golden: Golden) -> None:
    keys = list(tiny.state_dict())
    place_mixer(tiny, FrameOnly())
    assert list(tiny.state_dict()) == keys
    for same in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert [site.mixer for site in same.backbone.sites(same)["global"]] == [
            FrameOnly() for _ in tiny.backbone.sites(tiny)["global"]
        ]
        assert same.backbone.sites(same)["frame"][0].mixer == DENSE


def test_activation_estimate_grows_with_frames_and_size(tiny: nn.Module) -> None:
    small = tiny.activation_bytes(4, (70, 98))
    assert small < tiny.activation_bytes(8, (70, 98)) < tiny.activation_bytes(8, (140, 98))
