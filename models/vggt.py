"""VGGT: Visual Geometry Grounded Transformer (Wang et al., CVPR 2025, arXiv 2503.11651).

Predicts cameras, depth maps, world points and point tracks from images of one scene in one pass. Our own implementation
with upstream's parameter names, so its checkpoints load key for key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import Backbone, CameraTokens, FeatureStream, Geometry, Origin, Preprocess, Split, register
from geoaccel.cameras import to_homogeneous, transform_points, unproject_depth
from geoaccel.cost import Trunk
from geoaccel.errors import UserError
from geoaccel.models.layers.aggregator import Aggregator
from geoaccel.models.layers.camera_head import CameraHead, decode_pose
from geoaccel.models.layers.dpt_head import DPTHead, dpt_bytes, inverse_log
from geoaccel.models.layers.encoder import DinoEncoder, in_batch
from geoaccel.models.layers.kept_layers import KeptLayer, first_tokens_of
from geoaccel.models.layers.outputs import HeadBytes
from geoaccel.models.layers.track_head import TrackHead, track_bytes
from geoaccel.models.layers.tracker import Tracker
from geoaccel.models.network import check_heads
from geoaccel.models.planned_network import PlannedNetwork
from geoaccel.models.upstream import dense_head_sizes, encoder_sizes, rope_base, tracker_sizes
from geoaccel.network_config import NetworkConfig
from geoaccel.precision import own_precision

HEADS = ("camera", "depth", "point", "track")


@dataclass(frozen=True, kw_only=True)
class VGGTConfig(NetworkConfig):
    """Sizes; the defaults are VGGT-1B's.

    Attributes:
        img_size: Side in pixels of the square images that the position embedding was learned on.
        patch_size: Patch side in pixels.
        embed_dim: Width C of encoder and aggregator.
        depth: Layers of the aggregator, each one frame and one global block.
        num_heads: Attention heads of the aggregator.
        vit_depth, vit_num_heads: Blocks and heads of the encoder.
        num_register_tokens: Register tokens per frame; with the camera token they are the special tokens.
        camera_head_num_heads, camera_trunk_depth: Heads and blocks of the camera head, whose width is 2 C.
        dpt_features, dpt_out_channels: Channels of the dense heads.
        dpt_layers: The four layers that the dense heads read.
        rope_frequency: Base of the rotary embedding.
        track_features, track_hidden_size, track_corr_levels, track_corr_radius, track_depth, track_dpt_out_channels:
            Sizes of the track head.
        heads: Which heads exist, of ``camera``, ``depth``, ``point``, ``track``.
        layer_scale: Initial factor of the aggregator's residual branches.
    """

    may_be_zero = ("num_register_tokens",)

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    vit_depth: int = 24
    vit_num_heads: int = 16
    num_register_tokens: int = 4
    camera_head_num_heads: int = 16
    camera_trunk_depth: int = 4
    dpt_features: int = 256
    dpt_out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    dpt_layers: tuple[int, ...] = (4, 11, 17, 23)
    rope_frequency: float = 100
    track_features: int = 128
    track_hidden_size: int = 384
    track_corr_levels: int = 7
    track_corr_radius: int = 4
    track_depth: int = 6
    track_dpt_out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    heads: tuple[str, ...] = HEADS
    layer_scale: float = 0.01

    def check(self) -> None:
        check_heads(self.heads, HEADS)
        if max(self.dpt_layers) >= self.depth:
            raise UserError(
                f"dpt_layers {list(self.dpt_layers)} reach beyond the last of {self.depth} layers, {self.depth - 1}"
            )


class VGGT(PlannedNetwork):
    """The network, at any size."""

    config: VGGTConfig

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__(config)
        c = config
        encoder = DinoEncoder(c.img_size, c.patch_size, c.embed_dim, c.vit_depth, c.vit_num_heads, mask_token=True)
        self.aggregator = Aggregator(
            encoder,
            depth=c.depth,
            num_heads=c.num_heads,
            num_register_tokens=c.num_register_tokens,
            rope_frequency=c.rope_frequency,
            layer_scale=c.layer_scale,
        )
        width = 2 * c.embed_dim
        dense: dict[str, Any] = {"patch_size": c.patch_size, "layers": c.dpt_layers}
        full: dict[str, Any] = {**dense, "features": c.dpt_features, "out_channels": c.dpt_out_channels}
        if "camera" in c.heads:
            self.camera_head = CameraHead(width, c.camera_head_num_heads, c.camera_trunk_depth)
        if "point" in c.heads:
            self.point_head = DPTHead(width, **full, activation=inverse_log, output_dim=4)
        if "depth" in c.heads:
            self.depth_head = DPTHead(width, **full, activation=torch.exp, output_dim=2)
        if "track" in c.heads:
            maps: dict[str, Any] = {**dense, "features": c.track_features, "out_channels": c.track_dpt_out_channels}
            extractor = DPTHead(width, **maps, activation=None, pos_embed=False, down_ratio=2)
            sizes = ("features", "hidden_size", "corr_levels", "corr_radius", "depth")
            tracker = Tracker(**{name: getattr(c, f"track_{name}") for name in sizes})
            self.track_head = TrackHead(extractor, tracker)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that this network has."""
        return tuple(head for head in HEADS if hasattr(self, f"{head}_head"))

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared for this network."""
        return Preprocess("crop", self.config.img_size, self.config.patch_size)

    @property
    def trunk(self) -> Trunk:
        """Sizes of everything but the heads."""
        return Trunk(
            width=self.config.embed_dim,
            patch_size=self.config.patch_size,
            encoder_blocks=self.config.vit_depth,
            frame_blocks=self.config.depth,
            global_blocks=self.config.depth,
            encoder_special=1 + self.aggregator.patch_embed.num_registers,
            special=self.aggregator.patch_start_idx,
        )

    def kept_layers(self, heads: Collection[str]) -> int:
        return len(self.layers_read(heads))

    def head_bytes(self, size: tuple[int, int], heads: Collection[str]) -> HeadBytes:
        c, channels = self.config, [count for head, count in (("depth", 2), ("point", 4)) if head in heads]
        tokens = 2 * c.embed_dim * self.aggregator.camera_token.element_size()  # of 4 layers, in numbers of float32
        maps = dpt_bytes(size, c.patch_size, c.dpt_features, c.dpt_out_channels, tokens, channels)
        return maps.beside(track_bytes(size, c, tokens)) if "track" in heads else maps

    def layers_read(self, heads: Collection[str]) -> set[int]:
        """Layers of the aggregator that these heads read."""
        return {self.config.depth - 1} | set(self.config.dpt_layers if set(heads) - {"camera"} else ())

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
        query_points: Tensor | None = None,  # [B, N, 2] or [N, 2], pixels of the first frame
        *,
        heads: Collection[str] | None = None,
        frames_chunk_size: int = 8,
    ) -> dict[str, Any]:
        """Run the heads; outputs have upstream's names.

        The heads run with autocast off, in the dtype of their own weights.

        Args:
            images: Images of one scene; the first is the reference view. H and W are multiples of the patch size.
            query_points: Points to track; without them the track head does not run.
            heads: Subset of the heads to run; all by default.
            frames_chunk_size: Frames at a time in the dense heads.

        Returns:
            ``pose_enc`` [B, S, 9] (the last of ``pose_enc_list``), ``depth`` [B, S, H, W, 1], ``depth_conf``
            [B, S, H, W], ``world_points`` [B, S, H, W, 3] in the first camera's frame, ``world_points_conf``
            [B, S, H, W]; with query points ``track`` [B, S, N, 2], ``vis`` and ``conf`` [B, S, N]; in eval mode
            ``images``.

        Raises:
            ValueError: For a wrong shape, or a head that this network does not have.
        """
        images = in_batch(images)
        if query_points is not None and query_points.ndim == 2:
            query_points = query_points[None]
        wanted = self.chosen(heads)
        if query_points is None:
            wanted = tuple(head for head in wanted if head != "track")
        features, _ = self.aggregator(images, keep=self.layers_read(wanted))
        frames_chunk_size = self.frames_in_heads(self.aggregator.patch_embed, frames_chunk_size)
        predictions = self.predict(features, images, wanted, query_points, frames_chunk_size)
        if not self.training:
            predictions["images"] = images
        return predictions

    def predict(
        self,
        features: list[Tensor | KeptLayer | None],  # depth x [B, S, P, 2 * C]
        images: Tensor,  # [B, S, 3, H, W]
        heads: Collection[str],
        query_points: Tensor | None = None,  # [B, N, 2]
        frames_chunk_size: int = 8,
    ) -> dict[str, Any]:
        """Run the heads on the features of the aggregator; arguments as in :meth:`forward`."""
        predictions: dict[str, Any] = {}
        start = self.aggregator.patch_start_idx
        with own_precision(self.aggregator.camera_token.device):
            if "camera" in heads:
                *before, last = features
                poses = [pose.float() for pose in self.camera_head([*before, first_tokens_of(last)])]
                predictions["pose_enc"], predictions["pose_enc_list"] = poses[-1], poses
            if "depth" in heads:
                depth, conf = self.depth_head(features, images, start, frames_chunk_size)
                predictions["depth"], predictions["depth_conf"] = depth, conf
            if "point" in heads:
                points, conf = self.point_head(features, images, start, frames_chunk_size)
                predictions["world_points"], predictions["world_points_conf"] = points, conf
            if "track" in heads:
                tracks, visibility, conf = self.track_head(features, images, start, query_points, frames_chunk_size)
                predictions["track"], predictions["vis"], predictions["conf"] = tracks[-1], visibility, conf
        return predictions


def geometry(predictions: Mapping[str, Tensor], size: tuple[int, int]) -> Geometry:
    """VGGT's predictions in geoaccel's conventions.

    Raises:
        ValueError: If neither depth nor points, or no cameras, were predicted.
    """
    if "pose_enc" not in predictions or not ({"depth", "world_points"} & set(predictions)):
        raise UserError("geometry needs the camera head, and the depth or point head; run the model with them")
    extrinsics, intrinsics = decode_pose(predictions["pose_enc"].float(), size)
    cam_from_world = to_homogeneous(extrinsics)
    if "depth" in predictions:
        depth, conf = predictions["depth"][..., 0].float(), predictions["depth_conf"].float()
    else:
        points = predictions["world_points"].float().flatten(-3, -2)
        depth = transform_points(cam_from_world, points)[..., 2].unflatten(-1, size)
        conf = predictions["world_points_conf"].float()
    if "world_points" in predictions:
        points_world = predictions["world_points"].float()
    else:
        points_world = unproject_depth(depth, intrinsics, cam_from_world)
    return Geometry(cam_from_world, intrinsics, depth, points_world, conf)


def config_from_names(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint without a configuration is VGGT-1B, perhaps with fewer heads."""
    return {"heads": tuple(head for head in HEADS if any(name.startswith(f"{head}_head.") for name in tensors))}


