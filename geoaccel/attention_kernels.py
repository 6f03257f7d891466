"""Attention kernels, chosen by name: q, k and v in, mixed values out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.errors import MissingPackage, UnsupportedHere
from geoaccel.kernels.fp8 import fp8
from geoaccel.kernels.fused import fused
from geoaccel.registry import Registry
from geoaccel.segments import SideBySide, fit

JOINED_FROM, JOINED_CALLS = 4096, 6
"""On CUDA :func:`joined` is used from this many keys on, with at most this many different weights."""

HALVED_FROM, MANY_QUERIES, QUERIES_AT_ONCE = 65_536, 106_496, 32_768
"""Chunks of queries for the second group of keys and later ones: from the first count on half of the queries, from the
second on as many as the third. Their outputs are held in addition to the earlier ones, and with so many queries the
other parts of a block hold less."""

OWN_CHUNK = 256
"""Queries at a time where each has its own key and the kernel returns no log-sum-exp."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

KERNELS: Registry[Kernel] = Registry("attention kernel", {"fp8": fp8})
"""Names to functions of q [n, A, N, D], k and v [n, A, M, D] and a bias on logits that can be added to [n, A, N, M]."""

ROUNDING = {"fp8"}
"""Names of kernels that round their inputs. The attentions of the heads do not use them, to stay as exact as the rest
of their head."""


@KERNELS.register("sdpa")
def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's fused kernels, which store nothing quadratic."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@KERNELS.register("matmul")
def matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Unfused attention, with the attention matrix in memory.

    The reference implementation of every other kernel. It is faster for training short sequences on a CPU, where the
    fused kernel's backward pass is slow: a step of vggt-mini on 24 frames of 112 pixels took 0.21 s instead of 0.36 s.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # scaling the queries avoids a pass over N x M
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


KeysOfBias = tuple[tuple[float, Tensor], ...]
"""The distinct biases, and the keys of each."""


def keys_by_bias(
    bias: Tensor,  # [M]
) -> KeysOfBias:
    """The distinct biases of keys in ascending order, and the keys of each; synchronises with the device."""
    return tuple((value, (bias == value).nonzero()[:, 0]) for value in bias.unique().tolist())


class KeyRows:
    """The keys of every segment grouped by bias, for :func:`joined`, and segments side by side.

    The first access to either synchronises with the device, so all attentions with the same bias share one object.

    Args:
        bias: [M], with few distinct values.
        lengths: Lengths of the segments, which sum to M; None: one segment.
    """

    def __init__(self, bias: Tensor, lengths: tuple[int, ...] | None = None) -> None:
        self.bias = bias
        self.lengths = lengths

    @cached_property
    def segments(self) -> tuple[KeysOfBias | None, ...]:
        """Keys by bias for each segment; None where there are too many biases for one kernel call each."""
        parts = (self.bias,) if self.lengths is None else self.bias.split(self.lengths)
        found = (keys_by_bias(part) if len(part) >= JOINED_FROM else None for part in parts)
        return tuple(None if keys is None or len(keys) > JOINED_CALLS else keys for keys in found)

    @cached_property
    def side_by_side(self) -> SideBySide | None:
        """Many short segments as a padded batch; None where they are few, long or too different in length."""
        short = self.lengths is not None and max(self.lengths) < JOINED_FROM and fit(self.lengths)
        return SideBySide.of(self.bias, self.lengths) if short and self.lengths is not None else None


def joined(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    key_bias: Tensor | KeysOfBias,  # [M], with few different values
) -> Tensor:  # [n, A, N, D]
    """Attention with a bias on keys, through a kernel that does not take one.

    Attention to the keys of each bias b separately gives an output O_b and its log-sum-exp L_b. Attention to all keys
    is the mean of the outputs, weighted by exp(L_b + b).

    Raises:
        ValueError: If gradients are required; there are none.
    """
    if _learns(q, k, v):
        raise ValueError("the log-sum-exp of torch's flash attention has no gradient; attend with a bias instead")
    values, rows = zip(*(keys_by_bias(key_bias) if isinstance(key_bias, Tensor) else key_bias), strict=True)
    return _joined(q, [k.index_select(2, r) for r in rows], [v.index_select(2, r) for r in rows], values)


