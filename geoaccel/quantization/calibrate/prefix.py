"""Cached outputs of the finished blocks of a network, so that a search computes only what comes after.

The outputs of all finished blocks are cached for every batch and returned instead of running them, so that a forward
computes only what comes after, with the same numbers.
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
    """The awaited block has run."""


class Prefix:
    """A network whose first blocks are finished, on the same batches again and again.

    Args:
        model: Only its later blocks change between calls.
        blocks: Names of the blocks that run once, in the order in which they run.
        batches: Images.
        limit_bytes: Limit on cached outputs. Beyond it nothing is cached, and every forward is complete.
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
        """Run every batch up to the block after the finished ones, for hooks on its inputs."""
        self._run_next(lambda number, out: None)

    @torch.no_grad()
    def advance(self) -> None:
        """The next block is finished: cache its output."""
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
        """Finished blocks return their cached output."""
        finished = list(zip(self.blocks, self.outputs[number], strict=False))
        for block, out in finished:
            block.forward = lambda *args, out=out: out
        try:
            yield
        finally:
            for block, _ in finished:
                del block.forward
