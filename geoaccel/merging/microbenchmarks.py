"""Micro-benchmarks that measure :class:`geoaccel.merging.rates.Rates`: a second or two of small pieces of real work.

Each piece is an operation of the networks and methods on random numbers, at a size that fills the machine. The fastest
of a few runs counts, to ignore other load on the machine. A single CPU thread is timed by its own clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.attention_kernels import attend
from geoaccel.layout import TokenLayout
from geoaccel.merging.headwise import match, split_outliers
from geoaccel.merging.rates import Kind, Rates
from geoaccel.merging.temporal import Places, Split
from geoaccel.plan import MergePlan
from geoaccel.precision import own_precision
from geoaccel.similarity import best_match

RUNS = 3
LEAST, MOST_TIMES = 0.01, 10
"""Target seconds of a run, and the most repetitions of a piece in it."""
GRID, SPECIAL = (16, 16), 5
"""Patches and special tokens of a frame."""
FRAME = GRID[0] * GRID[1] + SPECIAL
FRAMES = {"cpu": 8, "cuda": 64}
BLOCK, SHARE = (128, 30), 0.2
"""Patches of a frame and frames in a block for matching per head, and the fraction of targets: about those of HTTM."""
MOST_TOKENS = 8192
SPEED = {"cpu": 2e9, "cuda": 1e12}
"""Multiply-adds of one piece, per CPU thread: some fifty milliseconds there, ten elsewhere."""


@torch.inference_mode()
def measure(kind: Kind) -> Rates:
    """Measure everything; does not change the process's random state, flags or default dtypes."""
    with own_precision(kind.device):
        # Twice, some time apart: other load comes in bursts.
        first, second = (asdict(Pieces(kind).rates()) for _ in range(2))
    return Rates(**{name: min(first[name], second[name]) for name in first})


