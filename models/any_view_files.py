"""Depth Anything 3's published files and objects: their tensors under our names, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from geoaccel.models.upstream import rope_base

OUT_LAYERS = {12: (5, 7, 9, 11), 24: (11, 15, 19, 23), 40: (19, 27, 33, 39)}
"""Blocks that the dense head reads, by the number of blocks of the published sizes."""


def from_upstream(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of a published file or object under our names.

    In files, names begin with ``model.``. Upstream shares one module as the last norm of the four ray outputs, and
    safetensors keeps only its first name; here each has its own parameters, and only the last is used. The giant
    network's head for Gaussian splats is not implemented here.
    """
    found = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if not any(name.startswith("backbone.pretrained.") for name in found):
        return tensors
    found = {name: tensor for name, tensor in found.items() if not name.startswith(("gs_head.", "gs_adapter."))}
    for part in ("weight", "bias"):
        *others, used = (f"head.scratch.output_conv2_aux.{level}.2.{part}" for level in range(4))
        present = next((found[name] for name in (used, *others) if name in found), None)
        if present is None:
            continue
        found[used] = present
        for name in others:
            shared = name not in found or found[name].data_ptr() == present.data_ptr()
            found[name] = present.detach().clone() if shared else found[name]
    return found


def config_from_names(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of a checkpoint without a configuration, from the names and shapes of its tensors."""
    blocks = "backbone.pretrained.blocks"
    depth = len({name.split(".")[3] for name in tensors if name.startswith(f"{blocks}.")})
    alternating = [index for index in range(depth) if f"{blocks}.{index}.attn.q_norm.weight" in tensors]
    embedding = tensors["backbone.pretrained.patch_embed.proj.weight"].shape
    position = tensors["backbone.pretrained.pos_embed"].shape
    config: dict[str, Any] = {
        "img_size": math.isqrt(position[1] - 1) * embedding[-1],
        "patch_size": embedding[-1],
        "embed_dim": embedding[0],
        "depth": depth,
        "num_heads": max(1, embedding[0] // 64),
        "head_features": tensors["head.scratch.layer1_rn.weight"].shape[0],
        "head_out_channels": tuple(tensors[f"head.projects.{level}.weight"].shape[0] for level in range(4)),
        "cam_enc_trunk_depth": len({name.split(".")[2] for name in tensors if name.startswith("cam_enc.trunk.")}),
        "swiglu": int(f"{blocks}.0.mlp.w12.weight" in tensors),
    }
    if alternating:
        config["alt_start"] = alternating[0]
        config["num_heads"] = max(1, embedding[0] // tensors[f"{blocks}.{alternating[0]}.attn.q_norm.weight"].shape[0])
    return {**config, **({"out_layers": OUT_LAYERS[depth]} if depth in OUT_LAYERS else {})}


def config_from_module(module: nn.Module) -> dict[str, Any]:
    """Read the sizes off an upstream object."""
    m: Any = dict(module.named_children())
    vit, head = m["backbone"].pretrained, m["head"]
    return {
        **config_from_names(module.state_dict()),
        "num_heads": vit.blocks[0].attn.num_heads,
        "out_layers": tuple(m["backbone"].out_layers),
        "cam_enc_num_heads": m["cam_enc"].trunk[0].attn.num_heads,
        "head_features": head.scratch.output_conv1.in_channels,
        "rope_frequency": rope_base(vit.rope),
    }
