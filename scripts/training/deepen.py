"""A deeper VGGT initialised from a shallow one: every trained layer several times, with smaller residuals.

Gong et al. stack trained layers to train deep transformers faster (ICML 2019, "Efficient Training of BERT by
Progressively Stacking"). A residual network takes one step per layer. Here k copies take k steps, each smaller by the
square root of k, as uncorrelated steps add up in squares.

Differs from the paper: layers are repeated one by one (1 1 1 2 2 2), not as a whole (1 2 1 2), and residual branches
are scaled down.
"""

from __future__ import annotations

import dataclasses

import torch

from geoaccel.errors import UserError
from geoaccel.models.vggt import VGGT

BLOCKS = ("aggregator.frame_blocks.", "aggregator.global_blocks.")
FREE = ("depth", "dpt_layers", "layer_scale")
"""Settings that may differ between the shallow and the deep network."""


@torch.no_grad()
def copy_layers(source: VGGT, target: VGGT) -> None:
    """Fill ``target`` with the weights of ``source``, k times shallower: layer l goes to l k to l k + k - 1.

    Everything except the layers is copied unchanged. The dense heads of ``target`` should read the last copy of each
    layer that those of ``source`` read.

    Raises:
        ValueError: If the two are not VGGTs, differ in more than depth, or one depth does not divide the other.
    """
    if not isinstance(source, VGGT) or not isinstance(target, VGGT):
        raise UserError(
            f"only a vggt can be deepened, got {source.backbone.name} to {target.backbone.name}; start from a vggt"
        )
    old, new = dataclasses.asdict(source.config), dataclasses.asdict(target.config)
    wrong = [name for name in old if old[name] != new[name] and name not in FREE]
    if wrong:
        raise UserError(
            f"network.{wrong[0]} is {new[wrong[0]]}, the checkpoint's {old[wrong[0]]}; a network that starts from a "
            "shallower one may differ from it only in depth, dpt_layers and layer_scale"
        )
    times, rest = divmod(target.config.depth, source.config.depth)
    if rest or not times:
        raise UserError(
            f"network.depth={target.config.depth} is no multiple of the checkpoint's {source.config.depth} layers; "
            f"take {source.config.depth}, {2 * source.config.depth}, {3 * source.config.depth} and so on"
        )
    read = tuple(times * layer + times - 1 for layer in source.config.dpt_layers)
    if target.config.dpt_layers != read:
        raise UserError(
            f"network.dpt_layers={list(target.config.dpt_layers)} are not the layers that the dense heads learnt to "
            f"read; give {list(read)}"
        )
    state = {}
    for name, tensor in source.state_dict().items():
        blocks = next((prefix for prefix in BLOCKS if name.startswith(prefix)), None)
        if blocks is None:
            state[name] = tensor
            continue
        layer, part = name.removeprefix(blocks).split(".", 1)
        smaller = tensor / times**0.5 if part in ("ls1.gamma", "ls2.gamma") else tensor
        state |= {f"{blocks}{times * int(layer) + copy}.{part}": smaller for copy in range(times)}
    target.load_state_dict(state)
