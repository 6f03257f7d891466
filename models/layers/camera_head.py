"""VGGT's camera head and its pose encoding (arXiv 2503.11651, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.models.layers.block import Block, Mlp

POSE_SIZE = 9  # translation 3, quaternion 4 (scalar last), vertical and horizontal field of view


class CameraHead(nn.Module):
    """Refines a 9-number pose encoding per frame from the camera token of the last layer.

    Args:
        dim: Width of the features, 2 * C.
        num_heads: Attention heads of the trunk.
        trunk_depth: Blocks of the trunk.
        layer_scale: Initial residual factor of the trunk.
    """

    def __init__(self, dim: int, num_heads: int, trunk_depth: int = 4, layer_scale: float = 0.01) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Block(dim, num_heads, layer_scale=layer_scale) for _ in range(trunk_depth))
        self.token_norm = nn.LayerNorm(dim)
        self.trunk_norm = nn.LayerNorm(dim)
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, POSE_SIZE))
        self.embed_pose = nn.Linear(POSE_SIZE, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.pose_branch = Mlp(dim, dim // 2, POSE_SIZE)

    def forward(
        self,
        features: Sequence[Tensor | None],  # depth x [B, S, P, 2 * C]; only the last is read
        num_iterations: int = 4,
    ) -> list[Tensor]:  # num_iterations x [B, S, 9]
        """Pose encodings after each refinement.

        The frames of a scene attend to each other in the trunk; each iteration gets the previous estimate detached.
        """
        last = features[-1]
        assert last is not None, "the camera head reads the last layer"
        tokens = self.token_norm(last[:, :, 0].to(self.embed_pose.weight.dtype))
        normed = self.adaln_norm(tokens)
        estimate = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        total: Tensor | None = None
        poses = []
        for _ in range(num_iterations):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(estimate)).chunk(3, dim=-1)
            x = tokens + gate * (normed * (1 + scale) + shift)
            for index, block in enumerate(self.trunk):
                x = block(x, AttentionContext("head", index))
            delta = self.pose_branch(self.trunk_norm(x))
            total = delta if total is None else estimate + delta
            estimate = total.detach()
            poses.append(torch.cat([total[..., :7], F.relu(total[..., 7:])], dim=-1))
        return poses


def quaternion_to_rotation(
    quaternion: Tensor,  # [..., 4], scalar last, any length
) -> Tensor:  # [..., 3, 3]
    """Rotation matrices; the quaternion need not have unit length."""
    x, y, z, w = quaternion.unbind(-1)
    two = 2.0 / quaternion.square().sum(-1)
    rows = [
        1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w),
        two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w),
        two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def rotation_to_quaternion(
    rotation: Tensor,  # [..., 3, 3]
) -> Tensor:  # [..., 4], scalar last, scalar part not negative
    """Unit quaternions, stable for every angle.

    Of the four possible divisions, the one with the largest denominator is used.
    """
    m = rotation
    trace = m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2]
    diagonal = torch.diagonal(m, dim1=-2, dim2=-1)
    # Four times the squares of (x, y, z, w).
    squares = torch.cat([1 + 2 * diagonal - trace[..., None], 1 + trace[..., None]], dim=-1)
    yz, zx, xy = m[..., 2, 1] + m[..., 1, 2], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 0] + m[..., 0, 1]
    xw, yw, zw = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    # Row i is 4 * q_i * (x, y, z, w).
    candidates = torch.stack(
        [
            torch.stack([squares[..., 0], xy, zx, xw], dim=-1),
            torch.stack([xy, squares[..., 1], yz, yw], dim=-1),
            torch.stack([zx, yz, squares[..., 2], zw], dim=-1),
            torch.stack([xw, yw, zw, squares[..., 3]], dim=-1),
        ],
        dim=-2,
    )
    best = squares.argmax(dim=-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = F.normalize(candidates.gather(-2, best)[..., 0, :], dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def encode_pose(
    cam_from_world: Tensor,  # [..., 3|4, 4]
    intrinsics: Tensor,  # [..., 3, 3], pixels
    size: tuple[int, int],  # (H, W)
) -> Tensor:  # [..., 9]
    """VGGT's ``absT_quaR_FoV``: translation, scalar-last quaternion, vertical and horizontal field of view (rad).

    The principal point is not encoded; decoding puts it at the centre.
    """
    height, width = size
    fov_y = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_x = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = rotation_to_quaternion(cam_from_world[..., :3, :3])
    return torch.cat([cam_from_world[..., :3, 3], quaternion, torch.stack([fov_y, fov_x], dim=-1)], dim=-1)


def decode_pose(
    encoding: Tensor,  # [..., 9]
    size: tuple[int, int],  # (H, W)
) -> tuple[Tensor, Tensor]:  # [..., 3, 4], [..., 3, 3]
    """``cam_from_world`` and intrinsics in pixels, the principal point at (W / 2, H / 2)."""
    height, width = size
    rotation = quaternion_to_rotation(encoding[..., 3:7])
    cam_from_world = torch.cat([rotation, encoding[..., :3, None]], dim=-1)
    intrinsics = torch.zeros_like(rotation)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(encoding[..., 8] / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(encoding[..., 7] / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return cam_from_world, intrinsics
