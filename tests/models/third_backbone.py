"""A third backbone in one file: one transformer whose later blocks see the whole scene, with names of its own.

Its patches have 16 pixels, it has one special token, and the slot for a packer is the network's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.attention import ForwardState, Packer
from geoaccel.backbone import Backbone, FeatureStream, Geometry, Preprocess, register
from geoaccel.cameras import to_homogeneous, unproject_depth
from geoaccel.cost import Trunk
from geoaccel.errors import UserError
from geoaccel.layout import TokenLayout
from geoaccel.models.layers.block import Block
from geoaccel.models.layers.camera_head import POSE_SIZE, decode_pose
from geoaccel.models.layers.encoder import PatchEmbed, check_images
from geoaccel.models.layers.pi3_heads import PixelHead
from geoaccel.models.layers.stream import TokenStream, alternate
from geoaccel.models.network import Network
from geoaccel.network_config import NetworkConfig
from geoaccel.precision import own_precision

HEADS = ("pose", "surface")


@dataclass(frozen=True, kw_only=True)
class ThirdConfig(NetworkConfig):
    """Sizes: ``within`` blocks see one frame, then ``pairs`` of blocks see one frame and the whole scene in turn."""

    patch_size: int = 16
    width: int = 32
    num_heads: int = 2
    within: int = 2
    pairs: int = 3
    layer_scale: float = 0.3


class Third(Network):
    config: ThirdConfig
    token_packer: Packer | None

    def __init__(self, config: ThirdConfig) -> None:
        super().__init__(config)
        c = config

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(c.width, c.num_heads, layer_scale=c.layer_scale) for _ in range(count))

        self.mosaic = PatchEmbed(c.patch_size, c.width)
        self.eye = nn.Parameter(torch.randn(1, 1, 1, c.width))
        self.inside, self.mixed = blocks(c.within), blocks(2 * c.pairs)
        self.pose = nn.Linear(c.width, POSE_SIZE)
        self.surface = PixelHead(c.width, c.patch_size, 2)
        self.token_packer = None

    @property
    def heads(self) -> tuple[str, ...]:
        return HEADS

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess("crop", 4 * self.config.patch_size, self.config.patch_size)

    @property
    def trunk(self) -> Trunk:
        c = self.config
        return Trunk(c.width, c.patch_size, c.within, c.pairs, c.pairs, encoder_special=1, special=1)

    def activation_bytes(self, frames: int, size: tuple[int, int], **_: Any) -> int:
        tokens = frames * (1 + size[0] * size[1] // self.config.patch_size**2)
        return 4 * 18 * tokens * self.config.width + frames * size[0] * size[1] * 2 * 4

    def forward(self, images: Tensor, *, heads: Collection[str] | None = None) -> dict[str, Tensor]:
        images = images[None] if images.ndim == 4 else images
        wanted = self.chosen(heads)
        return self.predict(self.layers(images)[-1], images, wanted)

    def layers(self, images: Tensor) -> list[Tensor]:  # pairs x [B, S, P, C]
        """Tokens behind every block that sees the whole scene."""
        grid, patch = check_images(images, self.config.patch_size), self.mosaic.proj.weight
        x = self.mosaic(images.flatten(0, 1).to(patch.dtype)).unflatten(0, images.shape[:2])
        x = torch.cat([self.eye.expand(*images.shape[:2], -1, -1), x], dim=2)
        stream = TokenStream(x, TokenLayout(*images.shape[:2], grid, 1), state=ForwardState(images))
        for index, block in enumerate(self.inside):
            stream = stream.through(block, "encoder", index)
            if self.token_packer is not None and self.token_packer.layer == index:
                stream = stream.packed_by(self.token_packer)
        if stream.packing is None:
            stream.state.patches = stream.x[:, :, 1:]
        stream = stream.enter(stream.dense()[:, :, :1], self.config.width // self.config.num_heads, 100.0)
        kinds = (("frame", "global")[index % 2] for index in range(len(self.mixed)))
        return [step.dense() for step in alternate(stream, zip(kinds, self.mixed, strict=True))][1::2]

    def predict(self, tokens: Tensor, images: Tensor, heads: Collection[str]) -> dict[str, Tensor]:
        out = {}
        with own_precision(images.device):
            if "pose" in heads:
                out["view"] = self.pose(tokens[:, :, 0].to(self.pose.weight.dtype)).float()
            if "surface" in heads:
                grid = tuple(side // self.config.patch_size for side in images.shape[-2:])
                maps = self.surface(tokens[:, :, 1:].flatten(0, 1), grid).float().unflatten(0, images.shape[:2])
                out["distance"], out["sure"] = maps[..., 0].exp(), maps[..., 1].sigmoid()
        return out


def geometry(predictions: Mapping[str, Tensor], size: tuple[int, int]) -> Geometry:
    view = predictions["view"].clone()
    view[..., 6:] = view[..., 6:].abs() + 0.5  # a quaternion and a field of view, whatever the weights
    extrinsics, intrinsics = decode_pose(view, size)
    depth, cam_from_world = predictions["distance"], to_homogeneous(extrinsics)
    return Geometry(
        cam_from_world, intrinsics, depth, unproject_depth(depth, intrinsics, cam_from_world), predictions["sure"]
    )


def config_from_module(module: nn.Module) -> dict[str, Any]:
    m: Any = module
    attention = m.mixed[0].attn
    return {
        "patch_size": m.mosaic.proj.kernel_size[0],
        "width": m.eye.shape[-1],
        "num_heads": attention.num_heads,
        "within": len(m.inside),
        "pairs": len(m.mixed) // 2,
    }


def sites(module: nn.Module) -> dict[str, list[nn.Module]]:
    m: Any = module
    named = {"encoder": m.inside, "frame": m.mixed[::2], "global": m.mixed[1::2]}
    return {kind: [block.attn for block in blocks] for kind, blocks in named.items()}


def layer_of(model: Third, layer: int | None) -> int:
    pairs = model.config.pairs
    if layer is not None and not -pairs <= layer < pairs:
        raise UserError(f"layer={layer} does not exist: {pairs} layers")
    return (-1 if layer is None else layer) % pairs


def read(model: Third, images: Tensor, layer: int, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    layers = model.layers(images)
    return layers[layer], model.predict(layers[-1], images, HEADS) if predict else {}


BACKBONE = register(
    Backbone(
        name="third",
        network=Third,
        config=ThirdConfig,
        tiny=ThirdConfig(),
        class_names=("ThirdNet",),
        children=("mosaic", "inside", "mixed", "pose", "surface"),
        config_from_names=lambda names: {},
        config_from_module=config_from_module,
        geometry=geometry,
        sites=sites,
        patch_embedding="mosaic.proj",
        quantizable=("inside.*", "mixed.*"),
        heads_in_float32=("pose", "surface"),
        features=FeatureStream(layer_of, read),
    )
)