def _joined(
    q: Tensor,  # [n, A, N, D]
    keys: Sequence[Tensor],  # [n, A, M_i, D] each
    values: Sequence[Tensor],  # [n, A, M_i, D] each
    biases: Sequence[float],
) -> Tensor:  # [n, A, N, D]
    """Attention to groups of keys one after the other, as in :func:`joined`."""
    out, total = _with_log_sum(q, keys[0], values[0])
    if biases[0]:
        total = total + biases[0]
    join = fused("join", out) or _join
    step = queries_at_once(q.shape[2])
    parts = list(zip(*(t.split(step, dim=2) for t in (q, out, total)), strict=True))
    for k, v, bias in zip(keys[1:], values[1:], biases[1:], strict=True):
        for asked, found, log_sum in parts:
            join(found, log_sum, *_with_log_sum(asked, k, v), bias)
    return out


def queries_at_once(queries: int) -> int:
    """Queries in a chunk for the second group of keys."""
    if queries > MANY_QUERIES:
        return QUERIES_AT_ONCE
    return queries if queries <= HALVED_FROM else (queries + 1) // 2


def _join(first: Tensor, first_sum: Tensor, second: Tensor, second_sum: Tensor, bias: float) -> None:
    """As :func:`geoaccel.kernels.twins.join`, in the dtype of what is mixed."""
    second_sum = second_sum + bias
    first.lerp_(second, torch.sigmoid(second_sum - first_sum).to(first.dtype)[..., None])
    first_sum.copy_(torch.logaddexp(first_sum, second_sum))


def _with_log_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Flash attention, and the log-sum-exp of each query [n, A, N]."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)


@KERNELS.register("xformers")
def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """xformers' memory-efficient attention, where the package is installed and has kernels for the device.

    Raises:
        MissingPackage: If it is not installed.
        UnsupportedHere: If it has no kernel for these tensors, as on a CPU.
    """
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise MissingPackage(f"attention='xformers' needs xformers ({error}); pip install 'geoaccel[cuda]'") from None
    mask = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    try:
        out = memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_bias=mask)
    except NotImplementedError as error:
        why = " ".join(str(error).split())
        raise UnsupportedHere(f"attention='xformers' does not run on {q.device}: {why}; choose 'sdpa'") from None
    return out.transpose(1, 2)


def attend(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    *,
    lengths: tuple[int, ...] | None = None,
    key_bias: Tensor | None = None,  # [M]
    key_rows: KeyRows | None = None,
    kernel: str = "sdpa",
) -> Tensor:  # [n, A, N, D]
    """Scaled dot-product attention.

    A bias on keys reaches the kernel as a broadcast view, so that no N x M tensor is ever stored. On a CPU torch's
    fused kernel is as fast with it as without; on CUDA its fastest kernel takes no bias, and long sequences go through
    :func:`joined` if the caller gives ``key_rows``.

    Args:
        q, k, v: Queries, keys and values; logits are scaled by D^-1/2.
        lengths: Lengths of consecutive segments that do not attend to each other; then n = 1 and N = M = their sum.
        key_bias: Added to the logits of each key, for keys that represent several tokens.
        key_rows: For the same bias and lengths.
        kernel: A name from ``KERNELS``.
    """
    run = KERNELS[kernel]
    bias = None if key_bias is None else key_bias.to(q.dtype)
    if lengths is None or len(lengths) == 1:
        return _one_segment(run, q, k, v, bias, key_rows, 0)
    if q.shape[0] != 1 or q.shape[2] != sum(lengths) or k.shape[2] != sum(lengths):
        raise ValueError(
            f"segments of {sum(lengths)} tokens need one sequence of that length, "
            f"got q {list(q.shape)} and k {list(k.shape)}"
        )
    if len(set(lengths)) == 1:  # equal segments are a batch
        fold = (len(lengths), lengths[0])
        q, k, v = (t[0].unflatten(1, fold).transpose(0, 1) for t in (q, k, v))
        mask = None if bias is None else _for_all_queries(bias.view(fold), lengths[0])
        return run(q, k, v, mask).transpose(0, 1).flatten(1, 2)[None]
    if run is sdpa and q.device.type != "cpu" and key_rows is not None and key_rows.side_by_side is not None:
        return key_rows.side_by_side.attend(q, k, v, _with_bias_of_keys)
    biases = (None,) * len(lengths) if bias is None else bias.split(lengths)
    segments = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), biases, strict=True)
    return torch.cat([_one_segment(run, *segment, key_rows, index) for index, segment in enumerate(segments)], dim=2)


