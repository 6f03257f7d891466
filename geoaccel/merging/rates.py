"""How fast a machine is at what a forward and a merging method do: the numbers, and what they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from geoaccel.runtime import machine

VERSION = 1
"""Of the micro-benchmarks and what the fields of :class:`Rates` mean."""


@dataclass(frozen=True)
class Rates:
    """Seconds.

    Attributes:
        linear: For a multiply-add in the linear layers of a block, norms and activations between them included.
        heads: The same in float32, which the heads keep.
        attend: For a query and a key of one head, in one long sequence.
        attend_frames: The same in many sequences of a frame each.
        match: For a token and a target that are compared over all channels.
        match_heads: The same over the channels of one head.
        merge: For a channel of a token whose query, key and value are averaged in its group, and whose output is copied
            back.
        merge_heads: The same where every head has groups of its own, and takes its outliers out of them.
        pack: For a channel of a token that is averaged in its group and copied back.
        read: For a number that is gathered, or passed over in memory.
        start: For an operation that is started.
        measured: Whether it is so on this machine; otherwise they are built in.
    """

    linear: float
    heads: float
    attend: float
    attend_frames: float
    match: float
    match_heads: float
    merge: float
    merge_heads: float
    pack: float
    read: float
    start: float
    measured: bool = False

    @classmethod
    def built_in(cls, device_type: str, width: int, head_dim: int) -> Rates:
        """Of one core with AVX-512 in float32; for other devices, of one that is five thousand times as fast.

        The first was measured. In the second only the proportion of starting to computing matters.
        """
        cpu = device_type == "cpu"
        unit = 2.5e-11 if cpu else 5e-15  # a multiply-add
        pair = (2 * head_dim + 10) * unit
        return cls(
            linear=1.2 * unit,
            heads=1.2 * unit * (1 if cpu else 10),
            attend=pair,
            attend_frames=1.15 * pair,
            match=(0.75 * width + 40) * unit,
            match_heads=(0.75 * head_dim + 40) * unit,
            merge=150 * unit,
            merge_heads=600 * unit,
            pack=40 * unit,
            read=20 * unit,
            start=5e-6,
        )

    def __str__(self) -> str:
        return "measured on this machine" if self.measured else "built in"


@dataclass(frozen=True)
class Kind:
    """What rates are of.

    Attributes:
        device: Where.
        dtype: Of the tokens.
        width: C.
        head_dim: D.
        kernel: A name from ``geoaccel.attention_kernels.KERNELS``.
    """

    device: torch.device
    dtype: torch.dtype
    width: int
    head_dim: int
    kernel: str = "sdpa"

    @property
    def key(self) -> tuple[Any, ...]:
        """The kind and how many threads torch uses."""
        return (str(self.device), self.dtype, torch.get_num_threads(), self.width, self.head_dim, self.kernel)

    def on_this_machine(self) -> dict[str, Any]:
        """Everything that its rates depend on, as plain data."""
        return {
            "version": VERSION,
            "torch": torch.__version__,
            **machine(str(self.device)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "width": self.width,
            "head_dim": self.head_dim,
            "kernel": self.kernel,
        }