class Pieces:
    """The pieces of one kind.

    Args:
        kind: Device, dtype and sizes.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.heads = max(1, kind.width // kind.head_dim)
        self.generator = torch.Generator("cpu").manual_seed(0)
        cpu = kind.device.type == "cpu"
        self.budget = SPEED["cpu"] * torch.get_num_threads() if cpu else SPEED["cuda"]
        self.single = cpu and torch.get_num_threads() == 1

    def rates(self) -> Rates:
        """Seconds of each piece over its amount of work."""
        width = self.kind.width
        tokens = self._tokens(12 * width**2)
        linear = self.block(tokens, self.kind.dtype)
        return Rates(
            linear=linear,
            heads=linear if self.kind.dtype == torch.float32 else self.block(tokens, torch.float32),
            attend=self.attention(1),
            attend_frames=self.attention(None),
            match=self.matching(),
            match_heads=self.matching_heads(),
            merge=self.merging(),
            merge_heads=self.merging_heads(),
            pack=self.packing(),
            read=self.reading(),
            start=self.starting(),
            measured=True,
        )

    def block(self, tokens: int, dtype: torch.dtype) -> float:
        """A multiply-add in the layers of a transformer block, without its attention."""
        width = self.kind.width
        shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
        qkv, out, up, down = (self._random(*shape, dtype=dtype) for shape in shapes)
        scale, tables = (self._random(*shape, dtype=dtype) for shape in ((width,), (tokens, 1, self.kind.head_dim)))

        def rotate(x: Tensor) -> Tensor:  # a norm of each head and a rotary embedding
            x = F.layer_norm(x.unflatten(-1, (self.heads, -1)), (self.kind.head_dim,))
            return x * tables + x.roll(1, -1) * tables

        def call() -> Tensor:
            q, k, v = F.linear(F.layer_norm(x, (width,)), qkv).chunk(3, dim=-1)
            y = x + F.linear((rotate(q) + rotate(k)).flatten(1)[:, :width] + v, out) * scale
            return y + F.linear(F.gelu(F.linear(F.layer_norm(y, (width,)), up)), down) * scale

        x = self._random(tokens, width, dtype=dtype)
        return self.seconds(call) / (12 * width**2 * tokens)

    def attention(self, sequences: int | None) -> float:
        """A query and a key of one head; in one sequence, or in many of a frame each."""
        pair = 2 * self.kind.head_dim * self.heads
        if sequences is None:
            length, sequences = FRAME, max(1, int(self.budget / (pair * FRAME**2)))
        else:
            length = min(MOST_TOKENS, max(FRAME, int(math.sqrt(self.budget / pair))))
        q, k, v = (self._random(sequences, length, self.heads, self.kind.head_dim).transpose(1, 2) for _ in range(3))
        spent = self.seconds(lambda: attend(q, k, v, kernel=self.kind.kernel))
        return spent / (sequences * self.heads * length**2)

    def matching(self) -> float:
        """A comparison of a source with a target."""
        width = self.kind.width
        tokens = max(128, min(MOST_TOKENS, int(math.sqrt(self.budget / (width + 40)))))
        source, target = self._random(1, tokens, width), self._random(1, tokens // 2, width)
        return self.seconds(lambda: best_match(source, target)) / (tokens * (tokens // 2))

    def matching_heads(self) -> float:
        """The same within blocks of frames, for each head."""
        places = Places.dense(TokenLayout(1, FRAMES[self.kind.device.type], GRID, SPECIAL), self.kind.device)
        split = Split.of(places, BLOCK, SHARE, anchor=True)
        keys = self._heads(len(places.frame))[1].contiguous()
        pairs = split.targets.numel() * split.sources.shape[1] * self.heads
        return self.seconds(lambda: match(keys, split)) / pairs

    def merging(self) -> float:
        """A channel of a token, with groups shared by all heads."""
        tokens = self._tokens(400 * self.kind.width)
        q, k, v = self._heads(tokens)
        groups, owner = self._groups(1, tokens)

        def call() -> Tensor:
            plan = MergePlan(owner[0], groups)
            short = [plan.merge(t.transpose(1, 2).flatten(2)) for t in (q, k, v)]
            return plan.unmerge(short[0])

        return self.seconds(call) / (tokens * self.kind.width)

    def merging_heads(self) -> float:
        """A channel of a token, with groups per head, and an eighth of the tokens removed from them."""
        tokens = self._tokens(1200 * self.kind.width)
        q, k, v = self._heads(tokens)
        groups, owner = self._groups(self.heads, tokens)

        def call() -> Tensor:
            keys, queries = MergePlan(owner, groups), MergePlan(owner, groups)
            keys.merge(k.contiguous()), keys.merge(v)
            x = q.contiguous()
            queries, _ = split_outliers(x, queries, queries.merge(x), self.heads * tokens // 8, shared=True)
            return queries.unmerge(queries.merge(x))

        return self.seconds(call) / (tokens * self.kind.width)

    def packing(self) -> float:
        """A channel of a token of the stream."""
        tokens = self._tokens(400 * self.kind.width)
        x = self._random(1, tokens, self.kind.width)
        groups, owner = self._groups(1, tokens)
        plan = MergePlan(owner[0], groups)
        return self.seconds(lambda: plan.unmerge(plan.merge(x))) / x.numel()

    def _heads(self, tokens: int) -> list[Tensor]:  # [1, A, N, D] each
        """Queries, keys and values as in an attention: views of one row per token."""
        rows = self._random(1, tokens, 3 * self.heads * self.kind.head_dim)
        return [t.transpose(1, 2) for t in rows.unflatten(-1, (3, self.heads, self.kind.head_dim)).unbind(2)]

    def _groups(self, heads: int, tokens: int) -> tuple[int, Tensor]:  # [1, A, N]
        """The number of groups, a third of the tokens, none empty, and the group of each token in each head."""
        groups = max(1, tokens // 3)
        owner = torch.randint(groups, (1, heads, tokens), generator=self.generator, device="cpu")
        owner[..., :groups] = torch.arange(groups, device="cpu")
        return groups, owner.to(self.kind.device)

    def reading(self) -> float:
        """A gathered number."""
        x = self._random(self._tokens(400 * self.kind.width), self.kind.width)
        index = torch.arange(0, len(x), 2, device=self.kind.device)
        return self.seconds(lambda: x.index_select(0, index)) / (len(index) * self.kind.width)

    def starting(self) -> float:
        """Launching a tiny operation."""
        x, index = self._random(2, 8, 8), torch.arange(4, device=self.kind.device)
        rounds, each = 40, 5

        def call() -> None:
            for _ in range(rounds):
                y = x @ x
                best = y.max(dim=-1).indices
                torch.cat([best.index_select(1, index), best[:, 4:] + 1], dim=1)

        return self.seconds(call) / (rounds * each)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Time of the fastest run except the first; short calls are repeated within a run."""
        times = max(1, min(MOST_TIMES, int(LEAST / max(self._timed(call, 1), 1e-9))))
        return max(min(self._timed(call, times) for _ in range(RUNS)), 1e-9)

    def _timed(self, call: Callable[[], Any], times: int) -> float:
        clock = time.thread_time if self.single else time.perf_counter
        self._wait()
        began = clock()
        for _ in range(times):
            call()
        self._wait()
        return (clock() - began) / times

    def _wait(self) -> None:
        if self.kind.device.type == "cuda":
            torch.cuda.synchronize(self.kind.device)

    def _tokens(self, each: float) -> int:
        """Number of tokens that take the time of a piece, at `each` multiply-adds."""
        return max(256, min(MOST_TOKENS, int(self.budget / each)))

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return numbers.to(self.kind.device, self.kind.dtype if dtype is None else dtype)
