"""An attention makes the keys and values that its mixer will read, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geoaccel
from geoaccel.attention import AttentionContext, Mixer, Restore
from geoaccel.kernels import twins
from geoaccel.layout import TokenLayout
from geoaccel.merging.asymmetric import Asymmetric, AsymmetricMixer
from geoaccel.models.layers.block import Attention
from geoaccel.models.layers.chosen_keys import project_chosen
from geoaccel.models.layers.rope import frame_tables
from geoaccel.testing import tiny_network

LAYOUT = TokenLayout(2, 3, (4, 5), 2)
HEADS, WIDTH = 3, 24
CPU = torch.device("cpu")


def attention(*, qk_norm: bool = True) -> Attention:
    torch.manual_seed(0)
    made = Attention(WIDTH, HEADS, qk_norm=qk_norm)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def tokens() -> Tensor:
    return torch.randn(2, LAYOUT.tokens_per_scene, WIDTH, generator=torch.Generator().manual_seed(1))


class Reads(Mixer):
    """Asks for some tokens and keeps what it is given."""

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def reads_keys(self, x: Tensor, heads: int, context: AttentionContext) -> Tensor | None:
        return self.rows

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        self.given.append((q, k, v))
        return q, None


@pytest.mark.parametrize("of_heads", [1, HEADS])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_what_is_made_is_what_would_be_picked_of_all(of_heads: int, qk_norm: bool, rotated: bool, bias: bool) -> None:
    module, x = attention(qk_norm=qk_norm), tokens()
    if not bias:
        module.qkv.bias = None
    rope = frame_tables(LAYOUT.grid, LAYOUT.num_special, WIDTH // HEADS, 100.0, x.dtype, CPU) if rotated else None
    generator = torch.Generator().manual_seed(2)
    read = torch.stack([torch.randperm(LAYOUT.tokens_per_scene, generator=generator)[:17] for _ in range(of_heads)])
    q, k, v = (t.transpose(1, 2) for t in module.project(x, rope))
    expected = (q, *twins.pick(k, v, read))
    for made, wanted in zip(project_chosen(module, x, rope, read), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def _hooked(module: Attention) -> None:
    module.qkv.register_forward_hook(lambda *_: None)


def _listened(module: Attention) -> None:
    module.qkv.register_forward_pre_hook(lambda *_: None)


def _asked_for_gradients(module: Attention) -> None:
    module.qkv.register_full_backward_hook(lambda *_: None)


def _another(module: Attention) -> None:
    class Other(nn.Linear):
        pass

    module.qkv.__class__ = Other


def _another_tensor(module: Attention) -> None:
    class Other(nn.Parameter):
        pass

    module.qkv.weight = Other(module.qkv.weight.detach())


@pytest.mark.parametrize("change", [None, _hooked, _listened, _asked_for_gradients, _another, _another_tensor])
@torch.no_grad()
def test_a_projection_that_is_not_plain_makes_all(change: Callable[[Attention], None] | None) -> None:
    module, x, rows = attention(), tokens(), torch.arange(4)[None]
    module.mixer = mixer = Reads(rows)
    if change is not None:
        change(module)
    module(x, AttentionContext("global", layout=LAYOUT))
    with torch.autocast("cpu", torch.bfloat16):
        module(x, AttentionContext("global", layout=LAYOUT))
    alone, under_autocast = ([t.shape[2] for t in given] for given in mixer.given)
    whole = LAYOUT.tokens_per_scene
    assert alone == ([whole, 4, 4] if change is None else [whole] * 3)
    assert under_autocast == [whole] * 3


@torch.no_grad()
def test_a_mixer_may_know_nothing_of_it() -> None:
    class Bare:
        """A mixer of old."""

        def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> Any:
            assert k.shape == q.shape
            return q, None

    for mixer in (Bare(), Reads(None)):
        module = attention()
        module.mixer = mixer
        assert module(tokens(), AttentionContext("global", layout=LAYOUT)).shape == tokens().shape


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backbone", ["vggt", "pi3"])
def test_asymmetric_attention_answers_as_with_all_keys(
    backbone: str, per_head: bool, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = tiny_network(backbone)
    images = torch.rand(1, 6, 3, 70, 70)
    method = Asymmetric(stride=3, per_head=per_head, bypass=False)
    geoaccel.accelerate(model, merging=method)
    widths: list[tuple[int, int]] = []
    mix = AsymmetricMixer.mix_scenes

    def watched(self: Any, q: Tensor, k: Tensor, *rest: Any) -> Any:
        widths.append((q.shape[2], k.shape[2]))
        return mix(self, q, k, *rest)

    monkeypatch.setattr(AsymmetricMixer, "mix_scenes", watched)

    def answer() -> tuple[dict[str, Tensor], list[Tensor]]:
        model.zero_grad()
        with torch.set_grad_enabled(learns):
            out = {name: value for name, value in model(images).items() if isinstance(value, Tensor)}
        if learns:
            sum(value.sum() for value in out.values() if value.requires_grad).backward()  # type: ignore[union-attr]
        site = model.backbone.sites(model)["global"][0]
        return out, [p.grad.clone() for p in site.parameters() if p.grad is not None]

    chosen, gradients = answer()
    assert widths
    assert all(keys < queries for queries, keys in widths)
    widths.clear()
    monkeypatch.setattr(AsymmetricMixer, "reads_keys", Mixer.reads_keys)
    whole, expected = answer()
    assert all(keys == queries for queries, keys in widths)
    for name, value in whole.items():
        torch.testing.assert_close(chosen[name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert len(gradients) == len(expected) > 0 or not learns
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("frames", "grid", "stride"), [(6, (1, 1), 4), (6, (4, 4), 1), (1, (4, 4), 4)])
def test_where_all_is_read_all_is_made(frames: int, grid: tuple[int, int], stride: int) -> None:
    """With one patch in a frame each is sampled: in another order the same keys."""
    layout = TokenLayout(1, frames, grid, 2)
    mixer = Asymmetric(stride=stride, bypass=False).mixer("sdpa")
    x = torch.zeros(1, layout.tokens_per_scene, WIDTH)
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout)) is None


def test_nothing_is_left_out_where_attention_stays_dense() -> None:
    """A small gain is no reason to act; what is read and what is done agree."""
    layout = TokenLayout(1, 12, (4, 4), 1)
    mixer = Asymmetric(stride=4, min_gain=1000).mixer("sdpa")
    x = torch.zeros(1, layout.tokens_per_scene, WIDTH)
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout)) is None
