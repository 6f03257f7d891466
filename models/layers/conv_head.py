"""A convolutional head from patches to pixels in three upsampling steps of 2 (as in MoGe, arXiv 2410.19115).

Every 3 x 3 convolution has replicate padding; each step gets the image coordinates of every cell as input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.models.layers.rectified import Rectified

NORM_CHANNELS = 32
"""Channels per group of the second norm."""


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution with replicate padding, which keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


class ConvResidual(nn.Module):
    """Residual block of two convolutions, each after a norm and a ReLU."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels),
            Rectified(),
            conv3x3(channels, inner),
            nn.GroupNorm(max(1, inner // NORM_CHANNELS), inner),
            Rectified(),
            conv3x3(inner, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ConvHead(nn.Module):
    """Maps at image size from the tokens of one frame.

    Args:
        dim: Channels of the tokens.
        widths: Channels after each upsampling.
        outputs: Channels of each map.
        residuals: Residual blocks after each upsampling.
        inner_times: Ratio of the width inside a residual block to that outside.
        last: Channels before the last layer of each map.
    """

    def __init__(
        self, dim: int, widths: Sequence[int], outputs: Sequence[int], *, residuals: int, inner_times: int, last: int
    ) -> None:
        super().__init__()
        self.upsample_blocks = nn.ModuleList()
        for before, width in zip((dim, *widths[:-1]), widths, strict=True):
            doubled = nn.Sequential(nn.ConvTranspose2d(before + 2, width, 2, stride=2), conv3x3(width, width))
            blocks = (ConvResidual(width, inner_times * width) for _ in range(residuals))
            self.upsample_blocks.append(nn.Sequential(doubled, *blocks))
        self.output_block = nn.ModuleList(
            nn.Sequential(conv3x3(widths[-1] + 2, last), Rectified(), nn.Conv2d(last, channels, 1))
            for channels in outputs
        )

    def forward(
        self,
        tokens: Tensor,  # [n, h * w, C]
        grid: tuple[int, int],
        size: tuple[int, int],
    ) -> list[Tensor]:  # [n, channels, H, W] each
        x = tokens.to(next(self.parameters()).dtype).transpose(1, 2).unflatten(-1, grid)
        aspect = grid[1] / grid[0]
        for block in self.upsample_blocks:
            x = block(with_place(x, aspect))
        x = with_place(F.interpolate(x, size=size, mode="bilinear", align_corners=False), aspect)
        return [block(x) for block in self.output_block]


def with_place(
    x: Tensor,  # [n, C, h, w]
    aspect: float,
) -> Tensor:  # [n, C + 2, h, w]
    """The map plus two channels: the coordinates (u, v) of each cell's centre, in units of half the diagonal."""
    height, width = x.shape[-2:]
    diagonal = (1 + aspect**2) ** 0.5
    u = (2 * torch.arange(width, device=x.device, dtype=torch.float32) + 1 - width) / width * (aspect / diagonal)
    v = (2 * torch.arange(height, device=x.device, dtype=torch.float32) + 1 - height) / height / diagonal
    place = torch.stack([u.expand(height, width), v[:, None].expand(height, width)]).to(x.dtype)
    return torch.cat([x, place.expand(len(x), -1, -1, -1)], dim=1)
