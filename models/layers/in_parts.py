"""Blocks that update the residual stream in place, part by part, as a memory plan requires.

Only queries, keys and values of a block exist for all tokens at once; in frame attention, not even those.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from geoaccel.attention import AttentionContext, DenseMixer
from geoaccel.models.layers.block import Block


def block_in_parts(
    block: Block,
    x: Tensor,  # [n, N, C] or [T, C]; changed
    context: AttentionContext,
    step: int,
) -> None:
    """Run one block, without gradients.

    Args:
        block: The block.
        x: The tokens.
        context: Context of its attention; its state settles before anything is changed.
        step: Tokens at a time; for dense tokens, a multiple of the length of the rotary tables.
    """
    whole = x if x.ndim == 3 else x[None]
    alone = isinstance(block.attn.mixer, DenseMixer)
    if alone and context.kind != "global" and context.lengths is None:
        context.state.settle()
        for rows in whole.split(max(1, step // whole.shape[1])):
            rows.copy_(block(rows, context))
        return
    q, k, v = _queries_keys_values(block, whole, context, step)
    if alone and context.lengths is None:
        context.state.settle()
        for part in _parts(whole.shape[1], step):
            mixed, _ = block.attn.mixer(q[:, :, part], k, v, whole[:, :0], context)
            _add(block, whole[:, part], block.attn.proj(mixed.transpose(1, 2).flatten(2)))
        return
    tokens = _normed(block, whole, step) if getattr(block.attn.mixer, "reads_tokens", True) else whole[:, :0]
    mixed, restore = block.attn.mixer(q, k, v, tokens, context)
    del q, k, v, tokens
    context.state.settle()
    if restore is not None:
        restored = restore(block.attn.proj(mixed.transpose(1, 2).flatten(2)))
        del mixed, restore
        for part in _parts(whole.shape[1], step):
            _add(block, whole[:, part], restored[:, part])
        return
    for part in _parts(whole.shape[1], step):
        _add(block, whole[:, part], block.attn.proj(mixed[:, :, part].transpose(1, 2).flatten(2)))


def _parts(tokens: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _queries_keys_values(
    block: Block,
    x: Tensor,  # [n, N, C]
    context: AttentionContext,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [n, A, N, D] each
    """For all tokens, in the memory layout of a part's projection."""
    whole: list[Tensor] = []
    packed, rope = context.packing is not None, context.rope
    for part in _parts(x.shape[1], step):
        own = (rope[0][part], rope[1][part]) if packed and rope is not None else rope
        found = block.attn.project(block.norm1(x[:, part]), own)
        if not whole:
            heads_first = found[0].stride(1) < found[0].stride(2)
            shape = (len(x), x.shape[1], block.attn.num_heads, block.attn.head_dim)
            whole = [_laid_out(t, shape, heads_first) for t in found]
        for t, values in zip(whole, found, strict=True):
            t[:, part] = values
        del found, values
    q, k, v = (t.transpose(1, 2) for t in whole)
    return q, k, v


def _laid_out(like: Tensor, shape: tuple[int, int, int, int], heads_first: bool) -> Tensor:  # [n, N, A, D]
    n, tokens, heads, dim = shape
    return like.new_empty(n, heads, tokens, dim).transpose(1, 2) if heads_first else like.new_empty(shape)


def _normed(block: Block, x: Tensor, step: int) -> Tensor:  # [n, N, C]
    out: Tensor | None = None
    for part in _parts(x.shape[1], step):
        normed = block.norm1(x[:, part])
        out = normed.new_empty(*x.shape) if out is None else out
        out[:, part] = normed
    assert out is not None
    return out


def _add(block: Block, rows: Tensor, y: Tensor) -> None:
    """Add the attention's output for some tokens, and then the MLP's."""
    rows.copy_(block.behind_attention(rows, y))


def each_in_parts(x: Tensor, change: Callable[[Tensor], Tensor], step: int) -> Tensor:
    """Apply a token-wise function in place; [B, S, P, C] or [T, C]."""
    rows = x.view(-1, x.shape[-1])
    for part in rows.split(step):
        part.copy_(change(part))
    return x
