"""Kernels, segments and key weights."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from geoaccel import attention_kernels, segments
from geoaccel.attention_kernels import KERNELS, KeyRows, attend, joined
from geoaccel.errors import MissingPackage
from geoaccel.layout import Packing, TokenLayout

ON_CPU = sorted(set(KERNELS) - {"xformers"})
TOLERANCE = {"fp8": 0.1}
"""Of outputs up to 3, as e4m3 rounds them; the others are exact. Leaving the weights out moves them by 0.7."""


def qkv(tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, 2, tokens, 8, generator=generator, dtype=torch.float64) for _ in range(3))


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("lengths", [(4, 4, 4), (1, 7, 4)])
def test_segments_do_not_see_each_other(kernel: str, lengths: tuple[int, ...]) -> None:
    q, k, v = qkv(12)
    together = attend(q, k, v, lengths=lengths, kernel=kernel)
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    alone = torch.cat([attend(*part) for part in parts], dim=2)
    assert torch.allclose(together, alone, rtol=0, atol=TOLERANCE.get(kernel, 1e-12))
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    alone = torch.cat([attend(*part, kernel=kernel) for part in parts], dim=2)
    assert torch.allclose(together, alone, rtol=0, atol=1e-6 if kernel in TOLERANCE else 1e-12)


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("lengths", [None, (3, 3), (2, 4)])
def test_a_weight_counts_like_copies(kernel: str, lengths: tuple[int, ...] | None) -> None:
    """A key of weight n with log n on its logits is n equal keys."""
    q, k, v = qkv(6)
    counts = torch.tensor([1, 3, 2, 1, 4, 1])
    weighted = attend(q, k, v, lengths=lengths, key_bias=counts.double().log(), kernel=kernel)
    rows = [0, 6] if lengths is None else [0, *torch.tensor(lengths).cumsum(0).tolist()]
    copies = []
    for start, stop in itertools.pairwise(rows):
        repeated = [t[:, :, start:stop].repeat_interleave(counts[start:stop], dim=2) for t in (k, v)]
        copies.append(attend(q[:, :, start:stop], *repeated))
    assert torch.allclose(weighted, torch.cat(copies, dim=2), rtol=0, atol=TOLERANCE.get(kernel, 1e-12))


def test_xformers_gets_its_own_order_of_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package wants heads behind tokens; its formula stands in for it here."""
    seen = []

    def memory_efficient_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: torch.Tensor | None
    ) -> torch.Tensor:
        seen.append(q.shape)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        logits = logits if attn_bias is None else logits + attn_bias
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)

    fake = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)  # type: ignore[arg-type]
    q, k, v = qkv(5)
    bias = torch.arange(5.0, dtype=torch.float64)
    for key_bias in (None, bias):
        ours = attend(q, k, v, key_bias=key_bias, kernel="xformers")
        assert torch.allclose(ours, attend(q, k, v, key_bias=key_bias), atol=1e-12)
    assert seen == [(1, 5, 2, 8)] * 2


def test_xformers_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(MissingPackage, match=r"attention='xformers' needs xformers .*geoaccel\[cuda\]") as caught:
        attend(*qkv(4), kernel="xformers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", [[1, 3, 2, 1, 4, 1, 3], [1] * 7])
def test_joining_calls_by_their_log_sums_is_the_bias(weights: list[int]) -> None:
    q, k, v = qkv(7)
    bias = torch.tensor(weights).double().log()
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
    assert torch.allclose(joined(q, k, v, bias), logits.softmax(dim=-1) @ v, atol=1e-12)
    assert torch.allclose(joined(q, k, v, bias), attend(q, k, v, key_bias=bias), atol=1e-12)


