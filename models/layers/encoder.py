"""DINOv2 (arXiv 2304.07193) with registers (arXiv 2309.16588), the backbones' encoder of images and depth maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.attention import AttentionContext, ForwardState, Packer
from geoaccel.errors import UserError, UserTypeError
from geoaccel.kept import kept
from geoaccel.layout import TokenLayout
from geoaccel.memory_plan import MemoryPlan
from geoaccel.models.layers.block import Block, blocks_of
from geoaccel.models.layers.normalised_frames import NormalisedFrames, embedded, normalised_by
from geoaccel.models.layers.stream import TokenStream
from geoaccel.reference import Chooser

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@kept
def _statistics(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:  # [3, 1, 1] each
    def filled(values: tuple[float, ...]) -> Tensor:  # created on the device: a copy would synchronise
        return torch.stack([torch.full((1, 1), value, dtype=dtype, device=device) for value in values])

    return filled(IMAGENET_MEAN), filled(IMAGENET_STD)


def normalised(
    images: Tensor,  # [..., 3, H, W] in [0, 1]
) -> Tensor:
    """Images normalised by ImageNet's mean and standard deviation."""
    mean, std = _statistics(images.dtype, images.device)
    return (images - mean) / std


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution."""

    def __init__(self, patch_size: int, dim: int, channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(
        self,
        images: Tensor,  # [n, channels, H, W]
    ) -> Tensor:  # [n, h * w, C]
        return self.proj(images).flatten(2).transpose(1, 2)


class DinoTokens(nn.Module):
    """The transformer: its parameters, and the tokens that enter its blocks.

    Args:
        img_size: Side in pixels of the square grid that the position embedding was learned on.
        patch_size: Patch side in pixels.
        dim: Width C.
        depth: Number of blocks.
        num_heads: Attention heads.
        mask_token: Have the unused parameter of that name, as in VGGT's checkpoint and not in pi3's.
        channels: Input channels.
    """

    num_registers = 4

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        *,
        mask_token: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        side = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, self.num_registers, dim))
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads, norm_eps=1e-6, layer_scale=1.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.normal_(self.register_tokens, std=1e-6)

    def embed(
        self,
        images: Tensor,  # [n, channels, H, W]
    ) -> Tensor:  # [n, 1 + 4 + h * w, C]
        """Class token, registers and patches, plus the position embedding."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        x = self.patch_embed(images)
        position = self.position_embedding(height, width).to(x.dtype)
        cls_token = (self.cls_token + position[:, :1]).expand(len(x), -1, -1)
        registers = self.register_tokens.expand(len(x), -1, -1)
        return torch.cat([cls_token.to(x.dtype), registers.to(x.dtype), x + position[:, 1:]], dim=1)

    def position_embedding(self, height: int, width: int) -> Tensor:  # [1, 1 + h * w, C]
        """The learned embedding, resized (bicubic, antialiased) to another grid."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().transpose(1, 2).unflatten(-1, (side, side))
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)], dim=1)


class DinoEncoder(DinoTokens):
    """Patch tokens of normalised images, with a slot for a method that merges tokens after it; arguments as above.

    The slot ``reference`` determines the order of the output frames (:mod:`geoaccel.reference`); None: unchanged. The
    slot ``memory_plan`` says how the whole forward keeps within a memory limit; only without gradients.
    """

    token_packer: Packer | None
    reference: Chooser | None
    memory_plan: MemoryPlan | None

    def __init__(self, *sizes: int, mask_token: bool) -> None:
        super().__init__(*sizes, mask_token=mask_token)
        self.token_packer = None
        self.reference = None
        self.memory_plan = None

    def normalised(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        change: Callable[[Tensor], Tensor],
    ) -> Tensor | NormalisedFrames:
        """Input of :meth:`forward`: images normalised by ``change``, with a plan a few frames at a time."""
        return normalised_by(images, change, self.memory_plan, self.pos_embed.device)

    def forward(
        self,
        images: Tensor | NormalisedFrames,  # [B, S, 3, H, W], normalised
    ) -> TokenStream:
        """Encode every image separately: class token, registers and patches, normalised.

        The stream's state holds the images and, unless a packer merged tokens, the patches.
        """
        plan = None if isinstance(images, Tensor) else self.memory_plan
        state = ForwardState(images, plan=plan)
        height, width = (side // self.patch_size for side in images.shape[-2:])
        layout = TokenLayout(images.shape[0], images.shape[1], (height, width), 1 + self.num_registers)
        # Nothing else may hold the first tokens, otherwise they stay alive while the encoder runs.
        stream = TokenStream(embedded(images, self.embed, plan, layout), layout, state=state)
        for index, block in enumerate(blocks_of(self.blocks)):
            stream = stream.through(block, "encoder", index)
            if self.token_packer is not None and index == self.token_packer.layer:
                stream = self._reordered(stream).packed_by(self.token_packer)  # packed rows cannot be reordered
        stream = stream.each(self.norm)
        if self.token_packer is None:
            stream = self._reordered(stream)
        if stream.packing is None:
            state.patches = stream.x[:, :, layout.num_special :]
        return stream

    def _reordered(self, stream: TokenStream) -> TokenStream:
        """The frames in the order that the slot ``reference`` determines."""
        if self.reference is None:
            return stream
        order = self.reference(stream.x[:, :, stream.layout.num_special :], stream.layout.grid)
        if order is None:
            return stream
        images = stream.state.images
        if isinstance(images, Tensor):
            stream.state.images = images[:, order.to(stream.x.device)]
        elif isinstance(images, NormalisedFrames):
            stream.state.images = images.reordered(order)
        return replace(stream, x=stream.x[:, order.to(stream.x.device)])


class MapEncoder(DinoTokens):
    """Patch tokens of other maps, such as depth, each map encoded separately."""

    def forward(
        self,
        maps: Tensor,  # [n, channels, H, W]
    ) -> Tensor:  # [n, h * w, C]
        x = self.embed(maps)
        for index, block in enumerate(blocks_of(self.blocks)):
            x = block(x, AttentionContext("head", index))
        return self.norm(x)[:, 1 + self.num_registers :]


def in_batch(images: Tensor) -> Tensor:
    """Images [B, S, 3, H, W]; one scene [S, 3, H, W] becomes a batch of one.

    Raises:
        TypeError: If they are not a tensor.
    """
    if not isinstance(images, Tensor):
        raise UserTypeError(
            f"got a {type(images).__name__} as images; give a tensor [B, S, 3, H, W] (or [S, 3, H, W]) of floats in "
            "[0, 1]; geoaccel.reconstruct takes files and arrays"
        )
    return images[None] if images.ndim == 4 else images


def check_images(images: Tensor, patch_size: int) -> tuple[int, int]:
    """Validate the input [B, S, 3, H, W] of a network and return its patch grid (h, w).

    Raises:
        ValueError: If the shape is wrong or empty, H or W is not a multiple of the patch size, or the values are
            integers, NaN or infinite.
    """
    if not images.is_floating_point():
        raise UserError(f"expected images as floats in [0, 1], got {images.dtype}; divide by 255")
    if images.ndim != 5 or images.shape[2] != 3:
        raise UserError(f"expected images [B, S, 3, H, W] (or [S, 3, H, W]), got {list(images.shape)}")
    if 0 in images.shape[:2]:
        raise UserError(f"images {list(images.shape)} are empty; give at least one scene with at least one image")
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise UserError(
            f"image size {height} x {width} is not a multiple of the patch size {patch_size}; "
            f"resize to {max(1, height // patch_size) * patch_size} x {max(1, width // patch_size) * patch_size}"
        )
    _check_finite(images)
    return height // patch_size, width // patch_size


def _check_finite(images: Tensor) -> None:
    """Reject NaN and infinity: one such pixel spreads to all frames, and similarities of NaN merge at random."""
    if torch.compiler.is_compiling() or images.is_meta or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
        return  # no values yet
    # A sum reads the images once and allocates no mask.
    if math.isfinite(float(images.detach().sum(dtype=torch.float32))):
        return
    bad = (~images.isfinite()).flatten(2).any(-1).nonzero()
    if len(bad):
        scene, frame = bad[0].tolist()
        raise UserError(f"image {frame} of scene {scene} holds NaN or infinite values; leave it out or repair it")
