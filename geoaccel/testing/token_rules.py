"""Rules about the groups that a method forms, observed from outside.

Mixers are called with a kernel that returns its queries. After the restore, this shows the group of each token and the
value that represented it. Packers are called directly for their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from geoaccel.api import accelerate
from geoaccel.attention import DENSE, AttentionContext, Mixer, Restore
from geoaccel.attention_kernels import KERNELS
from geoaccel.layout import Packing, TokenLayout
from geoaccel.merging.method import AttentionMerging, SpanMerging
from geoaccel.testing.rules import Trial, must, rule, run

SCENES = ((2, (4, 6), 1), (3, (5, 7), 1), (3, (7, 4), 2), (5, (3, 3), 1))
"""Frames, patches of a frame, scenes in a batch."""

ECHO = "echo of geoaccel.testing"


@rule(AttentionMerging)
def every_token_gets_the_mean_of_its_group(trial: Trial) -> None:
    """Groups form a partition, merging takes means, restoring inverts the order, and the effect counts are right."""

    def look(mixer: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> None:
        out, layout = _through(mixer, q, k, v, x, context), context.layout
        assert layout is not None
        must(out.shape == q.shape, f"{list(q.shape)} queries come back as {list(out.shape)}: restore the token order")
        special = torch.arange(layout.tokens_per_frame) < layout.num_special
        counted = 0
        for query, output in zip(q.flatten(0, 1), out.flatten(0, 1), strict=True):
            groups = _groups(output)
            counted += len(groups)
            for members in groups:
                right = torch.allclose(output[members[0]], query[members].mean(0), atol=1e-5)
                must(right, f"tokens {members.tolist()[:5]} do not get the mean of their queries")
            own = output[special.repeat(layout.frames)]
            must(len(own.unique(dim=0)) == len(own), "two special tokens share a group")
        _must_count(mixer.effect, layout, counted / q.shape[0] / q.shape[1], max(keys))

    with _echo() as keys:
        for frames, grid, batch in SCENES:
            keys.clear()
            _show(trial, look, trial.images(frames, grid, batch=batch), ECHO)


def _must_count(effect: Any, layout: TokenLayout, queries: float, keys: int) -> None:
    must(effect is not None, "the mixer has no effect after a forward: set self.effect")
    must(effect.tokens == layout.tokens_per_scene, f"the effect reports {effect.tokens} tokens")
    must(
        abs(effect.queries - queries) < 1e-6 * queries,
        f"the effect reports {effect.queries} queries, not {queries}",
    )
    must(effect.keys <= keys, f"the effect reports {effect.keys} keys, but the kernel got at most {keys}")
    must(min(effect.keys, effect.queries) < effect.tokens, "neither queries nor keys were merged")


@rule(AttentionMerging)
def a_constant_comes_back(trial: Trial) -> None:
    """Constant values come back unchanged: no empty group is a key, nothing is lost or doubled."""

    def look(mixer: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> None:
        out = _through(mixer, q, k, torch.full_like(v, 0.7), x, context)
        must(torch.allclose(out, torch.full_like(out, 0.7), atol=1e-5), "constant values of 0.7 come back changed")

    for frames, grid, batch in SCENES:
        _show(trial, look, trial.images(frames, grid, batch=batch), "sdpa")


@rule(SpanMerging)
def packed_rows_are_means(trial: Trial) -> None:
    """Special tokens are never merged, every row represents tokens, and weights are their numbers."""
    for frames, grid in ((1, (4, 6)), (3, (5, 7)), (2, (7, 4))):
        model = trial.model()
        (slot,) = (module for module in model.modules() if hasattr(module, "token_packer"))
        watched = _WatchedPacker(slot.token_packer)
        slot.token_packer = watched  # type: ignore[assignment]
        run(model, trial.images(frames, grid))
        must(bool(watched.seen), f"{frames} frames of {grid[0]} x {grid[1]} patches were not packed")
        for x, rows, packing in watched.seen:
            _must_pack(x, rows, packing, num_special=x.shape[2] - grid[0] * grid[1])


def _must_pack(x: Tensor, rows: Tensor, packing: Packing, num_special: int) -> None:
    counts = packing.owner.flatten().bincount(minlength=len(packing.weight))
    must(torch.equal(counts, packing.weight.long()), "weights are not the numbers of tokens in the rows")
    must(bool((counts > 0).all()), "a row represents no token")
    special = packing.weight[packing.owner[:, :, :num_special]]
    must(bool((special == 1).all()), "a special token was merged")
    if rows.ndim == 2:
        total = torch.zeros_like(rows).index_add_(0, packing.owner.flatten(), x.flatten(0, -2))
        means = total / packing.weight[:, None]
        must(torch.allclose(rows, means, atol=1e-4), "packed rows are not the means of their tokens")
    else:
        must(torch.equal(rows, x), "the token stream keeps its length, but was changed")


class _WatchedPacker:
    """A packer that records the output of another."""

    def __init__(self, packer: Any) -> None:
        self.packer = packer
        self.layer = packer.layer
        self.seen: list[tuple[Tensor, Tensor, Packing]] = []

    def __call__(self, x: Tensor, layout: TokenLayout, state: Any) -> tuple[Tensor, Packing] | None:
        made = self.packer(x, layout, state)
        if made is not None:
            self.seen.append((x, *made))
        return made


class _Watched(Mixer):
    """Passes tokens to another mixer, and attends densely itself.

    Queries and keys are random, with special tokens nearly equal to each other and to their first patch, which matching
    would prefer to merge.
    """

    def __init__(self, mixer: Any, look: Callable[..., None]) -> None:
        self.mixer = mixer
        self.look = look

    def prepare(self, heads: int, head_dim: int, device: torch.device, context: AttentionContext) -> None:
        self.mixer.prepare(heads, head_dim, device, context)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        layout = context.layout
        assert layout is not None
        generator = torch.Generator().manual_seed(context.index)
        same = layout.num_special + 1

        def frames_of(t: Tensor) -> Tensor:  # [B, S, P, ...], a copy with equal special tokens
            made = torch.randn(t.shape, generator=generator).unflatten(1, (layout.frames, layout.tokens_per_frame))
            made[:, :, :same] = made[:, :1, :1]
            return made

        tokens = frames_of(x).flatten(1, 2)
        asked, keys = (frames_of(t.transpose(1, 2)) for t in (q, k))
        asked, keys = (t + 1e-3 * torch.randn(t.shape, generator=generator) for t in (asked, keys))
        asked, keys = (t.flatten(1, 2).transpose(1, 2) for t in (asked, keys))
        self.look(self.mixer, asked, keys, torch.randn(v.shape, generator=generator), tokens, context)
        return DENSE(q, k, v, x, context)


def _show(trial: Trial, look: Callable[..., None], images: Tensor, kernel: str) -> None:
    """Run every mixer of the method on random tokens with the layout of these images."""
    model = accelerate(trial.dense(), merging=trial.make(), attention=kernel)
    backbone: Any = model.backbone
    for site in backbone.sites(model)["global"]:
        site.mixer = _Watched(site.mixer, look)
    run(model, images)


def _through(mixer: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext) -> Tensor:
    """Output of the attention module with an output projection that changes nothing: [B, A, N, D]."""
    mixed, restore = mixer(q, k, v, x, context)
    out = mixed.transpose(1, 2).flatten(2)
    out = out if restore is None else restore(out)
    return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def _groups(out: Tensor) -> list[Tensor]:  # out [N, D]
    """Tokens that share one output."""
    _, number = out.unique(dim=0, return_inverse=True)
    return [(number == group).nonzero()[:, 0] for group in number.unique()]


@contextmanager
def _echo() -> Iterator[list[int]]:
    """Registers, within the block, a kernel that returns its queries; yields the number of keys of each call."""
    keys: list[int] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        keys.append(k.shape[2])
        return q

    KERNELS.register(ECHO, kernel)
    try:
        yield keys
    finally:
        KERNELS._entries.pop(ECHO)
