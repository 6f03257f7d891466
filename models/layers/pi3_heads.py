"""pi3's heads: small transformers over the patches of one frame, and their output layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import AttentionContext
from geoaccel.errors import UserError
from geoaccel.models.layers.block import Block
from geoaccel.precision import own_precision


class HeadDecoder(nn.Module):
    """Linear, frame-wise transformer blocks, linear."""

    def __init__(self, dim_in: int, dim: int, dim_out: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.projects = nn.Linear(dim_in, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, norm_eps=1e-6, layer_scale=None) for _ in range(depth))
        self.linear_out = nn.Linear(dim, dim_out)

    def forward(
        self,
        features: Tensor,  # [n, P, 2 * C]
        rope: tuple[Tensor, Tensor],  # tables of one frame
    ) -> Tensor:  # [n, P, dim_out]
        x = self.projects(features.to(self.projects.weight.dtype))
        for index, block in enumerate(self.blocks):
            x = block(x, AttentionContext("head", index, rope=rope))
        return self.linear_out(x)


class PixelHead(nn.Module):
    """A linear layer that predicts every pixel of a patch."""

    def __init__(self, dim: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, channels * patch_size**2)

    def forward(
        self,
        tokens: Tensor,  # [n, h * w, C], patches only
        grid: tuple[int, int],
    ) -> Tensor:  # [n, H, W, channels]
        patches = self.proj(tokens.to(self.proj.weight.dtype)).transpose(1, 2).unflatten(-1, grid)
        return F.pixel_shuffle(patches, self.patch_size).permute(0, 2, 3, 1)


class ResidualMlp(nn.Module):
    """Three rectified linear layers and a skip."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Linear(dim, dim)
        self.res_conv2 = nn.Linear(dim, dim)
        self.res_conv3 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.res_conv1(x))
        y = F.relu(self.res_conv2(y))
        return x + F.relu(self.res_conv3(y))


class PoseHead(nn.Module):
    """Pose of each frame from the mean over its patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList(ResidualMlp(dim) for _ in range(2))
        self.more_mlps = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        self.fc_t = nn.Linear(dim, 3)
        self.fc_rot = nn.Linear(dim, 9)

    def forward(
        self,
        tokens: Tensor,  # [n, h * w, C], patches only
    ) -> Tensor:  # [n, 4, 4] world_from_cam, float32
        return self.poses(self.numbers(tokens))

    def numbers(
        self,
        tokens: Tensor,  # [n, h * w, C], patches only
    ) -> Tensor:  # [n, 3, 4], float32
        """An unorthogonalised rotation matrix, and the translation."""
        with own_precision(tokens.device):
            x = tokens.to(self.fc_t.weight.dtype)
            for block in self.res_conv:
                x = block(x)
            x = self.more_mlps(x.mean(dim=1))
            return torch.cat([self.fc_rot(x).float().unflatten(-1, (3, 3)), self.fc_t(x).float()[..., None]], dim=-1)

    def poses(
        self,
        numbers: Tensor,  # [n, 3, 4]
    ) -> Tensor:  # [n, 4, 4] world_from_cam, float32
        """Poses of all frames at once: finding rotations synchronises host and device."""
        pose = F.pad(numbers, (0, 0, 0, 1))
        with own_precision(numbers.device):
            pose[:, :3, :3] = nearest_rotation(numbers[..., :3])
        pose[:, 3, 3] = 1
        return pose


def nearest_rotation(
    matrix: Tensor,  # [n, 3, 3]
) -> Tensor:  # [n, 3, 3]
    """The rotation closest to a matrix with normalised rows (Levinson et al., arXiv 2006.14616).

    Raises:
        UserError: If a matrix is not finite: broken weights, or too narrow a precision.
    """
    try:
        u, _, vh = torch.linalg.svd(F.normalize(matrix, dim=-1))
    except torch.linalg.LinAlgError:
        raise UserError(
            "the model predicted camera rotations with NaN or infinite values: its weights are broken or its precision "
            "is too low; try dtype=torch.float32 and an unaccelerated model"
        ) from None
    sign = torch.det(u @ vh)
    flip = torch.stack([torch.ones_like(sign), torch.ones_like(sign), sign], dim=-1)
    return (u * flip[:, None]) @ vh
