"""Depth Anything 3's cameras: a code of nine numbers to a token and back.

The code is VGGT's, but ``world_from_cam``: the camera's position and orientation in the world, scalar-last quaternion,
and the vertical and horizontal field of view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.cameras import invert_rigid
from geoaccel.models.layers.block import Block, Mlp, blocks_of
from geoaccel.models.layers.camera_head import POSE_SIZE, encode_pose, quaternion_to_rotation


class CameraEncoder(nn.Module):
    """Tokens of given cameras, which attend to each other.

    Args:
        dim: Width C.
        depth, num_heads: Blocks, and heads of each.
        layer_scale: Initial factor of the residual branches.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, layer_scale: float) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Block(dim, num_heads, layer_scale=layer_scale) for _ in range(depth))
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.pose_branch = Mlp(POSE_SIZE, dim // 2, dim)

    def forward(
        self,
        cam_from_world: Tensor,  # [B, S, 3|4, 4]
        intrinsics: Tensor,  # [B, S, 3, 3], pixels
        size: tuple[int, int],
    ) -> Tensor:  # [B, S, C]
        code = encode_pose(invert_rigid(cam_from_world.float()), intrinsics.float(), size)
        x = self.token_norm(self.pose_branch(code.to(self.token_norm.weight.dtype)))
        for index, block in enumerate(blocks_of(self.trunk)):
            x = block(x, AttentionContext("head", index))
        return self.trunk_norm(x)


class CameraDecoder(nn.Module):
    """Predicts the code of each frame from the token before its patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_qvec = nn.Linear(dim, 4)
        fov = nn.Linear(dim, 2)
        nn.init.ones_(fov.bias)  # 1 rad: below 0, the ReLU would get no gradient
        self.fc_fov = nn.Sequential(fov, nn.ReLU())

    def forward(
        self,
        features: Tensor,  # [B, S, 2 * C]
    ) -> Tensor:  # [B, S, 9], float32
        x = self.backbone(features.to(self.fc_t.weight.dtype))
        return torch.cat([self.fc_t(x), self.fc_qvec(x), self.fc_fov(x)], dim=-1).float()


def decode(
    code: Tensor,  # [..., 9]
    size: tuple[int, int],  # (H, W)
) -> tuple[Tensor, Tensor]:  # [..., 3, 4], [..., 3, 3]
    """``cam_from_world`` and intrinsics in pixels, the principal point at (W / 2, H / 2)."""
    rotation = quaternion_to_rotation(code[..., 3:7])
    cam_from_world = invert_rigid(torch.cat([rotation, code[..., :3, None]], dim=-1))[..., :3, :]
    half = torch.stack([code.new_full((), side / 2) for side in (size[1], size[0])])
    focal = half / (code[..., 7:].flip(-1) / 2).tan().clamp(min=1e-6)
    intrinsics = torch.zeros_like(rotation)
    intrinsics[..., 0, 0], intrinsics[..., 1, 1] = focal.unbind(-1)
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = size[1] / 2, size[0] / 2
    intrinsics[..., 2, 2] = 1
    return cam_from_world, intrinsics