def _with_bias_of_keys(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:  # bias [n, M]
    return sdpa(q, k, v, _for_all_queries(bias.to(q.dtype), q.shape[2]))


def attend_heads(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    key_bias: Tensor,  # [n, A, M]
) -> Tensor:  # [n, A, N, D]
    """Scaled dot-product attention by torch's kernels, with a bias on the keys of each head."""
    bias = _for_all_queries(key_bias.to(q.dtype).flatten(0, 1), q.shape[2])
    return sdpa(q, k, v, bias.unflatten(0, key_bias.shape[:2])[:, :, 0])


def attend_groups(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    groups: Sequence[tuple[int, float]],
    *,
    kernel: str = "sdpa",
) -> Tensor:  # [n, A, N, D]
    """Scaled dot-product attention to keys in consecutive groups, each with its own weight.

    On CUDA each group is a call of flash attention, and the outputs are combined by their log-sum-exp; elsewhere the
    weights are a bias. Never synchronises: the caller knows the lengths of the groups.

    Args:
        q, k, v: Queries, keys and values; logits are scaled by D^-1/2.
        groups: The number of keys of each group, which sum to M, and the bias added to their logits.
        kernel: A name from ``KERNELS``.
    """
    groups = [(count, value) for count, value in groups if count]
    if _flash_takes(KERNELS[kernel], q, k, v):
        counts = [count for count, _ in groups]
        return _joined(q, k.split(counts, dim=2), v.split(counts, dim=2), [value for _, value in groups])
    bias = torch.cat([q.new_full((count,), value) for count, value in groups])
    return attend(q, k, v, key_bias=bias, kernel=kernel)


def attend_with_own(
    q: Tensor,  # [n, A, N, D]
    k: Tensor,  # [n, A, M, D]
    v: Tensor,  # [n, A, M, D]
    *,
    shared: tuple[Tensor, Tensor, float],
    own: tuple[Tensor, Tensor, Tensor],
    kernel: str = "sdpa",
) -> Tensor:  # [n, A, N, D]
    """Attention of every query to M keys, one more common key and one key of its own, in one softmax.

    Torch's fused kernels return the log-sum-exp of each query, with which both keys are added. Otherwise (other
    kernels, gradients), the own keys of a chunk of queries are appended, each masked for all other queries.

    Args:
        q, k, v: Queries, keys and values; logits are scaled by D^-1/2.
        shared: Key and value [n, A, 1, D] of the common key, and the bias added to its logits.
        own: Keys and values [n, A, N, D], and the bias added to their logits [N]; minus infinity excludes one.
        kernel: A name from ``KERNELS``.
    """
    run = KERNELS[kernel]
    tensors = (q, k, v, *shared[:2], *own[:2])
    if run is sdpa and not _learns(*tensors) and (q.device.type == "cpu" or _flash_takes(run, q, k, v)):
        out, total = _with_log_sum(q, k, v)
        for key, value, bias in (shared, own):
            logit = (q * key).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5 + bias
            out = torch.lerp(out, value, torch.sigmoid(logit - total).to(q.dtype)[..., None])
            total = torch.logaddexp(total, logit)
        return out
    key, value, weight = shared
    everything = [torch.cat(pair, dim=2) for pair in ((k, key), (v, value))]
    parts = []
    for start in range(0, q.shape[2], OWN_CHUNK):
        part = slice(start, start + OWN_CHUNK)
        keys, values = (torch.cat([t, o[:, :, part]], 2) for t, o in zip(everything, own[:2], strict=True))
        hidden = own[2].new_full((len(own[2][part]),) * 2, float("-inf"))
        hidden.diagonal().copy_(own[2][part])
        seen = hidden.new_zeros(len(hidden), k.shape[2] + 1)
        seen[:, -1] = weight
        parts.append(run(q[:, :, part], keys, values, torch.cat([seen, hidden], dim=1).to(q.dtype)[None, None]))
    return torch.cat(parts, dim=2)


def _one_segment(
    run: Kernel, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_rows: KeyRows | None, index: int
) -> Tensor:
    """Attention of every token to every token; bias [M], and the keys of a segment by bias."""
    if bias is None:
        return run(q, k, v, None)
    if key_rows is not None and k.shape[2] >= JOINED_FROM and _flash_takes(run, q, k, v):
        keys = key_rows.segments[index]
        if keys is not None:
            return joined(q, k, v, keys)
    return run(q, k, v, _for_all_queries(bias[None], q.shape[2]))


def _flash_takes(run: Kernel, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's flash attention on CUDA, which returns its log-sum-exp, can replace a kernel."""
    narrow = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    return run is sdpa and q.is_cuda and narrow and not _learns(q, k, v)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _for_all_queries(
    bias: Tensor,  # [n, M]
    queries: int,
) -> Tensor:  # [n, 1, N, M], a view
    """The same bias for every query."""
    # CUDA's kernel wants rows aligned to 8 entries; others it copies, at full size.
    aligned = F.pad(bias, (0, -bias.shape[1] % 8))
    return aligned[:, None, None, : bias.shape[1]].expand(-1, -1, queries, -1)
