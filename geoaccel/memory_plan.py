"""Memory plans: what a forward does in parts, and what it offloads, to stay within a memory limit.

Without a plan every block runs on all tokens at once, and everything stays on the device, which is fastest. With a
plan, the residual stream is updated in place, part by part; queries, keys and values are the only tensors of a block
that exist for all tokens. Images are copied to the device a few frames at a time, and predictions are copied back. The
results are the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryPlan:
    """How a forward without gradients runs.

    Attributes:
        tokens: Tokens at a time in blocks, in whole frames; at least one frame.
        frames: Frames at a time in the heads.
        host_layers: Number of layers read by heads that are offloaded to host memory, the first ones first. On a CPU
            nothing moves.
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
"""Tokens and frames at a time, from the fastest to the one that needs least memory."""


def plans(host_layers: int) -> list[MemoryPlan]:
    """Plans from the fastest to the one that needs least memory, with up to `host_layers` layers offloaded."""
    first = [MemoryPlan(*PARTS[0], host) for host in range(host_layers + 1)]
    return first + [MemoryPlan(*parts, host_layers) for parts in PARTS[1:]]
