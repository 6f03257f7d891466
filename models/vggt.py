"""VGGT: Visual Geometry Grounded Transformer (Wang et al., CVPR 2025, arXiv 2503.11651).

Photographs of one scene to cameras, depth maps, world points and point tracks in one pass. The network is written here;
parameter names are upstream's, so its checkpoints load key for key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import BACKBONES, Backbone, Geometry, Origin, Preprocess
from geoaccel.cameras import to_homogeneous, transform_points, unproject_depth
from geoaccel.cost import Cost, Trunk
from geoaccel.errors import UserError
from geoaccel.models.head_cost import head_flops
from geoaccel.models.layers.aggregator import Aggregator
from geoaccel.models.layers.block import MLP_CHUNK_TOKENS
from geoaccel.models.layers.camera_head import CameraHead, decode_pose
from geoaccel.models.layers.dpt_head import DPTHead, inverse_log
from geoaccel.models.layers.track_head import TrackHead
from geoaccel.models.layers.tracker import Tracker
from geoaccel.precision import own_precision

HEADS = ("camera", "depth", "point", "track")


class VGGT(nn.Module):
    """The network, at any size.

    Args:
        img_size: Side in pixels of the square that the position embedding was learned on.
        patch_size: Patch side in pixels.
        embed_dim: Width C of encoder and aggregator.
        depth: Layers of the aggregator, each one frame and one global block.
        num_heads: Attention heads of the aggregator.
        vit_depth, vit_num_heads: Blocks and heads of the encoder.
        num_register_tokens: Register tokens a frame; with the camera token they are the special tokens.
        camera_head_num_heads, camera_trunk_depth: Heads and blocks of the camera head, whose width is 2 C.
        dpt_features, dpt_out_channels: Channels of the dense heads.
        dpt_layers: The four layers that the dense heads read.
        rope_frequency: Base of the rotary embedding.
        track_features, track_hidden_size, track_corr_levels, track_corr_radius, track_depth, track_dpt_out_channels:
            Sizes of the track head.
        heads: Which heads exist, of ``camera``, ``depth``, ``point``, ``track``.
        layer_scale: Initial factor of the aggregator's residual branches.

    Raises:
        ValueError: For an unknown head, or sizes that do not fit each other.
    """

    backbone: Backbone

    def __init__(
        self,
        *,
        img_size: int = 518,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        vit_depth: int = 24,
        vit_num_heads: int = 16,
        num_register_tokens: int = 4,
        camera_head_num_heads: int = 16,
        camera_trunk_depth: int = 4,
        dpt_features: int = 256,
        dpt_out_channels: Sequence[int] = (256, 512, 1024, 1024),
        dpt_layers: Sequence[int] = (4, 11, 17, 23),
        rope_frequency: float = 100,
        track_features: int = 128,
        track_hidden_size: int = 384,
        track_corr_levels: int = 7,
        track_corr_radius: int = 4,
        track_depth: int = 6,
        track_dpt_out_channels: Sequence[int] = (256, 512, 1024, 1024),
        heads: Sequence[str] = HEADS,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check_heads(heads, HEADS)
        if max(dpt_layers) >= depth:
            raise UserError(f"dpt_layers {list(dpt_layers)} reach beyond the last of {depth} layers, {depth - 1}")
        self.aggregator = Aggregator(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            vit_depth=vit_depth,
            vit_num_heads=vit_num_heads,
            num_register_tokens=num_register_tokens,
            rope_frequency=rope_frequency,
            layer_scale=layer_scale,
        )
        width = 2 * embed_dim
        dense: dict[str, Any] = {"patch_size": patch_size, "layers": dpt_layers}
        full: dict[str, Any] = {**dense, "features": dpt_features, "out_channels": dpt_out_channels}
        if "camera" in heads:
            self.camera_head = CameraHead(width, camera_head_num_heads, camera_trunk_depth)
        if "point" in heads:
            self.point_head = DPTHead(width, **full, activation=inverse_log, output_dim=4)
        if "depth" in heads:
            self.depth_head = DPTHead(width, **full, activation=torch.exp, output_dim=2)
        if "track" in heads:
            extractor = DPTHead(
                width,
                **dense,
                features=track_features,
                out_channels=track_dpt_out_channels,
                activation=None,
                pos_embed=False,
                down_ratio=2,
            )
            tracker = Tracker(
                features=track_features,
                hidden_size=track_hidden_size,
                corr_levels=track_corr_levels,
                corr_radius=track_corr_radius,
                depth=track_depth,
            )
            self.track_head = TrackHead(extractor, tracker)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that this network has."""
        return tuple(head for head in HEADS if hasattr(self, f"{head}_head"))

    @property
    def preprocess(self) -> Preprocess:
        """How photographs are prepared for this network."""
        return Preprocess("crop", self.config["img_size"], self.config["patch_size"])

    @property
    def trunk(self) -> Trunk:
        """Sizes of everything but the heads."""
        return Trunk(
            width=self.config["embed_dim"],
            patch_size=self.config["patch_size"],
            encoder_blocks=self.config["vit_depth"],
            frame_blocks=self.config["depth"],
            global_blocks=self.config["depth"],
            encoder_special=1 + self.aggregator.patch_embed.num_registers,
            special=self.aggregator.patch_start_idx,
        )

    def cost(self, frames: int, size: tuple[int, int], heads: Collection[str] | None = None) -> Cost:
        """FLOPs of one forward over S frames of H x W, with all heads or only these."""
        return self.trunk.cost(frames, size, heads=frames * head_flops(self, size, heads))

    def activation_bytes(self, frames: int, size: tuple[int, int]) -> int:
        """Peak memory of a forward without the weights: features kept, one block at work, then one head at work.

        Args:
            frames: S, photographs of one scene.
            size: (H, W) in pixels.
        """
        patch_size, width = self.config["patch_size"], self.config["embed_dim"]
        tokens = frames * (size[0] // patch_size * (size[1] // patch_size) + self.aggregator.patch_start_idx)
        element = self.aggregator.camera_token.element_size()
        kept = len({*self.config["dpt_layers"], self.aggregator.depth - 1}) * tokens * 2 * width * element
        block = 10 * tokens * width * element + 2 * min(tokens, MLP_CHUNK_TOKENS) * 4 * width * element
        pixels = size[0] * size[1]
        # The widest step of a dense head: its fusion path at full resolution, before and after the position grid.
        head = min(frames, 8) * pixels * 2 * self.config["dpt_features"] * 4 + frames * pixels * 6 * 4
        return kept + max(block, head)

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
        query_points: Tensor | None = None,  # [B, N, 2] or [N, 2], pixels of the first frame
        *,
        heads: Collection[str] | None = None,
        frames_chunk_size: int = 8,
    ) -> dict[str, Any]:
        """Predict everything that the heads know, under upstream's names.

        The heads run with autocast off, in the dtype of their own weights.

        Args:
            images: Photographs of one scene; the first is the reference frame. H and W are multiples of the patch size.
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
        if images.ndim == 4:
            images = images[None]
        if query_points is not None and query_points.ndim == 2:
            query_points = query_points[None]
        wanted = self.heads if heads is None else heads
        _check_heads(wanted, self.heads)
        if "track" in wanted and query_points is None:
            wanted = [head for head in wanted if head != "track"]
        keep = {self.aggregator.depth - 1} | set(self.config["dpt_layers"] if set(wanted) - {"camera"} else ())
        features, start = self.aggregator(images, keep=keep)
        predictions: dict[str, Any] = {}
        with own_precision(images.device):
            if "camera" in wanted:
                poses = [pose.float() for pose in self.camera_head(features)]
                predictions["pose_enc"], predictions["pose_enc_list"] = poses[-1], poses
            if "depth" in wanted:
                depth, conf = self.depth_head(features, images, start, frames_chunk_size)
                predictions["depth"], predictions["depth_conf"] = depth, conf
            if "point" in wanted:
                points, conf = self.point_head(features, images, start, frames_chunk_size)
                predictions["world_points"], predictions["world_points_conf"] = points, conf
            if "track" in wanted:
                tracks, visibility, conf = self.track_head(features, images, start, query_points)
                predictions["track"], predictions["vis"], predictions["conf"] = tracks[-1], visibility, conf
        if not self.training:
            predictions["images"] = images
        return predictions


def _check_heads(wanted: Collection[str], known: Collection[str]) -> None:
    unknown = [head for head in wanted if head not in known]
    if unknown:
        raise UserError(f"unknown head {unknown[0]!r}; this network has: {', '.join(known)}")


def geometry(predictions: Mapping[str, Tensor], size: tuple[int, int]) -> Geometry:
    """VGGT's predictions in house conventions.

    Raises:
        ValueError: If neither depth nor points, or no cameras, were predicted.
    """
    if "pose_enc" not in predictions or not ({"depth", "world_points"} & set(predictions)):
        raise UserError("geometry needs the camera head and the depth or the point head; run the model with them")
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


def config_from_names(names: Collection[str]) -> dict[str, Any]:
    """A checkpoint without a configuration is VGGT-1B, perhaps with fewer heads."""
    return {"heads": tuple(head for head in HEADS if any(name.startswith(f"{head}_head.") for name in names))}


def config_from_module(module: nn.Module) -> dict[str, Any]:
    """Read the sizes off an upstream object."""
    m: Any = module
    aggregator, encoder = m.aggregator, m.aggregator.patch_embed
    heads = tuple(head for head in HEADS if getattr(m, f"{head}_head", None) is not None)
    patch_size = encoder.patch_embed.proj.kernel_size[0]
    config: dict[str, Any] = {
        "heads": heads,
        "patch_size": patch_size,
        "img_size": round((encoder.pos_embed.shape[1] - 1) ** 0.5) * patch_size,
        "embed_dim": aggregator.camera_token.shape[-1],
        "depth": len(aggregator.frame_blocks),
        "num_heads": aggregator.frame_blocks[0].attn.num_heads,
        "vit_depth": len(encoder.blocks),
        "vit_num_heads": encoder.blocks[0].attn.num_heads,
        "num_register_tokens": aggregator.register_token.shape[2],
        "rope_frequency": _rope_base(aggregator.rope),
    }
    if "camera" in heads:
        trunk = m.camera_head.trunk
        config |= {"camera_trunk_depth": len(trunk), "camera_head_num_heads": trunk[0].attn.num_heads}
    dense = next((getattr(m, f"{head}_head") for head in ("depth", "point") if head in heads), None)
    if dense is not None:
        config["dpt_out_channels"] = tuple(project.out_channels for project in dense.projects)
        config["dpt_features"] = dense.scratch.layer1_rn.out_channels
        config["dpt_layers"] = _read_layers(dense.intermediate_layer_idx, config["depth"])
    if "track" in heads:
        extractor, tracker = m.track_head.feature_extractor, m.track_head.tracker
        config |= {
            "dpt_layers": _read_layers(extractor.intermediate_layer_idx, config["depth"]),
            "track_dpt_out_channels": tuple(project.out_channels for project in extractor.projects),
            "track_features": extractor.scratch.layer1_rn.out_channels,
            "track_hidden_size": tracker.updateformer.input_transform.out_features,
            "track_corr_levels": tracker.corr_levels,
            "track_corr_radius": tracker.corr_radius,
            "track_depth": len(tracker.updateformer.time_blocks),
        }
    return config


def _read_layers(indices: Sequence[int], depth: int) -> tuple[int, ...]:
    """The layers that an upstream dense head reads.

    Forks that store four features only (FastVGGT, LiteVGGT) renumber them 0 to 3; at the published depth it is known
    which layers those are.

    Raises:
        ValueError: If the last layer is not among them at another depth: the numbering then means something else.
    """
    layers = tuple(indices)
    if depth == 24 and layers == (0, 1, 2, 3):
        return (4, 11, 17, 23)
    if max(layers) != depth - 1:
        raise UserError(
            f"the dense heads read layers {list(layers)}; expected the last of {depth}, {depth - 1}, among them"
        )
    return layers


def _rope_base(rope: Any) -> float:
    """Upstream objects call the base ``base_frequency`` (VGGT) or ``base`` (pi3)."""
    for name in ("base_frequency", "base"):
        if hasattr(rope, name):
            return float(getattr(rope, name))
    raise UserError(f"cannot read the rotary base of a {type(rope).__name__}; expected .base_frequency or .base")


def sites(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The attention modules of the aggregator and the encoder."""
    m: Any = module
    return {
        "encoder": [block.attn for block in m.aggregator.patch_embed.blocks],
        "frame": [block.attn for block in m.aggregator.frame_blocks],
        "global": [block.attn for block in m.aggregator.global_blocks],
    }


