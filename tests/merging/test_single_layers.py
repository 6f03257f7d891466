"""Methods for single layers of global attention: what frame-only and first-frame see, and which layer gets what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merging_scenes import Scene, photographs
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import AttentionContext, DenseMixer
from geoaccel.errors import UserError
from geoaccel.eval.run.settings import compose_settings
from geoaccel.layout import Packing
from geoaccel.merging import FirstFrameLayer, FrameLayer
from geoaccel.merging.asymmetric import Asymmetric
from geoaccel.merging.httm import HTTM
from geoaccel.merging.layers import PRESETS, Layers, layer_method, named, plain
from geoaccel.models import BACKBONES, build
from geoaccel.testing import tiny_network
from geoaccel.testing.rules import run

KINDS = {"frame-only": FrameLayer(), "first-frame": FirstFrameLayer(), "first alone": FirstFrameLayer(own=False)}


def seen(kind: str, frames: Tensor) -> Tensor:  # [N] to [N, N], bool
    """Which keys each query sees, from the frame that each token is in."""
    own, first = frames[:, None] == frames[None], (frames == 0).expand(len(frames), -1)
    return {"frame-only": own, "first-frame": own | first, "first alone": first}[kind]


def by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Softmax over what is visible, written out, in float64."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(~visible, -math.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("kind", KINDS)
def test_queries_see_their_frames_and_no_other(kind: str) -> None:
    scene = Scene(4, (3, 5), batch=2)
    frames = torch.arange(4).repeat_interleave(scene.layout.tokens_per_frame)
    mixer = KINDS[kind].mixer("sdpa")
    visible = seen(kind, frames)
    expected = by_hand(scene.q, scene.k, scene.v, visible)
    torch.testing.assert_close(scene.through(mixer).double(), expected, rtol=1e-4, atol=1e-5)
    assert mixer.effect is not None
    assert mixer.effect.keys == pytest.approx(float(visible.sum(1).double().mean()))
    assert mixer.effect.queries == mixer.effect.tokens == len(frames)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_see_the_same_and_bring_their_weights(kind: str) -> None:
    scene = Scene(3, (4, 6), batch=1)
    layout = scene.layout
    owner = torch.arange(layout.tokens_per_scene).view(1, layout.frames, -1).clone()
    for frame in range(layout.frames):  # patches 0 and 1 of every frame share a row
        owner[0, frame, layout.num_special + 1 :] -= 1
        owner[0, frame] -= frame
    packing = Packing.from_owner(owner, layout)
    rows = sum(packing.frame_lengths)
    q, k, v = (t[:, :, :rows] for t in (scene.q, scene.k, scene.v))
    context = AttentionContext("global", 0, layout, lengths=packing.scene_lengths, packing=packing)
    mixer = KINDS[kind].mixer("sdpa")
    frames = torch.arange(3).repeat_interleave(torch.tensor(packing.frame_lengths))
    visible, bias = seen(kind, frames), packing.weight.double().log()
    mixed, _ = mixer(q, k, v, scene.x[:, :rows], context)
    torch.testing.assert_close(mixed.double(), by_hand(q, k, v, visible, bias), rtol=1e-4, atol=1e-5)
    assert mixer.effect is not None
    assert mixer.effect.keys == pytest.approx(float(visible.sum(1).double().mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_one_frame_is_dense_bit_for_bit(kind: str) -> None:
    scene = Scene(1, (4, 6))
    mixer = KINDS[kind].mixer("sdpa")
    assert torch.equal(scene.through(mixer), scene.through(DenseMixer()))
    assert mixer.effect is not None
    assert mixer.effect.bypassed == "one frame"


def test_each_layer_gets_its_method_and_the_rest_that_of_merging() -> None:
    layers = Layers.read({"0-1": "frame-only", 3: None, range(5, 7): {"asymmetric": {"stride": 4}}, "8-": HTTM()})
    other, four = HTTM(query_keep=0.5), Asymmetric(stride=4)
    wanted = [FrameLayer(), FrameLayer(), other, None, other, four, four, other, HTTM(), HTTM()]
    assert layers.each(10, other) == wanted
    mixers = layers.mixers("matmul", 10, other)
    assert [getattr(mixer, "method", None) for mixer in mixers] == wanted
    assert mixers[3] == DenseMixer("matmul")
    assert len({id(mixer) for mixer in mixers}) == 10
    assert Layers.read({}).each(2) == [None, None]
    assert Layers.read({1: "litevggt"}).mixers("sdpa", 12)[1].source == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "says"), [
    ({9: "httm"}, "there is no layer 9; this network has 4 layers of global attention, 0 to 3"),
    ({"4-": "httm"}, "there is no layer 4"),
    ({"0-1": None, 1: "httm"}, "layer 1 is given twice"),
    ({"two": None}, "'two' is not a layer"),
    ({-1: None}, "-1 is not a range of layers"),
    ({"3-1": None}, "'3-1' is not a range of layers"),
    ({True: None}, "True is not a layer"),
    ({0: "htm"}, "unknown method of a layer 'htm'; known: .* Did you mean 'httm'"),
    ({0: "come"}, "come acts on the token stream"),
    ({0: {"asymmetric": {"strid": 4}}}, "unknown knob of asymmetric 'strid'"),
    ({0: {"asymmetric": {}, "httm": {}}}, "is not a method with knobs"),
    ({0: 4}, "4 is not a method"),
    (["httm"], "give layers with methods"),
    ("saf", "unknown preset of layers 'saf'; known: saf3r"),
    ("saf3r", "'saf3r' is for 24 layers of global attention, this network has 4"),
])  # fmt: skip
def test_what_is_no_layer_is_one_line(given: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Layers.read(given).each(4)
    assert "\n" not in str(caught.value)


def test_the_preset_of_24_layers() -> None:
    layers = Layers.read("saf3r").each(24)
    assert layers[:9] == [FirstFrameLayer(own=False)] * 9
    assert layers[9:] == [Asymmetric(stride=4)] * 15
    assert "not measured here" in PRESETS["saf3r"].about


def test_a_network_acts_layer_by_layer_and_says_so() -> None:
    torch.manual_seed(0)
    small = {"img_size": 28, "embed_dim": 32, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2}
    camera = {"camera_head_num_heads": 2, "camera_trunk_depth": 1, "heads": ["camera"]}
    model: Any = build("vggt", depth=4, dpt_layers=[0, 1, 2, 3], **small, **camera).eval()
    images = photographs(3, (2, 3))
    with torch.no_grad():
        dense = model(images)["pose_enc"]
        geoaccel.accelerate(model, merging=Asymmetric(stride=3, bypass=False), layers={0: "frame-only", "2-": None})
        assert not torch.equal(model(images)["pose_enc"], dense)
        found = geoaccel.describe(model)
        assert [(action.method.name, action.layers) for action in found.merging] == [
            ("frame-only", (0,)),
            ("asymmetric", (1,)),
        ]
        text = str(found)
        assert "merging in global attention, layer 0: FrameLayer(" in text
        assert "1 x frame-only, 1 x asymmetric, 2 x DenseMixer(kernel='sdpa')" in text
        geoaccel.accelerate(model, layers={"0-3": None})
        assert torch.equal(model(images)["pose_enc"], dense)
        geoaccel.accelerate(model, merging="httm", layers={"0-3": "first-frame"})
        geoaccel.restore(model)
        assert torch.equal(model(images)["pose_enc"], dense)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_single_layer_of_any_backbone(backbone: str) -> None:
    """The last of the global attentions, counted as the backbone has them."""
    model: Any = tiny_network(backbone)
    images, last = photographs(3, (2, 3)), len(BACKBONES[backbone].sites(model)["global"]) - 1
    dense = run(model, images)
    geoaccel.accelerate(model, layers={f"0-{last - 1}": None, last: "frame-only"})
    changed = run(model, images)
    assert any(not torch.equal(changed[key], dense[key]) for key in dense)
    (action,) = geoaccel.describe(model).merging
    assert action.layers == (last,)
    assert [effect.keys for effect in action.effects] == [model.trunk.special + 2 * 3]
    geoaccel.restore(model)
    restored = run(model, images)
    assert all(torch.equal(restored[key], dense[key]) for key in dense)


def test_layers_are_refused_before_anything_changes(tiny: nn.Module) -> None:
    geoaccel.accelerate(tiny, attention="matmul")
    before = str(geoaccel.describe(tiny))
    for wrong in ({"layers": {99: "httm"}}, {"merging": "alike", "layers": {0: "fastvggt"}}):
        with pytest.raises(UserError, match=r"no layer 99|fastvggt needs dense tokens, which alike packs"):
            geoaccel.accelerate(tiny, **wrong)
    assert str(geoaccel.describe(tiny)) == before


def test_methods_go_through_plain_data() -> None:
    for method in (None, FrameLayer(), FirstFrameLayer(own=False), Asymmetric(stride=8), HTTM(block=(8, 2)), HTTM()):
        assert layer_method(plain(method)) == method
    assert plain(Asymmetric(stride=8)) == {"asymmetric": {"stride": 8}}
    assert plain(HTTM(block=(8, 2))) == {"httm": {"block": [8, 2]}}
    assert named([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_settings_name_layers() -> None:
    given = compose_settings("eval", ["layers={0-8:frame-only,9:none,10-:{asymmetric:{stride:4}}}"])["layers"]
    assert Layers.read(given) == Layers.read({"0-8": "frame-only", 9: None, "10-": Asymmetric(stride=4)})
    assert compose_settings("bench", ["layers=saf3r"])["layers"] == "saf3r"
