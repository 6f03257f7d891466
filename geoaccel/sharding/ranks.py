"""The processes that split one scene: the frames of each, and the tensors that they exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.layout import TokenLayout
from geoaccel.sharding.watch import Watch


@dataclass
class Forward:
    """State of the running forward, known to all processes.

    Attributes:
        counts: Frames of each rank.
        rank: Rank of this process.
        notes: State that layers keep for later ones.
    """

    counts: tuple[int, ...]
    rank: int
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Of all ranks."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """Frames of the ranks before this one."""
        return sum(self.counts[: self.rank])

    def whole(self, layout: TokenLayout) -> TokenLayout:
        """The layout of the whole scene, from that of this rank's frames."""
        return replace(layout, frames=self.frames)


class Ranks:
    """A group of processes, with the amount of data received.

    Attributes:
        rank, size: Rank of this process, and size of the group.
        received: Bytes received from other ranks in the last forward, by kind and index of the attention.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, watch: Watch | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise UserError("this process is not in the group; call parallel where group.rank() is 0 or more")
        self.watch = watch
        self.received: Counter[tuple[str, int]] = Counter()
        self._members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        self._control = self._control_group()
        self._forward: Forward | None = None

    def _control_group(self) -> dist.ProcessGroup | None:
        """A group for small objects over the CPU, whatever the backend for tensors."""
        if dist.get_backend(self.group) == "gloo":
            return self.group
        return dist.new_group(self._members, backend="gloo", use_local_synchronization=True)

    def told(self, mine: Any) -> list[Any]:
        """Gather an object from each rank; a collective call."""
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(found, mine, group=self._control)
        return found

    def first_says(self, mine: Callable[[], Any]) -> Any:
        """Broadcast an object from rank 0, computed only there."""
        said = [mine() if self.rank == 0 else None]
        with self._waiting():
            dist.broadcast_object_list(said, src=self._members[0], group=self._control)
        return said[0]

    def collected(self, mine: Any) -> list[Any] | None:
        """Gather an object from each rank on rank 0; None on the others."""
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._waiting():
            dist.gather_object(mine, found, dst=self._members[0], group=self._control)
        return found

    def agree(self, what: str, mine: Any, advice: str) -> None:
        """Refuse, on every rank, values that differ between ranks.

        Raises:
            UserError: Naming the first rank that differs from rank 0, and both values.
        """
        said = self.told(mine)
        for rank, other in enumerate(said):
            if other != said[0]:
                raise UserError(f"rank {rank} has a different {what} from rank 0 ({other}, not {said[0]}); {advice}")

    def begin(self, images: Tensor, rest: Sequence[Any]) -> Forward:
        """Start a forward on all ranks.

        Args:
            images: [B, S, 3, H, W] or [S, 3, H, W], those of this rank.
            rest: Other values that must be the same everywhere.

        Raises:
            UserError: If a rank has no frame, or images of another kind; on every rank.
        """
        self._forward = None
        shape = list(images.shape)
        frames = shape.pop(-4) if len(shape) in (4, 5) else 0
        counts = self.told(frames)
        for rank, count in enumerate(counts):
            if count < 1:
                raise UserError(f"rank {rank} has no frames; give every rank at least one, or start fewer processes")
        self.agree("shape of images", (shape, str(images.dtype)), "give every rank frames of the same size")
        self.agree("call of the model", list(rest), "call it in the same way on every rank")
        self.received.clear()
        self._forward = Forward(tuple(counts), self.rank)
        return self._forward

    def end(self) -> None:
        """The forward is over."""
        self._forward = None

    @property
    def forward(self) -> Forward:
        """The forward that is running.

        Raises:
            ValueError: If there is none: a part of the network was called by itself.
        """
        if self._forward is None:
            raise ValueError("call the whole model: its parts do not know the frames of other ranks")
        return self._forward

    def everybody(self, mine: Tensor, lengths: Sequence[int], dim: int, layer: tuple[str, int]) -> list[Tensor]:
        """All-gather of tensors that differ in length along one dimension.

        One broadcast per rank: torch's all-gather would pad all to the longest.

        Args:
            mine: Tensor of this rank.
            lengths: Length of each rank's tensor along ``dim``.
            dim: The dimension.
            layer: Attention for which bytes are counted.
        """
        shape = list(mine.shape)
        parts = []
        for rank, length in enumerate(lengths):
            shape[dim] = length
            parts.append(mine.contiguous() if rank == self.rank else mine.new_empty(shape))
        with self._waiting():
            works = [
                dist.broadcast(part, src=self._members[rank], group=self.group, async_op=True)
                for rank, part in enumerate(parts)
            ]
            for work in works:
                work.wait()
        self.received[layer] += sum(part.nbytes for rank, part in enumerate(parts) if rank != self.rank)
        return parts

    def around(self, mine: Tensor, lengths: Sequence[int], dim: int, layer: tuple[str, int]) -> Iterator[Tensor]:
        """Ring over the tensors of all ranks, this rank's first: each is passed on while the next one is received.

        Arguments as of :meth:`everybody`; at most two of the others are in memory at a time.
        """
        block = mine.contiguous()
        del mine  # or it would stay until the last block
        following = self._members[(self.rank + 1) % self.size]
        previous = self._members[(self.rank - 1) % self.size]
        for step in range(1, self.size + 1):
            if step == self.size:
                yield block
                return
            shape = list(block.shape)
            shape[dim] = lengths[(self.rank - step) % self.size]
            coming = block.new_empty(shape)
            with self._waiting():
                works = dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, block, following, self.group),
                        dist.P2POp(dist.irecv, coming, previous, self.group),
                    ]
                )
            yield block
            with self._waiting():
                for work in works:
                    work.wait()
            self.received[layer] += coming.nbytes
            block = coming

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Block that needs other ranks. If one is dead the watch ends this process and names it."""
        with self.watch.waiting() if self.watch is not None else nullcontext():
            try:
                yield
            except RuntimeError:  # a connection broke; the watch finds out which rank died
                if self.watch is not None:
                    self.watch.explain()
                raise


def spans(counts: Sequence[int]) -> list[slice]:
    """Consecutive slices of these lengths."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def on_device_of(tensor: Tensor, index: Tensor) -> Tensor:
    """An index where a tensor is, without waiting for the device."""
    return index.to(tensor.device, non_blocking=True) if tensor.device != torch.device("cpu") else index