BACKBONE = Backbone(
    name="vggt",
    network=VGGT,
    class_names=("VGGT",),
    children=("aggregator",),
    config_from_names=config_from_names,
    config_from_module=config_from_module,
    geometry=geometry,
    sites=sites,
    origins={
        "facebook/VGGT-1B": Origin(
            licence="VGGT License v1, non-commercial use only",
            commercial=False,
            url="https://huggingface.co/facebook/VGGT-1B",
            files=("model.safetensors", "model.pt"),
        ),
        "facebook/VGGT-1B-Commercial": Origin(
            licence="VGGT License v1, commercial use allowed (no military use)",
            commercial=True,
            url="https://huggingface.co/facebook/VGGT-1B-Commercial",
            files=("model.safetensors", "model.pt", "vggt_1B_commercial.pt"),
            note="gated: accept the licence on its page, then `hf auth login`",
        ),
        "facebook/VGGT_tracker_fixed": Origin(
            licence="VGGT License v1, non-commercial use only",
            commercial=False,
            url="https://huggingface.co/facebook/VGGT_tracker_fixed",
            files=("model_tracker_fixed_e20.pt",),
            note="the checkpoint of the published CO3D figures",
        ),
    },
)
VGGT.backbone = BACKBONES.register("vggt", BACKBONE)
