"""Sizes read from upstream model objects, for parts that several backbones share."""

from __future__ import annotations

from typing import Any

from geoaccel.errors import UserError


def encoder_sizes(encoder: Any) -> dict[str, int]:
    """``img_size``, ``patch_size``, ``vit_depth`` and ``vit_num_heads`` of a DINOv2 encoder."""
    patch_size = encoder.patch_embed.proj.kernel_size[0]
    return {
        "patch_size": patch_size,
        "img_size": round((encoder.pos_embed.shape[1] - 1) ** 0.5) * patch_size,
        "vit_depth": len(encoder.blocks),
        "vit_num_heads": encoder.blocks[0].attn.num_heads,
    }


def rope_base(rope: Any) -> float:
    """Base of a rotary embedding, under either attribute name.

    Raises:
        ValueError: If it has neither.
    """
    for name in ("base_frequency", "base"):
        if hasattr(rope, name):
            return float(getattr(rope, name))
    raise UserError(f"cannot read the rotary base of a {type(rope).__name__}; expected .base_frequency or .base")


def dense_head_sizes(head: Any, depth: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Features, channels of the four projections, and layers that a dense head (DPT) reads from a trunk of this depth.

    Forks that store only four features (FastVGGT, LiteVGGT) renumber them 0 to 3; at the published depth the original
    layers are known.

    Raises:
        ValueError: If the last layer is not among them at another depth: the numbering is then ambiguous.
    """
    layers = tuple(head.intermediate_layer_idx)
    if depth == 24 and layers == (0, 1, 2, 3):
        layers = (4, 11, 17, 23)
    if max(layers) != depth - 1:
        raise UserError(
            f"the dense heads read layers {list(layers)}; expected the last of {depth}, {depth - 1}, among them"
        )
    return head.scratch.layer1_rn.out_channels, tuple(project.out_channels for project in head.projects), layers


def tracker_sizes(tracker: Any) -> dict[str, int]:
    """Sizes of a point tracker, all ``track_...``."""
    return {
        "track_hidden_size": tracker.updateformer.input_transform.out_features,
        "track_corr_levels": tracker.corr_levels,
        "track_corr_radius": tracker.corr_radius,
        "track_depth": len(tracker.updateformer.time_blocks),
    }