def config_from_module(module: nn.Module) -> dict[str, Any]:
    """Read the sizes off an upstream object."""
    m: Any = module
    aggregator, depth = m.aggregator, len(m.aggregator.frame_blocks)
    heads = tuple(head for head in HEADS if getattr(m, f"{head}_head", None) is not None)
    config: dict[str, Any] = {
        **encoder_sizes(aggregator.patch_embed),
        "heads": heads,
        "embed_dim": aggregator.camera_token.shape[-1],
        "depth": depth,
        "num_heads": aggregator.frame_blocks[0].attn.num_heads,
        "num_register_tokens": aggregator.register_token.shape[2],
        "rope_frequency": rope_base(aggregator.rope),
    }
    if "camera" in heads:
        trunk = m.camera_head.trunk
        config |= {"camera_trunk_depth": len(trunk), "camera_head_num_heads": trunk[0].attn.num_heads}
    dense = next((getattr(m, f"{head}_head") for head in ("depth", "point") if head in heads), None)
    if dense is not None:
        config["dpt_features"], config["dpt_out_channels"], config["dpt_layers"] = dense_head_sizes(dense, depth)
    if "track" in heads:
        found = dense_head_sizes(m.track_head.feature_extractor, depth)
        config["track_features"], config["track_dpt_out_channels"], config["dpt_layers"] = found
        config |= tracker_sizes(m.track_head.tracker)
    return config


