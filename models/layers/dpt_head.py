"""The dense prediction head (DPT, arXiv 2103.13413) in VGGT's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.kept import kept
from geoaccel.models.layers.kept_layers import KeptLayer, frames_of
from geoaccel.models.layers.outputs import HeadBytes, Outputs
from geoaccel.models.layers.rectified import Rectified, add_to, rectify

# Bilinear kernels index with 32 bits: above this many output elements the batch is split.
MAX_INTERPOLATED_ELEMENTS = 1_610_612_736


class ResidualConvUnit(nn.Module):
    """Two 3 x 3 convolutions with a rectified skip connection.

    VGGT's released network applies the ReLU in place before the skip, so the skip carries ``relu(x)``.
    """

    def __init__(self, features: int, *, rectified_skip: bool = True) -> None:
        super().__init__()
        self.rectified_skip = rectified_skip
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rectified = F.relu(x)
        added = self.conv2(rectify(self.conv1(rectified)))
        return add_to(added, rectified if self.rectified_skip else x)


class FusionBlock(nn.Module):
    """Adds the next finer features to the coarse path and resizes the sum."""

    def __init__(self, features: int, *, has_skip: bool = True, rectified_skip: bool = True) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        if has_skip:
            self.resConfUnit1 = ResidualConvUnit(features, rectified_skip=rectified_skip)
        self.resConfUnit2 = ResidualConvUnit(features, rectified_skip=rectified_skip)

    def forward(self, path: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        if skip is not None:
            path = add_to(self.resConfUnit1(skip), path)
        return self.out_conv(resize(self.resConfUnit2(path), size))


class Scratch(nn.Module):
    """Names the fusion path as the checkpoint does."""

    def __init__(self, out_channels: Sequence[int], features: int, output_dim: int | None) -> None:
        super().__init__()
        for level, channels in enumerate(out_channels, start=1):
            setattr(self, f"layer{level}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            setattr(self, f"refinenet{level}", FusionBlock(features, has_skip=level < len(out_channels)))
        if output_dim is None:
            self.output_conv1 = nn.Conv2d(features, features, 3, padding=1)
        else:
            self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
            self.output_conv2 = nn.Sequential(
                nn.Conv2d(features // 2, 32, 3, padding=1), Rectified(), nn.Conv2d(32, output_dim, 1)
            )


class DPTHead(nn.Module):
    """Per-pixel predictions from four layers of patch tokens.

    Args:
        dim: Width of the features, 2 * C.
        patch_size: Patch side in pixels.
        layers: The four layers that are read, coarsest last.
        out_channels: Channels of the four levels.
        features: Channels of the fusion path.
        activation: Applied to all output channels except the last; None for a head that returns features
            [B, S, features, H / down_ratio, W / down_ratio].
        output_dim: Output channels, the last one confidence; ignored by a feature head.
        pos_embed: Add sinusoidal position embeddings.
        down_ratio: Image size over output size.
    """

    def __init__(
        self,
        dim: int,
        *,
        patch_size: int,
        layers: Sequence[int],
        out_channels: Sequence[int],
        features: int,
        activation: Callable[[Tensor], Tensor] | None,
        output_dim: int | None = None,
        pos_embed: bool = True,
        down_ratio: int = 1,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(out_channels) != 4:
            raise UserError(f"a DPT head needs four layers; got layers {list(layers)}, channels {list(out_channels)}")
        self.patch_size = patch_size
        self.layers = tuple(layers)
        self.activation = activation
        self.pos_embed = pos_embed
        self.down_ratio = down_ratio
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in out_channels)
        self.resize_layers = level_sizes(out_channels)
        self.scratch = Scratch(out_channels, features, None if activation is None else output_dim)

    def forward(
        self,
        features: Sequence[Tensor | KeptLayer | None],  # depth x [B, S, P, 2 * C]
        images: Tensor,  # [B, S, 3, H, W]; only the size is read
        patch_start_idx: int,
        frames_chunk_size: int | None = 8,
    ) -> Tensor | tuple[Tensor, Tensor]:  # [B, S, H, W, K - 1] and [B, S, H, W]
        """Predictions and confidence (1 + exp); for a feature head, the feature maps.

        Args:
            features: Aggregator layers; only ``layers`` are read.
            images: The images.
            patch_start_idx: Where patch tokens start.
            frames_chunk_size: Frames at a time; the result does not depend on it.
        """
        batch, frames, _, height, width = images.shape
        chunk = frames if frames_chunk_size is None else frames_chunk_size
        kept = []
        for layer in self.layers:
            feature = features[layer]
            assert feature is not None, f"layer {layer} is read by this head and was not kept"
            kept.append(feature)
        # Feature maps are read again on the device; predictions may be offloaded.
        planned = isinstance(kept[0], KeptLayer)
        outputs = Outputs(frames, leave=planned and self.activation is not None)
        for start in range(0, frames, chunk):
            part = slice(start, start + chunk)
            tokens = [frames_of(feature, part)[:, :, patch_start_idx:].flatten(0, 1) for feature in kept]
            outputs.add(self.predict(tokens, (height, width)).unflatten(0, (batch, -1)))
            del tokens
        out = outputs.whole()
        if self.activation is None:
            return out
        return out[..., :-1], out[..., -1]

    def predict(
        self,
        tokens: Sequence[Tensor],  # 4 x [n, h * w, 2 * C]
        size: tuple[int, int],  # (H, W)
    ) -> Tensor:  # [n, H, W, K] activated, or [n, features, H', W']
        """Predictions for one chunk of frames."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        dtype = self.norm.weight.dtype
        pyramid = []
        for x, project, resize_layer in zip(tokens, self.projects, self.resize_layers, strict=True):
            x = self.norm(x.to(dtype)).transpose(1, 2).unflatten(-1, grid)
            pyramid.append(resize_layer(self.add_position(project(x), size)))
        path = self.fuse(pyramid)
        full = (grid[0] * self.patch_size // self.down_ratio, grid[1] * self.patch_size // self.down_ratio)
        path = self.add_position(resize(path, full), size)
        if self.activation is None:
            return path
        # exp of a bfloat16 logit is too coarse for depth: the last step is always float32.
        out = self.scratch.output_conv2(path).float().permute(0, 2, 3, 1)
        return torch.cat([self.activation(out[..., :-1]), 1 + out[..., -1:].exp()], dim=-1)

    def fuse(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Fuse from the coarsest level to twice the resolution of the finest."""
        scratch: Any = self.scratch
        level1, level2, level3, level4 = (
            getattr(scratch, f"layer{level}_rn")(x) for level, x in enumerate(pyramid, start=1)
        )
        path = scratch.refinenet4(level4, None, level3.shape[-2:])
        path = scratch.refinenet3(path, level3, level2.shape[-2:])
        path = scratch.refinenet2(path, level2, level1.shape[-2:])
        path = scratch.refinenet1(path, level1, (2 * level1.shape[-2], 2 * level1.shape[-1]))
        return scratch.output_conv1(path)

    def add_position(
        self,
        x: Tensor,  # [n, C, h, w]
        size: tuple[int, int],  # (H, W) of the image
    ) -> Tensor:
        """Add each cell's position embedding in place, if the head uses them."""
        return placed(x, size) if self.pos_embed else x


LEVEL_CELLS = (16, 4, 1, 0.25)
"""Cells per patch of each level of a DPT head."""


def fused_numbers(features: int) -> float:
    """Numbers per patch that a fusion path with these channels holds at its finest step.

    All levels, the input after ReLU and addition, the output resized, and that convolved.
    """
    return sum(LEVEL_CELLS) * features + 2 * 16 * features + 2 * 64 * features


def dpt_numbers(
    size: tuple[int, int],
    patch_size: int,
    features: int,
    out_channels: Sequence[int],
    tokens: int,
    *,
    predicts: bool = True,
) -> float:
    """Peak numbers that a head holds for a frame of H x W, given how many it reads per patch.

    A head without predictions returns maps at half the resolution.
    """
    patches = size[0] // patch_size * (size[1] // patch_size)
    held = tokens + sum(channels * cells for channels, cells in zip(out_channels, LEVEL_CELLS, strict=True))
    fused = fused_numbers(features)
    # The map at full resolution, its input before resizing, and the channels before the last layer.
    full = 64 * features / 2 + patch_size**2 * (features / 2 + 2 * 32) if predicts else 0.0
    return patches * (held + max(fused, full))


def dpt_bytes(
    size: tuple[int, int],
    patch_size: int,
    features: int,
    out_channels: Sequence[int],
    tokens: int,
    channels: Sequence[int],  # that each head predicts, confidence included
) -> HeadBytes:
    """Memory of several heads that run one after the other; other arguments as in :func:`dpt_numbers`."""
    work = dpt_numbers(size, patch_size, features, out_channels, tokens)
    pixels = 4 * size[0] * size[1]
    # The chunks of one head are concatenated while the outputs of the heads before it exist.
    joined = sum(channels) + max(channels, default=0)
    return HeadBytes(4 * work if channels else 0, pixels * sum(channels), pixels * joined)


def level_sizes(channels: Sequence[int]) -> nn.ModuleList:
    """Layers that resize the four levels of a DPT head to 4, 2, 1 and 1/2 times the patch grid."""
    return nn.ModuleList(
        [
            nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
        ]
    )


def placed(
    x: Tensor,  # [n, C, h, w]
    size: tuple[int, int],  # (H, W) of the image
) -> Tensor:
    """Add a tenth of the sinusoidal embedding of each cell's image position, in place without gradients."""
    across, down = position_codes(x.shape[1], (x.shape[-2], x.shape[-1]), size, x.dtype, x.device)
    half = len(across)
    if torch.is_grad_enabled() and x.requires_grad:
        return torch.cat([x[:, :half] + across, x[:, half:] + down], dim=1)
    x[:, :half] += across
    x[:, half:] += down
    return x


@kept
def position_codes(
    channels: int,
    grid: tuple[int, int],  # (h, w)
    size: tuple[int, int],  # (H, W) of the image
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # [channels / 2, 1, w], [channels / 2, h, 1]
    """A tenth of the sines and cosines of u, and of v, in units of half the diagonal.

    The frequencies are 100^(-2 i / (channels / 2)).
    """
    height, width = grid
    aspect = size[1] / size[0]
    diagonal = (aspect**2 + 1) ** 0.5
    span_u, span_v = aspect / diagonal * (width - 1) / width, 1 / diagonal * (height - 1) / height
    # Rounded to float32 as in the released network, float64 from here on.
    u = torch.linspace(-span_u, span_u, width, dtype=torch.float32, device=device).double()
    v = torch.linspace(-span_v, span_v, height, dtype=torch.float32, device=device).double()
    quarter = channels // 4
    omega = 1 / 100 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    across, down = (
        0.1 * torch.cat([angle.sin(), angle.cos()]).float().to(dtype)
        for angle in (omega[:, None] * u, omega[:, None] * v)
    )
    return across[:, None, :], down[:, :, None]


def resize(
    x: Tensor,  # [n, C, h, w]
    size: Sequence[int],
) -> Tensor:  # [n, C, *size]
    """Bilinear with aligned corners, in as many pieces as the kernel's index range requires."""
    elements = x.shape[0] * x.shape[1] * size[0] * size[1]
    pieces = x.chunk(elements // MAX_INTERPOLATED_ELEMENTS + 1)
    resized = [F.interpolate(piece, size=tuple(size), mode="bilinear", align_corners=True) for piece in pieces]
    return resized[0] if len(resized) == 1 else torch.cat(resized)


def inverse_log(y: Tensor) -> Tensor:
    """``sign(y) * (exp(|y|) - 1)``: linear near zero, exponential far out."""
    return torch.sign(y) * torch.expm1(y.abs())
