"""Random networks so small that an evaluation of them takes no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from geoaccel.models import build
from geoaccel.models.weights import save_model

TINY: dict[str, dict[str, Any]] = {
    "vggt": {
        "img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
        "camera_head_num_heads": 2, "camera_trunk_depth": 1, "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8],
        "dpt_layers": [0, 0, 1, 1], "heads": ["camera", "depth"],
    },
    "pi3": {
        "img_size": 28, "vit_dim": 32, "vit_depth": 1, "vit_num_heads": 2, "decoder_dim": 32, "decoder_depth": 2,
        "decoder_num_heads": 2, "head_decoder_dim": 32, "head_decoder_depth": 1, "head_decoder_num_heads": 2,
        "camera_dim": 32,
    },
}  # fmt: skip


def write_checkpoint(backbone: str, folder: Path) -> Path:
    """A checkpoint with the same weights on every call; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(backbone, **TINY[backbone])
    if backbone == "vggt":  # a random camera may have no field of view at all, and then no focal length
        with torch.no_grad():
            network.camera_head.pose_branch.fc2.bias[-2:] = 1.0
    path = folder / f"tiny-{backbone}.safetensors"
    save_model(network, path, dtype=torch.float32)
    return path
