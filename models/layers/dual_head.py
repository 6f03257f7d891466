"""Depth Anything 3's dense head: DPT (arXiv 2103.13413) with two fusion paths, for depth and for rays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from geoaccel.errors import UserError
from geoaccel.models.layers.dpt_head import LEVEL_CELLS, FusionBlock, fused_numbers, level_sizes, placed, resize
from geoaccel.models.layers.outputs import HeadBytes
from geoaccel.models.layers.rectified import Rectified

RAY_CHANNELS = 7  # direction, origin, confidence


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(
        self,
        x: Tensor,  # [n, C, h, w]
    ) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def ray_stem(features: int) -> nn.Sequential:
    """Five convolutions with nothing between them."""
    half = features // 2
    widths = (features, half, features, half, features, half)
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))


def ray_output(features: int) -> nn.Sequential:
    """From a stem to rays; at indices 1 and 3 the released network permutes axes."""
    return nn.Sequential(
        nn.Conv2d(features // 2, 32, 3, padding=1),
        nn.Identity(),
        ChannelNorm(32),
        nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(32, RAY_CHANNELS, 1),
    )


class DualScratch(nn.Module):
    """Names both fusion paths as the checkpoint does.

    Stems and outputs of the first three ray levels are in the checkpoint but unused.
    """

    def __init__(self, out_channels: Sequence[int], features: int) -> None:
        super().__init__()
        for level, channels in enumerate(out_channels, start=1):
            setattr(self, f"layer{level}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            for path in ("", "_aux"):
                fusion = FusionBlock(features, has_skip=level < len(out_channels), rectified_skip=False)
                setattr(self, f"refinenet{level}{path}", fusion)
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(nn.Conv2d(features // 2, 32, 3, padding=1), Rectified(), nn.Conv2d(32, 2, 1))
        self.output_conv1_aux = nn.ModuleList(ray_stem(features) for _ in out_channels)
        self.output_conv2_aux = nn.ModuleList(ray_output(features) for _ in out_channels)


class DualHead(nn.Module):
    """Depth at image size, and rays at eight times the patch grid.

    Args:
        dim: Width of the features, 2 * C.
        patch_size: Patch side in pixels.
        features: Channels of the fusion paths.
        out_channels: Channels of the four levels.
    """

    def __init__(self, dim: int, *, patch_size: int, features: int, out_channels: Sequence[int]) -> None:
        super().__init__()
        if len(out_channels) != 4:
            raise UserError(f"a DPT head needs channels for four levels; got {list(out_channels)}")
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(dim)
        self.projects = nn.ModuleList(nn.Conv2d(dim, channels, 1) for channels in out_channels)
        self.resize_layers = level_sizes(out_channels)
        self.scratch = DualScratch(out_channels, features)

    def forward(
        self,
        tokens: Sequence[Tensor],  # 4 x [n, h * w, 2 * C]
        size: tuple[int, int],  # (H, W)
        heads: Collection[str],
    ) -> dict[str, Tensor]:
        """For one chunk of frames, ``depth`` and ``depth_conf`` [n, H, W], ``ray`` [n, 8h, 8w, 6] and ``ray_conf``.

        Args:
            tokens: Patch tokens of four layers.
            size: Image size.
            heads: Heads to run, of ``depth`` and ``ray``.
        """
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        dtype = self.norm.weight.dtype
        scratch: Any = self.scratch
        levels = []
        for number, (x, project, resize_layer) in enumerate(
            zip(tokens, self.projects, self.resize_layers, strict=True), start=1
        ):
            x = project(self.norm(x.to(dtype)).transpose(1, 2).unflatten(-1, grid))
            levels.append(getattr(scratch, f"layer{number}_rn")(resize_layer(placed(x, size))))
        found = self.depth(levels, size) if "depth" in heads else {}
        return found | (self.rays(levels, size) if "ray" in heads else {})

    def depth(self, levels: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """``depth`` and ``depth_conf`` [n, H, W]."""
        scratch: Any = self.scratch
        x = resize(scratch.output_conv1(self.fuse(levels, "")), size)
        depth, conf = scratch.output_conv2(placed(x, size)).float().unbind(1)
        return {"depth": depth.exp(), "depth_conf": conf.exp() + 1}

    def rays(self, levels: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """``ray`` [n, 8h, 8w, 6] and ``ray_conf`` [n, 8h, 8w]."""
        scratch: Any = self.scratch
        x = scratch.output_conv1_aux[-1](self.fuse(levels, "_aux"))
        x = scratch.output_conv2_aux[-1](placed(x, size)).float().movedim(1, -1)
        return {"ray": x[..., :6], "ray_conf": x[..., 6].exp() + 1}

    def fuse(self, levels: Sequence[Tensor], path: str) -> Tensor:
        """Fuse from the coarsest level to twice the resolution of the finest."""
        scratch: Any = self.scratch
        x = levels[-1]
        for number in (4, 3, 2, 1):
            finer = levels[number - 2].shape[-2:] if number > 1 else [2 * side for side in x.shape[-2:]]
            skip = levels[number - 1] if number < 4 else None
            x = getattr(scratch, f"refinenet{number}{path}")(x, skip, finer)
        return x


def dual_bytes(
    size: tuple[int, int],
    patch_size: int,
    features: int,
    tokens: int,
    heads: Collection[str],
) -> HeadBytes:
    """Memory of the head in float32, for frames of H x W.

    Args:
        size: (H, W).
        patch_size: In pixels.
        features: Channels of the fusion paths.
        tokens: Numbers read per patch.
        heads: Heads to run, of ``depth`` and ``ray``.
    """
    if not {"depth", "ray"} & set(heads):
        return HeadBytes(0, 0, 0)
    patches, pixels = size[0] // patch_size * (size[1] // patch_size), size[0] * size[1]
    most = fused_numbers(features)
    if "depth" in heads:
        # The levels, from which rays are made afterwards, and the map at full resolution with its input before
        # resizing, or with the channels before the last layer.
        beside = max(64 * features / 2, patch_size**2 * 32)
        most = max(most, sum(LEVEL_CELLS) * features + patch_size**2 * features / 2 + beside)
    outputs = (2 * pixels if "depth" in heads else 0) + (64 * patches * (RAY_CHANNELS + 1) if "ray" in heads else 0)
    return HeadBytes(4 * patches * (tokens + most), 4 * outputs, 2 * 4 * outputs)
