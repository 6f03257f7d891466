"""pi3: permutation-equivariant visual geometry learning (Wang et al., arXiv 2507.13347).

Predicts local points, confidence and poses from images of one scene in one pass, with no reference view: permuting the
images permutes the outputs. Our own implementation with upstream's parameter names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import Backbone, FeatureStream, Geometry, Origin, Preprocess, Split, register
from geoaccel.cameras import invert_rigid, transform_points
from geoaccel.cost import Trunk
from geoaccel.errors import UserError
from geoaccel.layout import AttentionKind
from geoaccel.models.last_features import feature_layer, read_features
from geoaccel.models.layers.block import Block, blocks_of
from geoaccel.models.layers.encoder import IMAGENET_MEAN, IMAGENET_STD, DinoEncoder, check_images, in_batch
from geoaccel.models.layers.kept_layers import KeptLayer
from geoaccel.models.layers.outputs import HeadBytes, in_chunks
from geoaccel.models.layers.pi3_heads import HeadDecoder, PixelHead, PoseHead
from geoaccel.models.layers.rope import frame_tables
from geoaccel.models.layers.stream import TokenStream, alternate, last_two
from geoaccel.models.planned_network import PlannedNetwork
from geoaccel.models.robust import recover_focal
from geoaccel.models.upstream import encoder_sizes, rope_base
from geoaccel.network_config import NetworkConfig
from geoaccel.precision import own_precision

HEADS = ("point", "conf", "camera")


@dataclass(frozen=True, kw_only=True)
class Pi3Config(NetworkConfig):
    """Sizes; the defaults are those of the published checkpoint.

    Attributes:
        img_size: Side in pixels of the square images that the position embedding was learned on.
        patch_size: Patch side in pixels.
        vit_dim, vit_depth, vit_num_heads: Width, blocks and heads of the encoder.
        decoder_dim, decoder_depth, decoder_num_heads: The same of the decoder; blocks alternate frame, global.
        head_decoder_dim, head_decoder_depth, head_decoder_num_heads: The same of the three head decoders.
        camera_dim: Width of the pose head.
        num_register_tokens: Special tokens per frame.
        rope_frequency: Base of the rotary embedding.
        layer_scale: Initial factor of the decoder's residual branches.
    """

    may_be_zero = ("num_register_tokens",)

    img_size: int = 518
    patch_size: int = 14
    vit_dim: int = 1024
    vit_depth: int = 24
    vit_num_heads: int = 16
    decoder_dim: int = 1024
    decoder_depth: int = 36
    decoder_num_heads: int = 16
    head_decoder_dim: int = 1024
    head_decoder_depth: int = 5
    head_decoder_num_heads: int = 16
    camera_dim: int = 512
    num_register_tokens: int = 5
    rope_frequency: float = 100
    layer_scale: float = 0.01

    def check(self) -> None:
        if self.vit_dim != self.decoder_dim or self.decoder_depth % 2:
            raise UserError(
                f"vit_dim must equal decoder_dim, and decoder_depth must be even; got {self.vit_dim}, "
                f"{self.decoder_dim} and {self.decoder_depth}"
            )


class Pi3(PlannedNetwork):
    """The network, at any size."""

    config: Pi3Config
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: Pi3Config) -> None:
        super().__init__(config)
        c = config
        self.patch_size = c.patch_size
        self.rope_frequency = float(c.rope_frequency)
        self.encoder = DinoEncoder(c.img_size, c.patch_size, c.vit_dim, c.vit_depth, c.vit_num_heads, mask_token=False)
        self.decoder = nn.ModuleList(
            Block(c.decoder_dim, c.decoder_num_heads, qk_norm=True, norm_eps=1e-6, layer_scale=c.layer_scale)
            for _ in range(c.decoder_depth)
        )
        self.register_token = nn.Parameter(torch.empty(1, 1, c.num_register_tokens, c.decoder_dim))
        nn.init.normal_(self.register_token, std=1e-6)

        self.add_heads()
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def add_heads(self) -> None:
        """Make everything after the decoder."""
        c = self.config
        self.point_decoder = self.head_decoder(c.head_decoder_dim)
        self.point_head: nn.Module = PixelHead(c.head_decoder_dim, c.patch_size, 3)
        self.conf_decoder = self.head_decoder(c.head_decoder_dim)
        self.conf_head: nn.Module = PixelHead(c.head_decoder_dim, c.patch_size, 1)
        self.camera_decoder = self.head_decoder(c.camera_dim)
        self.camera_head = PoseHead(c.camera_dim)

    def head_decoder(self, dim_out: int) -> HeadDecoder:
        """A transformer over the patches of one frame."""
        c = self.config
        return HeadDecoder(
            2 * c.decoder_dim, c.head_decoder_dim, dim_out, c.head_decoder_depth, c.head_decoder_num_heads
        )

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that this network has."""
        return HEADS

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared for this network."""
        # The released code allows 255,000 pixels with a position embedding for 518: 0.95 of the square's area.
        side = self.config.img_size
        return Preprocess("budget", side, self.patch_size, max_pixels=round(255_000 * (side / 518) ** 2))

    @property
    def trunk(self) -> Trunk:
        """Sizes of everything but the heads."""
        return Trunk(
            width=self.config.decoder_dim,
            patch_size=self.patch_size,
            encoder_blocks=self.config.vit_depth,
            frame_blocks=self.config.decoder_depth // 2,
            global_blocks=self.config.decoder_depth // 2,
            encoder_special=1 + self.encoder.num_registers,
            special=self.register_token.shape[2],
        )

    def kept_layers(self, heads: Collection[str]) -> int:
        return 1

    def head_bytes(self, size: tuple[int, int], heads: Collection[str]) -> HeadBytes:
        c = self.config
        tokens = size[0] // self.patch_size * (size[1] // self.patch_size) + c.num_register_tokens
        element, pixels = self.register_token.element_size(), 4 * size[0] * size[1]
        # A block of a head decoder, its MLP four times as wide, and the features; or the pixels of its patches.
        work = tokens * (11 * c.head_decoder_dim + 2 * c.decoder_dim) * element
        own = (3 if "point" in heads else 0) + (1 if "conf" in heads else 0)
        world = 3 if {"point", "camera"} <= set(heads) else 0
        # World points: the predicted ones, the rotated ones, and the translated ones.
        return HeadBytes(max(work, pixels * 3 * own), pixels * (own + world), pixels * max(2 * own, own + 2 * world))

    def features(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
    ) -> Tensor | KeptLayer:  # [B, S, P, 2 * C]
        """Outputs of the last frame block and the last global block, concatenated."""
        check_images(images, self.patch_size)
        stream, blocks = self.enter(self.encode(images)), self.decoder_blocks()
        steps = alternate(stream, blocks)
        del stream  # otherwise its tokens stay alive while the decoder runs
        return last_two(steps, len(blocks))

    def encode(self, images: Tensor) -> TokenStream:  # [B, S, 3, H, W] in [0, 1]
        """The encoder's tokens."""

        def normalised(part: Tensor) -> Tensor:
            return ((part - self.image_mean) / self.image_std).to(self.register_token.dtype)

        return self.encoder(self.encoder.normalised(images, normalised))

    def enter(self, encoded: TokenStream) -> TokenStream:
        """The input tokens of the decoder: registers and patches."""
        registers = self.register_token.expand(encoded.layout.batch, encoded.layout.frames, -1, -1).to(encoded.x.dtype)
        return encoded.enter(registers, self.config.decoder_dim // self.config.decoder_num_heads, self.rope_frequency)

    def decoder_blocks(self) -> list[tuple[AttentionKind, Block]]:
        """The decoder's blocks, each with its kind."""
        return [("global" if index % 2 else "frame", block) for index, block in enumerate(blocks_of(self.decoder))]

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
        *,
        heads: Collection[str] | None = None,
        frames_chunk_size: int = 8,
    ) -> dict[str, Tensor]:
        """Run the heads; outputs have upstream's names.

        Upstream runs the head decoders in the caller's autocast and the final layers in float32; so does this.

        Args:
            images: Images of one scene in any order; H and W are multiples of the patch size.
            heads: Subset of ``point``, ``conf``, ``camera``; all by default.
            frames_chunk_size: Frames at a time in the heads.

        Returns:
            ``local_points`` [B, S, H, W, 3] in each camera's frame, ``conf`` [B, S, H, W, 1] as a logit,
            ``camera_poses`` [B, S, 4, 4] (``world_from_cam``, OpenCV axes), and with points and poses ``points``
            [B, S, H, W, 3] in world coordinates.

        Raises:
            ValueError: For a wrong shape or an unknown head.
        """
        images = in_batch(images)
        wanted = self.chosen(heads)
        frames_chunk_size = self.frames_in_heads(self.encoder, frames_chunk_size)
        return self.predict(self.features(images), self.grid(images), wanted, frames_chunk_size)  # features checks them

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(h, w) patches of an image."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def predict(
        self,
        features: Tensor | KeptLayer,  # [B, S, P, 2 * C]
        grid: tuple[int, int],
        heads: Collection[str],
        frames_chunk_size: int = 8,
    ) -> dict[str, Tensor]:
        """Run the heads on the features of h x w patches; arguments as in :meth:`forward`."""
        predictions = in_chunks(features, frames_chunk_size, lambda chunk: self._run_heads(chunk, grid, heads))
        if "camera_poses" in predictions:
            poses = predictions["camera_poses"]
            predictions["camera_poses"] = self.camera_head.poses(poses.flatten(0, 1)).unflatten(0, poses.shape[:2])
        if "local_points" in predictions and "camera_poses" in predictions:
            local = predictions["local_points"]
            world = transform_points(predictions["camera_poses"], local.flatten(-3, -2))
            predictions["points"] = world.view_as(local)
        return predictions

    def _run_heads(self, features: Tensor, grid: tuple[int, int], wanted: Collection[str]) -> dict[str, Tensor]:
        """Run the heads on one chunk of frames [n, P, 2 * C]; for poses, the numbers that they are made from."""
        start = self.register_token.shape[2]
        head_dim = self.config.head_decoder_dim // self.config.head_decoder_num_heads
        rope = frame_tables(grid, start, head_dim, self.rope_frequency, features.dtype, features.device)
        out = {}
        if "point" in wanted:
            hidden = self.point_decoder(features, rope)[:, start:]
            with own_precision(features.device):
                xy, log_z = self.point_head(hidden, grid).float().split([2, 1], dim=-1)
            z = log_z.exp()
            out["local_points"] = torch.cat([xy * z, z], dim=-1)
        if "conf" in wanted:
            hidden = self.conf_decoder(features, rope)[:, start:]
            with own_precision(features.device):
                out["conf"] = self.conf_head(hidden, grid).float()
        if "camera" in wanted:
            out["camera_poses"] = self.camera_head.numbers(self.camera_decoder(features, rope)[:, start:])
        return out


