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
from geoaccel.precision import cast
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


def _asked_before_gradients(module: Attention) -> None:
    module.qkv.register_full_backward_pre_hook(lambda *_: None)


def _with_a_norm_that_is_heard(module: Attention) -> None:
    module.k_norm.register_forward_hook(lambda *_: None)


def _with_another_forward(module: Attention) -> None:
    forward = module.qkv.forward
    module.qkv.forward = lambda x: forward(x)


CHANGES = (
    None,
    _hooked,
    _listened,
    _asked_for_gradients,
    _asked_before_gradients,
    _another,
    _another_tensor,
    _with_a_norm_that_is_heard,
    _with_another_forward,
)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_projection_that_is_not_plain_makes_all(change: Callable[[Attention], None] | None) -> None:
    module, x, rows = attention(), tokens(), torch.arange(4)[None]
    module.mixer = mixer = Reads(rows)
    if change is not None:
        change(module)
    module(x, AttentionContext("global", layout=LAYOUT))
    with torch.autocast("cpu", torch.bfloat16):
        module(x, AttentionContext("global", layout=LAYOUT))
    with torch.enable_grad():
        module(x, AttentionContext("global", layout=LAYOUT))
    alone, *others = ([t.shape[2] for t in given] for given in mixer.given)
    whole = LAYOUT.tokens_per_scene
    assert alone == ([whole, 4, 4] if change is None else [whole] * 3)
    assert others == [[whole] * 3] * 2


@torch.no_grad()
def test_what_is_compiled_makes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention()
    module.mixer = mixer = Reads(torch.arange(4)[None])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    module(tokens(), AttentionContext("global", layout=LAYOUT))
    assert mixer.given[0][1].shape == mixer.given[0][0].shape


@torch.no_grad()
def test_all_tokens_in_another_order_are_all() -> None:
    """A mixer tells by their number whether keys were chosen."""
    module = attention()
    module.mixer = mixer = Reads(torch.arange(LAYOUT.tokens_per_scene).flip(0)[None])
    module(tokens(), AttentionContext("global", layout=LAYOUT))
    module.mixer = usual = Reads(None)
    module(tokens(), AttentionContext("global", layout=LAYOUT))
    assert torch.equal(mixer.given[0][1], usual.given[0][1])


@torch.no_grad()
def test_norms_may_answer_in_another_dtype() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    module = attention(qk_norm=False).to(torch.bfloat16)
    module.q_norm, module.k_norm = Wide(), Wide()
    made = project_chosen(module, tokens().to(torch.bfloat16), None, torch.arange(4)[None])
    assert {t.dtype for t in made} == {torch.bfloat16}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("backbone", ["vggt", "pi3"])
@torch.no_grad()
def test_asymmetric_attention_answers_as_with_all_keys(
    backbone: str, per_head: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model: Any = tiny_network(backbone)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # what an attention says counts in full
    images = torch.rand(1, 6, 3, 70, 70)
    geoaccel.accelerate(cast(model, dtype), merging=Asymmetric(stride=3, per_head=per_head, bypass=False))
    widths: list[tuple[int, int]] = []
    mix = AsymmetricMixer.mix_scenes

    def watched(self: Any, q: Tensor, k: Tensor, *rest: Any) -> Any:
        widths.append((q.shape[2], k.shape[2]))
        return mix(self, q, k, *rest)

    monkeypatch.setattr(AsymmetricMixer, "mix_scenes", watched)
    chosen = model(images)
    assert widths
    assert all(keys < queries for queries, keys in widths)
    widths.clear()
    monkeypatch.setattr(AsymmetricMixer, "reads_keys", Mixer.reads_keys)
    whole = model(images)
    assert all(keys == queries for queries, keys in widths)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    for name, value in whole.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(chosen[name], value, rtol=bound, atol=bound, msg=name)


@torch.no_grad()
def test_packed_rows_make_all() -> None:
    layout = TokenLayout(1, 6, (4, 4), 2)
    mixer = Asymmetric(stride=4, bypass=False).mixer("sdpa")
    x = torch.zeros(1, layout.tokens_per_scene, WIDTH)
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout)) is not None
    packed: Any = object()
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout, packing=packed)) is None
    assert mixer.reads_keys(x[:, 1:], HEADS, AttentionContext("global", layout=layout)) is None


@pytest.mark.parametrize(("frames", "stride"), [(6, 1), (1, 4)])
def test_where_all_is_read_all_is_made(frames: int, stride: int) -> None:
    layout = TokenLayout(1, frames, (4, 4), 2)
    mixer = Asymmetric(stride=stride, bypass=False).mixer("sdpa")
    x = torch.zeros(1, layout.tokens_per_scene, WIDTH)
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout)) is None


def test_nothing_is_left_out_where_attention_stays_dense() -> None:
    """A small gain is no reason to act; what is read and what is done agree."""
    layout = TokenLayout(1, 12, (4, 4), 1)
    mixer = Asymmetric(stride=4, min_gain=1000).mixer("sdpa")
    x = torch.zeros(1, layout.tokens_per_scene, WIDTH)
    assert mixer.reads_keys(x, HEADS, AttentionContext("global", layout=layout)) is None
