"""The recipe of the minis, made small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim has Muon from torch 2.9 on")
SIZE = 56
"""Side of the images of a small batch."""


SMALL = {"device": "cpu", "compile": False, "steps": 4, "validation": {"scenes": 1, "frames": 3, "size": [56, 56]}}


SMALL_MODEL = {
    "vggt-mini": {"img_size": 56, "embed_dim": 32, "num_heads": 2, "vit_depth": 1, "vit_num_heads": 2,
                  "camera_head_num_heads": 2, "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8]},
    "pi3-mini": {"img_size": 56, "vit_dim": 32, "vit_depth": 1, "vit_num_heads": 2, "decoder_dim": 32,
                 "decoder_depth": 4, "decoder_num_heads": 2, "head_decoder_dim": 32, "head_decoder_num_heads": 2,
                 "camera_dim": 16},
}  # fmt: skip
