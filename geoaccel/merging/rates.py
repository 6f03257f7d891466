"""Rates of a machine for the operations of a forward and of merging methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from geoaccel.runtime import machine

VERSION = 1
"""Version of the micro-benchmarks and of the fields of :class:`Rates`."""


@dataclass(frozen=True)
class Rates:
    """Seconds per operation.

    Attributes:
        linear: A multiply-add in the linear layers of a block, norms and activations between them included.
        heads: The same in float32, which the heads keep.
        attend: A query and a key of one head, in one long sequence.
        attend_frames: The same in many sequences of one frame each.
        match: A comparison of a token with a target over all channels.
        match_heads: The same over the channels of one head.
        merge: A channel of a token whose query, key and value are averaged in its group, and whose output is copied
            back.
        merge_heads: The same with groups per head, from which outliers are removed.
        pack: A channel of a token that is averaged in its group and copied back.
        read: A number that is gathered or read from memory.
        start: Launching an operation.
        measured: Whether they were measured on this machine; otherwise they are built in.
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
        """Rates of one core with AVX-512 in float32; for other devices, five thousand times as fast.

        The first were measured. In the second only the ratio of launching to computing matters.
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
    """The conditions that rates depend on.

    Attributes:
        device: Device.
        dtype: Dtype of the tokens.
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
        """The kind and torch's number of threads."""
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