@pytest.mark.parametrize("places", [1, 20, 1000])
def test_segments_side_by_side_are_the_same(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """In chunks of one segment, of some, and all at once."""
    monkeypatch.setattr(segments, "CHUNK_PLACES", places)
    q, k, v = qkv(20)
    q, k, v = q[:1], k[:1], v[:1]
    lengths, bias = (4, 6, 1, 4, 5), torch.arange(20).double().log1p()
    assert segments.fit(lengths)
    assert not segments.fit((20, 1, 1, 1, 1))
    found = KeyRows(bias, lengths).side_by_side
    assert found is not None
    out = found.attend(q, k, v, attention_kernels._with_bias_of_keys)
    assert torch.allclose(out, attend(q, k, v, lengths=lengths, key_bias=bias), atol=1e-12)
    assert KeyRows(bias, (10, 10)).side_by_side is None


def test_joined_calls_have_no_gradient_and_say_so() -> None:
    q, k, v = qkv(7)
    with pytest.raises(ValueError, match="has no gradient"):
        joined(q.requires_grad_(), k, v, torch.zeros(7, dtype=torch.float64))
    with torch.no_grad():
        joined(q, k, v, torch.zeros(7, dtype=torch.float64))


def test_keys_of_no_weight_do_not_count_in_joined_calls() -> None:
    q, k, v = qkv(7)
    bias = torch.zeros(7, dtype=torch.float64)
    bias[4:] = float("-inf")
    assert torch.allclose(joined(q, k, v, bias), attend(q, k[:, :, :4], v[:, :, :4]), atol=1e-12)
    bias[2:4] = 1.5  # a third weight
    assert torch.allclose(joined(q, k, v, bias), attend(q, k[:, :, :4], v[:, :, :4], key_bias=bias[:4]), atol=1e-12)


def test_a_bias_is_never_stored_for_every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels get a view without rows of its own that starts where vector loads want it, in one segment or in many."""
    masks = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert mask is not None
        masks.append(mask)
        return q

    monkeypatch.setitem(KERNELS._entries, "spy", kernel)
    q, k, v = qkv(15)
    for lengths in (None, (5, 5, 5), (4, 5, 6)):
        attend(q, k, v, lengths=lengths, key_bias=torch.ones(15), kernel="spy")
    assert [list(mask.shape) for mask in masks] == [[1, 1, 15, 15], [3, 1, 5, 5], *([1, 1, n, n] for n in (4, 5, 6))]
    for mask in masks:
        assert mask.stride(2) == 0
        assert mask.stride(3) == 1
        assert mask.stride(0) % 8 == 0
        assert mask.storage_offset() == 0


def test_segments_must_cover_the_sequence() -> None:
    q, k, v = qkv(6)
    with pytest.raises(ValueError, match="segments of 5 tokens"):
        attend(q, k, v, lengths=(2, 3))


def test_layout_counts_and_positions() -> None:
    layout = TokenLayout(batch=2, frames=3, grid=(2, 3), num_special=5)
    assert (layout.tokens_per_frame, layout.tokens_per_scene) == (11, 33)
    positions = layout.positions()
    assert positions[:5].abs().sum() == 0
    assert positions[5:].tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]


def test_unpacking_copies_to_every_token_that_a_row_stands_for() -> None:
    owner = torch.tensor([[[0, 0, 1], [2, 2, 2]]])
    packing = Packing(owner, (2, 1), torch.zeros(3, 2, dtype=torch.long), torch.tensor([2.0, 1.0, 3.0]))
    assert packing.unpack(torch.tensor([[5.0], [6.0], [7.0]]))[0, :, :, 0].tolist() == [[5, 5, 6], [7, 7, 7]]
    assert packing.scene_lengths == (3,)
    assert packing.lengths("frame") == (2, 1)


def test_packings_must_add_up() -> None:
    with pytest.raises(ValueError, match="2 frame lengths that sum to its 3 rows, got 2 that sum to 4"):
        Packing(torch.zeros(1, 2, 3, dtype=torch.long), (2, 2), torch.zeros(3, 2), torch.ones(3))


@pytest.mark.parametrize(("halved_from", "many"), [(6, 7), (3, 5)])
def test_many_queries_are_joined_in_parts(halved_from: int, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(7)
    bias = torch.tensor([0.0, 0.0, 0.5, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    wanted = attend(q, k, v, key_bias=bias)
    monkeypatch.setattr(attention_kernels, "HALVED_FROM", halved_from)
    monkeypatch.setattr(attention_kernels, "MANY_QUERIES", many)
    monkeypatch.setattr(attention_kernels, "QUERIES_AT_ONCE", 3)
    assert torch.allclose(joined(q, k, v, bias), wanted, atol=1e-12)
