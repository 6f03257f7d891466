"""What a forward does in parts, and what leaves the device, to keep within a limit of memory.

Without a plan every block runs on all tokens at once, and everything stays on the device: the fastest way. With one,
the residual stream is changed in place, a part after the other; queries, keys and values are the only tensors of a
block that exist whole. Images come to the device a few frames at a time, and what a head predicts leaves it again. The
numbers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """How a forward without gradients runs.

    Attributes:
        tokens: At a time in blocks, in whole frames; at least one frame.
        frames: At a time in the heads.
        host_layers: How many of the layers that heads read wait in host memory, the first ones first. On a CPU that is
            where they are.
    """

    tokens: int
    frames: int
    host_layers: int = 0

    def frames_in_blocks(self, tokens_per_frame: int) -> int:
        """Frames at a time in blocks."""
        return max(1, self.tokens // tokens_per_frame)

    def __str__(self) -> str:
        words = f"blocks on {self.tokens:,} tokens at a time, heads on {self.frames} frame{'s' * (self.frames > 1)}"
        if self.host_layers:
            words += f", {self.host_layers} layer{'s' * (self.host_layers > 1)} of features in host memory"
        return words


PARTS = ((16_384, 8), (8192, 4), (4096, 2), (2048, 1))
"""Tokens and frames at a time, from what costs least time to what takes least memory."""


def plans(host_layers: int) -> list[MemoryPlan]:
    """Plans from what costs least time to what takes least memory, for so many layers that may wait on the host."""
    first = [MemoryPlan(*PARTS[0], host) for host in range(host_layers + 1)]
    return first + [MemoryPlan(*parts, host_layers) for parts in PARTS[1:]]