def geometry(predictions: Mapping[str, Tensor], size: tuple[int, int]) -> Geometry:
    """pi3's predictions in geoaccel's conventions; intrinsics are recovered from the local points, one focal length per
    frame.

    Raises:
        ValueError: If points or poses were not predicted.
    """
    if not {"local_points", "camera_poses", "conf"} <= set(predictions):
        raise UserError("geometry needs the point, conf and camera heads; run the model with all three")
    local = predictions["local_points"].float()
    conf = predictions["conf"][..., 0].float().sigmoid()
    focal = recover_focal(local, conf)
    intrinsics = local.new_zeros(*focal.shape, 3, 3)
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = size[1] / 2, size[0] / 2
    intrinsics[..., 2, 2] = 1
    cam_from_world = invert_rigid(predictions["camera_poses"].float())
    return Geometry(cam_from_world, intrinsics, local[..., 2], predictions["points"].float(), conf)


def config_from_names(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint without a configuration is the published pi3."""
    return {}


def config_from_module(module: nn.Module) -> dict[str, Any]:
    """Read the sizes off an upstream object."""
    m: Any = module
    decoder, head = m.decoder, m.point_decoder
    return {
        **encoder_sizes(m.encoder),
        "vit_dim": m.encoder.pos_embed.shape[-1],
        "decoder_dim": m.register_token.shape[-1],
        "decoder_depth": len(decoder),
        "decoder_num_heads": decoder[0].attn.num_heads,
        "head_decoder_dim": head.projects.out_features,
        "head_decoder_depth": len(head.blocks),
        "head_decoder_num_heads": head.blocks[0].attn.num_heads,
        "camera_dim": m.camera_decoder.linear_out.out_features,
        "num_register_tokens": m.register_token.shape[2],
        "rope_frequency": rope_base(m.rope),
    }


def sites(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The attention modules of the decoder and the encoder."""
    m: Any = module
    return {
        "encoder": [block.attn for block in m.encoder.blocks],
        "frame": [block.attn for block in m.decoder[::2]],
        "global": [block.attn for block in m.decoder[1::2]],
    }


TINY = Pi3Config(
    img_size=112, vit_dim=32, vit_depth=2, vit_num_heads=2, decoder_dim=32, decoder_depth=6, decoder_num_heads=2,
    head_decoder_dim=32, head_decoder_depth=2, head_decoder_num_heads=2, camera_dim=24,
)  # fmt: skip
BACKBONE = register(
    Backbone(
        name="pi3",
        network=Pi3,
        config=Pi3Config,
        tiny=TINY,
        class_names=("Pi3",),
        children=("encoder", "decoder", "point_decoder", "camera_decoder"),
        config_from_names=config_from_names,
        config_from_module=config_from_module,
        geometry=geometry,
        sites=sites,
        patch_embedding="encoder.patch_embed.proj",
        quantizable=("encoder.*", "decoder.*", "point_decoder.*", "conf_decoder.*", "camera_decoder.*"),
        heads_in_float32=("point_head", "conf_head", "camera_head"),
        features=FeatureStream(feature_layer, read_features),
        splitting=Split(),
        origins={
            "yyfz233/Pi3": Origin(
                licence="CC BY-NC 4.0 (weights; the code is BSD-3-Clause)",
                commercial=False,
                files=("model.safetensors",),
            ),
        },
    )
)
