"""Pi3X: pi3's successor, approximately metric, and conditioned on poses, intrinsics and depths if known.

Code at github.com/yyfz/Pi3; the method is that of pi3 (arXiv 2507.13347). Our own implementation with upstream's
parameter names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoaccel.backbone import METRE, Backbone, Conditioning, FeatureStream, Origin, register
from geoaccel.cameras import transform_points
from geoaccel.errors import UserError
from geoaccel.models.last_features import feature_layer, read_features
from geoaccel.models.layers.conv_head import ConvHead
from geoaccel.models.layers.encoder import MapEncoder, PatchEmbed, check_images, in_batch
from geoaccel.models.layers.given import Given, arguments, given
from geoaccel.models.layers.kept_layers import KeptLayer
from geoaccel.models.layers.metric_decoder import MetricDecoder
from geoaccel.models.layers.outputs import HeadBytes, in_chunks
from geoaccel.models.layers.pi3_heads import PoseHead
from geoaccel.models.layers.pose_injection import PosedTokens, PoseInjection
from geoaccel.models.layers.rope import Rope, frame_tables
from geoaccel.models.layers.stream import TokenStream, alternate, last_two
from geoaccel.models.pi3 import Pi3, Pi3Config, geometry, sites
from geoaccel.models.pi3 import config_from_module as pi3_sizes
from geoaccel.precision import own_precision

LARGEST_LOG_DEPTH = 15.0


@dataclass(frozen=True, kw_only=True)
class Pi3XConfig(Pi3Config):
    """Sizes; the defaults are those of the published checkpoint. The depth encoder has the sizes of the image encoder.

    Attributes:
        pose_inject_after, pose_inject_num_heads: The blocks after which given poses are injected, and their attention
            heads.
        metric_decoder_dim, metric_decoder_depth, metric_decoder_num_heads: Sizes of the decoder that predicts the
            metric scale.
        conv_head_dim_upsample, conv_head_num_res_blocks, conv_head_res_hidden_times, conv_head_last_channels: Sizes of
            the convolutional heads.
    """

    pose_inject_after: tuple[int, ...] = (1, 9, 17, 25, 33)
    pose_inject_num_heads: int = 16
    metric_decoder_dim: int = 512
    metric_decoder_depth: int = 5
    metric_decoder_num_heads: int = 8
    conv_head_dim_upsample: tuple[int, ...] = (256, 128, 64)
    conv_head_num_res_blocks: int = 2
    conv_head_res_hidden_times: int = 2
    conv_head_last_channels: int = 32

    def check(self) -> None:
        super().check()
        if max(self.pose_inject_after) >= self.decoder_depth:
            raise UserError(
                f"pose_inject_after {list(self.pose_inject_after)} reach beyond the last of {self.decoder_depth} blocks"
            )


class Pi3X(Pi3):
    """The network, at any size; encoder and decoder are pi3's."""

    config: Pi3XConfig

    def add_heads(self) -> None:
        """Make everything after the decoder, and the modules for conditions."""
        c = self.config
        self.depth_encoder = MapEncoder(c.img_size, c.patch_size, c.vit_dim, c.vit_depth, c.vit_num_heads, channels=2)
        self.depth_emb = nn.Parameter(torch.empty(1, 1, c.vit_dim))
        self.ray_embed = PatchEmbed(c.patch_size, c.vit_dim, 2)
        self.pose_inject_blk = nn.ModuleList(
            PoseInjection(c.decoder_dim, c.pose_inject_num_heads, c.layer_scale) for _ in c.pose_inject_after
        )
        self.point_decoder = self.head_decoder(c.head_decoder_dim)
        self.point_head = self.conv_head(2, 1)
        self.conf_decoder = self.head_decoder(c.head_decoder_dim)
        self.conf_head = self.conv_head(1)
        self.camera_decoder = self.head_decoder(c.camera_dim)
        self.camera_head = PoseHead(c.camera_dim)
        self.metric_token = nn.Parameter(torch.empty(1, 1, 2 * c.decoder_dim))
        self.metric_decoder = MetricDecoder(
            2 * c.decoder_dim, c.metric_decoder_dim, c.metric_decoder_depth, c.metric_decoder_num_heads
        )
        self.metric_head = nn.Linear(c.metric_decoder_dim, 1)
        for token in (self.depth_emb, self.metric_token):
            nn.init.normal_(token, std=1e-6)

    def conv_head(self, *outputs: int) -> ConvHead:
        """A head for maps with these numbers of channels."""
        c = self.config
        return ConvHead(
            c.head_decoder_dim,
            c.conv_head_dim_upsample,
            outputs,
            residuals=c.conv_head_num_res_blocks,
            inner_times=c.conv_head_res_hidden_times,
            last=c.conv_head_last_channels,
        )

    def head_bytes(self, size: tuple[int, int], heads: Collection[str]) -> HeadBytes:
        c, pixels = self.config, 4 * size[0] * size[1]
        tokens = size[0] // c.patch_size * (size[1] // c.patch_size) + c.num_register_tokens
        # The last map of a convolutional head at full resolution, copied for padding and for the kernel's layout, and
        # its output. The scale is read from all tokens, in float32.
        work = pixels * (4 * c.conv_head_dim_upsample[-1] + c.conv_head_last_channels)
        scale = 4 * tokens * (2 * c.decoder_dim + 6 * c.metric_decoder_dim)
        return HeadBytes(work, pixels * 10, pixels * 20, scale)

    def features(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        told: Given | None = None,
    ) -> Tensor | KeptLayer:  # [B, S, P, 2 * C]
        """Outputs of the last frame block and the last global block, concatenated."""
        check_images(images, self.patch_size)
        encoded = self.encode(images)
        if told is not None:
            encoded = self.with_maps(encoded, told)
        stream, blocks = self.enter(encoded), self.decoder_blocks()
        del encoded  # otherwise its tokens stay alive while the decoder runs
        steps = alternate(stream, blocks, self.injections(stream, told))
        del stream
        return last_two(steps, len(blocks))

    def injections(self, stream: TokenStream, told: Given | None) -> Callable[[int, TokenStream], TokenStream]:
        """What given poses add after the blocks of the decoder, by index."""
        if told is None or told.world_from_cam is None or told.has_pose is None:
            return lambda _, step: step
        head_dim = self.config.decoder_dim // self.config.pose_inject_num_heads
        posed = PosedTokens.of(stream, told.world_from_cam, told.has_pose.tolist(), head_dim)
        at: dict[int, Any] = dict(zip(self.config.pose_inject_after, self.pose_inject_blk, strict=True))
        return lambda index, step: at[index].inject(step, posed) if index in at else step

    def with_maps(self, encoded: TokenStream, told: Given) -> TokenStream:
        """The encoder's patch tokens plus those of given rays and depths."""
        if told.rays is not None and told.has_rays is not None:
            rays = self.ray_embed(told.rays.flatten(0, 1).to(self.register_token.dtype)).unflatten(
                0, told.rays.shape[:2]
            )
            encoded = encoded.plus_patches(rays * told.has_rays[..., None, None])
        if told.depth is not None and told.has_depth is not None:
            # Frames are encoded separately, with a plan a few at a time: only those that have a depth.
            depths = told.depth[told.has_depth].to(self.register_token.dtype)
            at_once = len(depths) if encoded.step is None else encoded.step // encoded.layout.tokens_per_frame
            parts = [self.depth_encoder(part) for part in depths.split(max(1, at_once))]
            patches = torch.cat(parts) + self.depth_emb
            added = patches.new_zeros(*told.has_depth.shape, *patches.shape[1:])
            added[told.has_depth] = patches
            encoded = encoded.plus_patches(added)
        return encoded

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
        *,
        heads: Collection[str] | None = None,
        frames_chunk_size: int = 8,
        **conditions: Tensor | None,
    ) -> dict[str, Tensor]:
        """Run the heads, everything after the decoder in float32; outputs have upstream's names.

        Args:
            images: Images of one scene in any order; H and W are multiples of the patch size.
            heads: Subset of ``point``, ``conf``, ``camera``; all by default.
            frames_chunk_size: Frames at a time in the heads.
            conditions: ``depths``, ``intrinsics`` or ``rays``, ``poses`` (``world_from_cam``), and masks of frames, as
                :func:`layers.given.given` takes them.

        Returns:
            ``local_points`` [B, S, H, W, 3] in each camera's frame, ``rays`` [B, S, H, W, 3] of unit length, ``conf``
            [B, S, H, W, 1] as a logit, ``camera_poses`` [B, S, 4, 4] (``world_from_cam``, OpenCV axes), ``metric`` [B],
            by which points and poses have been multiplied, and with points and poses ``points`` [B, S, H, W, 3] in
            world coordinates. The unit is about a metre.

        Raises:
            ValueError: For a wrong shape, an unknown head or impossible conditions.
        """
        scene, images = images, in_batch(images)
        if images is not scene:
            conditions = {name: None if value is None else value[None] for name, value in conditions.items()}
        wanted = self.chosen(heads)
        told = None
        if any(value is not None for value in conditions.values()):
            check_images(images[:1, :1], self.patch_size)
            shape = (*images.shape[:2], *images.shape[-2:])
            told = given(shape, images.device, **conditions)
        frames_chunk_size = self.frames_in_heads(self.encoder, frames_chunk_size)
        return self.predict(self.features(images, told), self.grid(images), wanted, frames_chunk_size)

    def predict(
        self,
        features: Tensor | KeptLayer,  # [B, S, P, 2 * C]
        grid: tuple[int, int],
        heads: Collection[str],
        frames_chunk_size: int = 8,
    ) -> dict[str, Tensor]:
        """Run the heads on the features of h x w patches; arguments as in :meth:`forward`."""
        if not heads:
            return {}
        with own_precision(features.device):
            out = in_chunks(features, frames_chunk_size, lambda chunk: self._run_heads(chunk, grid, heads))
            if "camera_poses" in out:
                poses = out["camera_poses"]
                out["camera_poses"] = self.camera_head.poses(poses.flatten(0, 1)).unflatten(0, poses.shape[:2])
            if not {"point", "camera"} & set(heads):
                return out
            everything = features if isinstance(features, Tensor) else features.frames(slice(None))
            metric = out["metric"] = self._metric(everything, grid).to(next(iter(out.values())).device)
        scale = metric[:, None, None, None]
        if "local_points" in out and "camera_poses" in out:
            world = transform_points(out["camera_poses"], out["local_points"].flatten(-3, -2))
            out["points"] = world.view_as(out["local_points"]) * scale[..., None]
        if "local_points" in out:
            out["local_points"] = out["local_points"] * scale[..., None]
        if "camera_poses" in out:
            poses = out["camera_poses"] = out["camera_poses"].clone()
            poses[..., :3, 3] *= scale[..., 0]
        return out

    def _rope(self, grid: tuple[int, int], head_dim: int, device: torch.device) -> Rope:
        special = self.config.num_register_tokens
        return frame_tables(grid, special, head_dim, self.rope_frequency, torch.float32, device)

    def _metric(self, features: Tensor, grid: tuple[int, int]) -> Tensor:  # [B]
        c = self.config
        rope = self._rope(grid, c.metric_decoder_dim // c.metric_decoder_num_heads, features.device)
        return self.metric_head(self.metric_decoder(self.metric_token, features, rope)).float().exp().flatten()

    def _run_heads(self, features: Tensor, grid: tuple[int, int], wanted: Collection[str]) -> dict[str, Tensor]:
        """Run the heads on one chunk of frames [n, P, 2 * C], unscaled; for poses, the numbers they are made from."""
        start = self.config.num_register_tokens
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        head_dim = self.config.head_decoder_dim // self.config.head_decoder_num_heads
        rope = self._rope(grid, head_dim, features.device)
        out = {}
        if "point" in wanted:
            slopes, log_z = self.point_head(self.point_decoder(features, rope)[:, start:], grid, size)
            slopes, log_z = (x.float().permute(0, 2, 3, 1) for x in (slopes, log_z))
            rays = torch.cat([slopes, torch.ones_like(log_z)], dim=-1)
            out["local_points"] = rays * log_z.clamp(max=LARGEST_LOG_DEPTH).exp()
            out["rays"] = F.normalize(rays, dim=-1)
        if "conf" in wanted:
            (conf,) = self.conf_head(self.conf_decoder(features, rope)[:, start:], grid, size)
            out["conf"] = conf.float().permute(0, 2, 3, 1)
        if "camera" in wanted:
            out["camera_poses"] = self.camera_head.numbers(self.camera_decoder(features, rope)[:, start:])
        return out


def config_from_module(module: nn.Module) -> dict[str, Any]:
    """Read the sizes off an upstream object."""
    m: Any = module
    metric, conv = m.metric_decoder, m.point_head
    injections, inner = len(m.pose_inject_blk), conv.upsample_blocks[0][1].layers[2]
    return {
        **pi3_sizes(module),
        "pose_inject_after": getattr(m, "pose_inject_after", Pi3XConfig.pose_inject_after[:injections]),
        "pose_inject_num_heads": m.pose_inject_blk[0].attn.num_heads,
        "metric_decoder_dim": metric.linear_out.out_features,
        "metric_decoder_depth": len(metric.blocks),
        "metric_decoder_num_heads": metric.blocks[0].cross_attn.num_heads,
        "conv_head_dim_upsample": tuple(block[0][0].out_channels for block in conv.upsample_blocks),
        "conv_head_num_res_blocks": len(conv.upsample_blocks[0]) - 1,
        "conv_head_res_hidden_times": inner.out_channels // inner.in_channels,
        "conv_head_last_channels": conv.output_block[0][0].out_channels,
    }


TINY = Pi3XConfig(
    img_size=112, vit_dim=32, vit_depth=2, vit_num_heads=2, decoder_dim=32, decoder_depth=4, decoder_num_heads=2,
    pose_inject_after=(1,), pose_inject_num_heads=2, head_decoder_dim=32, head_decoder_depth=1,
    head_decoder_num_heads=2, camera_dim=24, metric_decoder_dim=16, metric_decoder_depth=1, metric_decoder_num_heads=2,
    conv_head_dim_upsample=(16, 8, 8), conv_head_num_res_blocks=1, conv_head_last_channels=8,
)  # fmt: skip
BACKBONE = register(
    Backbone(
        name="pi3x",
        network=Pi3X,
        config=Pi3XConfig,
        tiny=TINY,
        class_names=("Pi3X",),
        children=("encoder", "decoder", "point_decoder", "camera_decoder", "metric_decoder"),
        config_from_names=lambda names: {},
        config_from_module=config_from_module,
        geometry=geometry,
        sites=sites,
        patch_embedding="encoder.patch_embed.proj",
        # Layers used only with given depths and poses are not quantized: images alone cannot calibrate them.
        quantizable=("encoder.*", "decoder.*", "point_decoder.*", "conf_decoder.*", "camera_decoder.*"),
        heads_in_float32=(
            "point_decoder", "point_head", "conf_decoder", "conf_head", "camera_decoder", "camera_head",
            "metric_decoder", "metric_head",
        ),
        features=FeatureStream(feature_layer, read_features),
        conditions=Conditioning(("poses", "intrinsics", "depths"), arguments),
        unit=METRE,
        origins={
            "yyfz233/Pi3X": Origin(
                licence="CC BY-NC 4.0 (weights; the code is BSD-3-Clause)",
                commercial=False,
                files=("model.safetensors",),
            ),
        },
    )
)  # fmt: skip
