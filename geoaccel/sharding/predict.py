"""Predicted time of a forward on N GPUs at a given link speed, from the cost model and the data exchanged.

Local work (encoder, attention within frames, linear layers, heads) is divided by the ranks. In global attention a
rank's queries attend to all keys; a ring overlaps the transfer of each block with attention to the previous one, an
all-gather of reduced keys overlaps nothing. Norms, softmax, the camera head and kernel launches are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from geoaccel.cost import HEADS, PRODUCTS, Trunk
from geoaccel.layout import TokenLayout
from geoaccel.memory import activation_bytes
from geoaccel.merging.asymmetric import Asymmetric

BYTES = 2
"""Of a number of a key or value, in bfloat16."""


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links. The defaults are not measured: about an H100 with 80 GB at half its peak.

    Attributes:
        linear_flops: FLOP/s in linear layers.
        attention_flops: FLOP/s in attention.
        head_flops: FLOP/s in the heads, which keep float32.
        memory: Bytes of a GPU that can be used.
        per_machine: GPUs in one machine.
        inside: Bytes/s that a GPU receives from another one of its machine.
        between: Bytes/s that it receives from one of another machine.
        latency_s: Of a message.
    """

    linear_flops: float = 4e14
    attention_flops: float = 3.5e14
    head_flops: float = 4e13
    memory: float = 75e9
    per_machine: int = 8
    inside: float = 3e11
    between: float = 4e10
    latency_s: float = 2e-5

    def link(self, gpus: int) -> float:
        """Bytes/s of the slowest connection in a ring of so many."""
        return self.inside if gpus <= self.per_machine else self.between


@dataclass(frozen=True)
class Prediction:
    """Of one forward.

    Attributes:
        seconds: All of it.
        local: Of it, what needs no other rank.
        attending: Of it, global attention.
        waiting: Of it, for keys and values that nothing hides.
        layer_bytes: What a rank receives a layer.
        memory: Bytes of a GPU, weights included.
        fits: Whether a GPU has so much.
    """

    seconds: float
    local: float
    attending: float
    waiting: float
    layer_bytes: float
    memory: float
    fits: bool


def predict(
    network: Any, frames: int, size: tuple[int, int], gpus: int, cluster: Cluster, merging: Asymmetric | None = None
) -> Prediction:
    """One forward of S frames of H x W in bfloat16 on N GPUs.

    Args:
        network: One of ours; its weights are not read.
        frames: S; at least one for each GPU.
        size: (H, W) in pixels.
        gpus: N.
        cluster: What they are.
        merging: Asymmetric attention; None: dense.
    """
    trunk: Trunk = network.trunk
    grid = (size[0] // trunk.patch_size, size[1] // trunk.patch_size)
    layout = TokenLayout(1, frames, grid, trunk.special)
    mine = -(-frames // gpus)  # of the rank with most
    share = mine / frames
    parts = network.cost(frames, size).parts
    heads, products = parts[HEADS], parts[PRODUCTS]
    rest = sum(parts.values()) - heads - products
    local = share * (rest / cluster.linear_flops + heads / cluster.head_flops)
    keys = number_of_keys(layout, merging, trunk.global_blocks)
    attending = share * products * keys / layout.tokens_per_scene / cluster.attention_flops
    all_bytes = 2 * BYTES * trunk.width * keys
    layer_bytes = all_bytes * (gpus - 1) / gpus
    block = all_bytes / gpus / cluster.link(gpus) + cluster.latency_s
    hidden = attending / trunk.global_blocks / gpus if merging is None else 0.0
    waiting = trunk.global_blocks * (gpus - 1) * max(0.0, block - hidden)
    # A ring holds its own block, the one at work and the one that comes; a gather its parts and all in a row.
    held = 3 * all_bytes / gpus if merging is None else 2 * all_bytes
    weights = sum(parameter.numel() for parameter in network.parameters()) * BYTES
    memory = weights + activation_bytes(network, mine, size, "cuda") + (held if gpus > 1 else 0.0)
    seconds = local + attending + waiting
    return Prediction(seconds, local, attending, waiting, layer_bytes, memory, memory <= cluster.memory)


def number_of_keys(layout: TokenLayout, merging: Asymmetric | None, depth: int) -> float:
    """Keys of a global attention over a scene, on average over layers: all tokens, or as many as the strides leave."""
    if merging is None:
        return layout.tokens_per_scene
    return merging.mean_keys(layout, layout.tokens_per_scene, depth)
