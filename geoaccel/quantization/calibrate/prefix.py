"""Cached outputs of the finished blocks of a network, so that a search computes only what comes after.

The outputs of all finished blocks are kept for every batch and handed out in their place, so that a forward computes
only what comes after, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LIMIT_BYTES = 4 << 30

Batch = Callable[[], Tensor]
"""Gives images [B, S, 3, H, W] as the model takes them; rendering or reading waits until then."""


class _Stop(Exception):
    """The block that was waited for has run."""


class Prefix:
    """A network whose first blocks are finished, on the same batches again and again.

    Args:
        model: Changed further back between the calls.
        blocks: Names of the blocks that run once, in the order in which they run.
        batches: Images.
        limit_bytes: Of kept outputs. Beyond it nothing is kept, and every forward is a whole one.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], *, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self.model = model
        self.blocks: list[Any] = [model.get_submodule(name) for name in blocks]
        self.batches = batches
        self.limit_bytes = limit_bytes
        self.outputs: list[list[Tensor]] = [[] for _ in batches]
        self.keeping = True
        self.finished = 0

    @torch.no_grad()
    def forwards(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Images and predictions, batch by batch."""
        for number, load in enumerate(self.batches):
            images = load()
            with self._from_kept(number):
                predictions = self.model(images)
            yield images, predictions

    @torch.no_grad()
    def reach(self) -> None:
        """Run every batch as far as the block after the finished ones, for hooks that see what enters it."""
        self._run_next(lambda number, out: None)

    @torch.no_grad()
    def advance(self) -> None:
        """The next block is finished: keep its output."""
        if self.keeping:
            self._run_next(lambda number, out: self.outputs[number].append(out))
            if sum(out.nbytes for kept in self.outputs for out in kept) > self.limit_bytes:
                self.keeping = False
                self.outputs = [[] for _ in self.batches]
        self.finished += 1

    def _run_next(self, take: Callable[[int, Tensor], None]) -> None:
        block = self.blocks[self.finished]

        def stop(number: int, out: Tensor) -> None:
            take(number, out)
            raise _Stop

        for number, load in enumerate(self.batches):
            handle = block.register_forward_hook(lambda _, args, out, number=number: stop(number, out))
            try:
                with self._from_kept(number):
                    self.model(load())
            except _Stop:
                pass
            finally:
                handle.remove()

    @contextmanager
    def _from_kept(self, number: int) -> Iterator[None]:
        """Finished blocks give the output that was kept."""
        finished = list(zip(self.blocks, self.outputs[number], strict=False))
        for block, out in finished:
            block.forward = lambda *args, out=out: out
        try:
            yield
        finally:
            for block, _ in finished:
                del block.forward