def sites(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The attention modules of the aggregator and the encoder."""
    m: Any = module
    return {
        "encoder": [block.attn for block in m.aggregator.patch_embed.blocks],
        "frame": [block.attn for block in m.aggregator.frame_blocks],
        "global": [block.attn for block in m.aggregator.global_blocks],
    }


def _layer(model: VGGT, layer: int | None) -> int:
    """Index of a layer; by default the last but one, as VG-LLM reads."""
    depth = model.config.depth
    layer = depth - 2 if layer is None else layer
    if not -depth <= layer < depth:
        raise UserError(f"layer={layer} does not exist: {depth} layers")
    return layer % depth


def _read(model: VGGT, images: Tensor, layer: int, predict: bool) -> tuple[Tensor, dict[str, Any]]:
    """Features of one aggregator layer, and the predictions of the same forward that need no query points."""
    heads = [head for head in model.heads if head != "track"] if predict else []
    features, _ = model.aggregator(images, keep={layer} | (model.layers_read(heads) if predict else set()))
    return features[layer], model.predict(features, images, heads)


TINY = VGGTConfig(
    img_size=112, embed_dim=32, depth=4, num_heads=2, vit_depth=2, vit_num_heads=2, camera_head_num_heads=4,
    dpt_features=16, dpt_out_channels=(8, 12, 16, 16), dpt_layers=(0, 1, 2, 3), track_features=16, track_hidden_size=48,
    track_corr_levels=3, track_corr_radius=2, track_depth=2, track_dpt_out_channels=(8, 12, 16, 16),
)  # fmt: skip
NON_COMMERCIAL = "VGGT License v1, non-commercial use only"
BACKBONE = register(
    Backbone(
        name="vggt",
        network=VGGT,
        config=VGGTConfig,
        tiny=TINY,
        class_names=("VGGT",),
        children=("aggregator",),
        config_from_names=config_from_names,
        config_from_module=config_from_module,
        geometry=geometry,
        sites=sites,
        patch_embedding="aggregator.patch_embed.patch_embed.proj",
        quantizable=("aggregator.*", "camera_head.trunk.*"),
        heads_in_float32=("camera_head", "depth_head", "point_head", "track_head"),
        features=FeatureStream(_layer, _read),
        camera_tokens=CameraTokens("camera_head", width=lambda config: 2 * config.embed_dim),
        splitting=Split(over_frames=("camera_head.trunk.*.attn",), reference="aggregator"),
        origins={
            "facebook/VGGT-1B": Origin(NON_COMMERCIAL, commercial=False, files=("model.safetensors", "model.pt")),
            "facebook/VGGT-1B-Commercial": Origin(
                "VGGT License v1, commercial use allowed (no military use)",
                commercial=True,
                files=("model.safetensors", "model.pt", "vggt_1B_commercial.pt"),
                note="gated: accept the licence on its page, then `hf auth login`",
            ),
            "facebook/VGGT_tracker_fixed": Origin(
                NON_COMMERCIAL,
                commercial=False,
                files=("model_tracker_fixed_e20.pt",),
                note="the checkpoint of the published CO3D figures",
            ),
        },
    )
)
