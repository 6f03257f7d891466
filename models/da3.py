"""Depth Anything 3, any view (Lin et al., arXiv 2511.10647): small, base, large and giant.

Predicts depth, cameras and rays from images of one scene, with their cameras if known, in one pass. One transformer is
encoder and trunk: its first blocks attend within frames, later ones alternate between frame and global attention. Our
own implementation with upstream's parameter names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from geoaccel.backbone import GIVEN, Backbone, Conditioning, FeatureStream, Geometry, Origin, Preprocess, register
from geoaccel.cameras import to_homogeneous, unproject_depth
from geoaccel.conditions import check_intrinsics, check_poses
from geoaccel.cost import Trunk
from geoaccel.errors import UserError
from geoaccel.models.any_view_files import OUT_LAYERS, config_from_module, config_from_names, from_upstream
from geoaccel.models.layers.any_view import AnyView, Features
from geoaccel.models.layers.camera_codes import CameraDecoder, CameraEncoder, decode
from geoaccel.models.layers.dual_head import DualHead, dual_bytes
from geoaccel.models.layers.encoder import check_images, in_batch
from geoaccel.models.layers.given_cameras import arguments, settle
from geoaccel.models.layers.kept_layers import KeptLayer, first_tokens_of, frames_of
from geoaccel.models.layers.outputs import HeadBytes, joined
from geoaccel.models.layers.ray_pose import cameras_from_rays
from geoaccel.models.planned_network import PlannedNetwork
from geoaccel.network_config import NetworkConfig
from geoaccel.precision import own_precision

HEADS = ("depth", "ray", "camera")


@dataclass(frozen=True, kw_only=True)
class DA3Config(NetworkConfig):
    """Sizes; the defaults are those of the base network.

    Attributes:
        img_size: Side in pixels of the square images that the position embedding was learned on.
        patch_size: Patch side in pixels.
        embed_dim, depth, num_heads: Width, blocks and heads.
        alt_start: The first block after the encoder; from it on odd blocks attend globally.
        out_layers: The four blocks that the dense head reads; the camera is read off the last.
        head_features, head_out_channels: Channels of the dense head.
        cam_enc_trunk_depth, cam_enc_num_heads: Blocks and heads of the encoder for given cameras.
        rope_frequency: Base of the rotary embedding.
        swiglu: 1 for gated MLPs, as in the giant network.
        layer_scale: Initial factor of the residual branches.
    """

    may_be_zero = ("swiglu",)

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    alt_start: int = 4
    out_layers: tuple[int, ...] = (5, 7, 9, 11)
    head_features: int = 128
    head_out_channels: tuple[int, ...] = (96, 192, 384, 768)
    cam_enc_trunk_depth: int = 4
    cam_enc_num_heads: int = 16
    rope_frequency: float = 100
    swiglu: int = 0
    layer_scale: float = 1.0

    def check(self) -> None:
        layers = self.out_layers
        ordered = len(layers) == 4 and list(layers) == sorted(set(layers))
        if not ordered or layers[0] < self.alt_start or layers[3] >= self.depth:
            raise UserError(
                f"out_layers {list(layers)} are not four blocks in order between alt_start, {self.alt_start}, and the "
                f"last, {self.depth - 1}"
            )


class DA3(PlannedNetwork):
    """The network, at any size."""

    config: DA3Config

    def __init__(self, config: DA3Config) -> None:
        super().__init__(config)
        c = config
        # Upstream's name for this module; the attribute `backbone` is the descriptor.
        self.backbone = nn.Module()  # type: ignore[assignment]
        self.vit.pretrained = AnyView(
            c.img_size,
            c.patch_size,
            c.embed_dim,
            c.depth,
            c.num_heads,
            alt_start=c.alt_start,
            rope_frequency=c.rope_frequency,
            gated=bool(c.swiglu),
            layer_scale=c.layer_scale,
        )
        width = 2 * c.embed_dim
        self.head = DualHead(width, patch_size=c.patch_size, features=c.head_features, out_channels=c.head_out_channels)
        self.cam_enc = CameraEncoder(c.embed_dim, c.cam_enc_trunk_depth, c.cam_enc_num_heads, c.layer_scale)
        self.cam_dec = CameraDecoder(width)

    @property
    def vit(self) -> Any:
        """Upstream's ``backbone``."""
        return self._modules["backbone"]

    @property
    def trunk_module(self) -> AnyView:
        """The transformer."""
        return self.vit.pretrained

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that this network has."""
        return HEADS

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared for this network."""
        # The released code resizes the long side to 504 pixels, with a position embedding for 518.
        side = round(504 / 518 * self.config.img_size / self.config.patch_size) * self.config.patch_size
        return Preprocess("long", side, self.config.patch_size)

    @property
    def trunk(self) -> Trunk:
        """Sizes of everything but the heads, without given cameras."""
        kinds = self.trunk_module.kinds()
        return Trunk(
            width=self.config.embed_dim,
            patch_size=self.config.patch_size,
            encoder_blocks=kinds.count("encoder"),
            frame_blocks=kinds.count("frame"),
            global_blocks=kinds.count("global"),
            encoder_special=1,
            special=1,
        )

    def kept_layers(self, heads: Collection[str]) -> int:
        return max(1, len(self.layers_read(heads)))

    def head_bytes(self, size: tuple[int, int], heads: Collection[str]) -> HeadBytes:
        c = self.config
        tokens = 2 * c.embed_dim * self.trunk_module.cls_token.element_size()  # of 4 layers, in numbers of float32
        return dual_bytes(size, c.patch_size, c.head_features, tokens, heads)

    def layers_read(self, heads: Collection[str]) -> set[int]:
        """Blocks that these heads read."""
        layers = self.config.out_layers
        return set(layers if {"depth", "ray"} & set(heads) else layers[-1:] if heads else ())

    def forward(
        self,
        images: Tensor,  # [B, S, 3, H, W] or [S, 3, H, W], in [0, 1]
        extrinsics: Tensor | None = None,  # [B, S, 4, 4] or [S, 4, 4]
        intrinsics: Tensor | None = None,  # [B, S, 3, 3] or [S, 3, 3], pixels
        *,
        heads: Collection[str] | None = None,
        frames_chunk_size: int = 8,
        use_ray_pose: bool = False,
        ref_view_strategy: str = "saddle_balanced",
    ) -> dict[str, Tensor]:
        """Run the heads; outputs have upstream's names. Heads and the camera encoder run in float32.

        Args:
            images: Images of one scene in any order; H and W are multiples of the patch size.
            extrinsics: Known ``cam_from_world``, of all frames and together with intrinsics. Upstream's network wants
                them relative to the first and scaled (:func:`layers.given_cameras.normalised`).
            intrinsics: Known intrinsics.
            heads: Subset of ``depth``, ``ray``, ``camera``; all by default.
            frames_chunk_size: Frames at a time in the dense head.
            use_ray_pose: Cameras from the rays instead of the camera decoder.
            ref_view_strategy: How the reference view is selected from three or more frames without known cameras.

        Returns:
            ``depth`` and ``depth_conf`` [B, S, H, W]; ``ray`` [B, S, 8h, 8w, 6] (direction, origin) and ``ray_conf`` on
            a grid of h x w patches; ``extrinsics`` [B, S, 3, 4] (``cam_from_world``, OpenCV axes) and ``intrinsics``
            [B, S, 3, 3], with ``pose_enc`` [B, S, 9] that they were decoded from.

        Raises:
            ValueError: For a wrong shape, an unknown head or name, or impossible cameras.
        """
        scene, images = images, in_batch(images)
        if images is not scene:
            extrinsics, intrinsics = (None if t is None else t[None] for t in (extrinsics, intrinsics))
        wanted = self.chosen(heads)
        if use_ray_pose and "camera" in wanted and "ray" not in wanted:
            raise UserError("use_ray_pose needs the head 'ray'; add it to heads")
        check_images(images, self.config.patch_size)
        tokens = self._camera_tokens(images, extrinsics, intrinsics)
        features = self.features(images, self.layers_read(wanted), tokens, ref_view_strategy)
        frames_chunk_size = self.frames_in_heads(self.trunk_module, frames_chunk_size)
        return self.predict(features, images, wanted, frames_chunk_size, use_ray_pose)

    def features(
        self,
        images: Tensor,  # [B, S, 3, H, W] in [0, 1]
        keep: Collection[int],
        camera_tokens: Tensor | None = None,  # [B, S, C]
        ref_view_strategy: str = "saddle_balanced",
    ) -> Features:
        """Outputs of the transformer after some blocks."""
        vit = self.trunk_module
        return vit(images, keep, camera_tokens=camera_tokens, reference=ref_view_strategy)

    def _camera_tokens(
        self, images: Tensor, extrinsics: Tensor | None, intrinsics: Tensor | None
    ) -> Tensor | None:  # [B, S, C]
        if extrinsics is None and intrinsics is None:
            return None
        if extrinsics is None or intrinsics is None:
            given, missing = ("intrinsics", "extrinsics") if extrinsics is None else ("extrinsics", "intrinsics")
            raise UserError(f"{given} were given without {missing}; give both, for all frames, or neither")
        extrinsics = to_homogeneous(extrinsics)
        check_poses(extrinsics, images.shape[:2])
        check_intrinsics(intrinsics, images.shape[:2])
        with own_precision(self.trunk_module.cls_token.device):
            return self.cam_enc(extrinsics, intrinsics, tuple(images.shape[-2:]))

    def predict(
        self,
        features: Features,
        images: Tensor,  # [B, S, 3, H, W]
        heads: Collection[str],
        frames_chunk_size: int = 8,
        use_ray_pose: bool = False,
    ) -> dict[str, Tensor]:
        """Run the heads on the features of the transformer; arguments as in :meth:`forward`."""
        out: dict[str, Tensor] = {}
        if not heads:
            return out
        vit, size, layers = self.trunk_module, (images.shape[-2], images.shape[-1]), self.config.out_layers
        last = features.layers[layers[-1]]

        def maps(chunk: slice) -> dict[str, Tensor]:
            tokens = [vit.patches(frames_of(features.layers[layer], chunk)).flatten(0, 1) for layer in layers]
            return self.head(tokens, size, heads)

        with own_precision(vit.cls_token.device):
            if {"depth", "ray"} & set(heads):
                shape = (images.shape[0], images.shape[1])
                out = joined(shape, frames_chunk_size, maps, leave=isinstance(last, KeptLayer))
            if "camera" in heads:
                first = first_tokens_of(last)
                assert first is not None
                out["pose_enc"] = self.cam_dec(first[:, :, 0])
                cameras = decode(out["pose_enc"], size)
                if use_ray_pose:
                    cameras = cameras_from_rays(out["ray"], out["ray_conf"], size)
                out["extrinsics"], out["intrinsics"] = cameras
        return out


def geometry(predictions: Mapping[str, Tensor], size: tuple[int, int]) -> Geometry:
    """Predictions in geoaccel's conventions.

    Raises:
        ValueError: If depth or cameras were not predicted.
    """
    if not {"depth", "extrinsics"} <= set(predictions):
        raise UserError("geometry needs the depth and camera heads; run the model with both")
    depth, intrinsics = predictions["depth"].float(), predictions["intrinsics"].float()
    cam_from_world = to_homogeneous(predictions["extrinsics"].float())
    points = unproject_depth(depth, intrinsics, cam_from_world)
    return Geometry(cam_from_world, intrinsics, depth, points, predictions["depth_conf"].float())


def sites(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The attention modules of the transformer."""
    vit: Any = module.get_submodule("backbone.pretrained")
    found: dict[str, list[nn.Module]] = {"encoder": [], "frame": [], "global": []}
    for kind, block in zip(vit.kinds(), vit.blocks, strict=True):
        found[kind].append(block.attn)
    return found


def _layer(model: DA3, layer: int | None) -> int:
    """Index among the global blocks; by default the last, from which the camera is read."""
    count = model.trunk_module.kinds().count("global")
    layer = count - 1 if layer is None else layer
    if not -count <= layer < count:
        raise UserError(f"layer={layer} does not exist: {count} layers")
    return layer % count


def _read(model: DA3, images: Tensor, layer: int, predict: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Features of one global block, and the predictions of the same forward except rays."""
    check_images(images, model.config.patch_size)
    block = [index for index, kind in enumerate(model.trunk_module.kinds()) if kind == "global"][layer]
    features = model.features(images, {block} | set(model.config.out_layers if predict else ()))
    found = features.layers[block]
    assert isinstance(found, Tensor), "no plan is followed here"
    return found, model.predict(features, images, ("depth", "camera") if predict else ())


TINY = DA3Config(
    img_size=112, embed_dim=32, depth=6, num_heads=2, alt_start=2, out_layers=(2, 3, 4, 5), head_features=16,
    head_out_channels=(8, 12, 16, 16), cam_enc_trunk_depth=1, cam_enc_num_heads=4,
)  # fmt: skip
APACHE = "Apache-2.0 (weights and code)"
NON_COMMERCIAL = "CC BY-NC 4.0 (weights; the code is Apache-2.0)"
NO_SPLATS = "its head for Gaussian splats is left out"
SMALL = {"embed_dim": 384, "num_heads": 6, "head_features": 64, "head_out_channels": (48, 96, 192, 384)}
WIDE = {"head_features": 256, "head_out_channels": (256, 512, 1024, 1024)}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "alt_start": 8, "out_layers": OUT_LAYERS[24], **WIDE}
GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "alt_start": 13, "out_layers": OUT_LAYERS[40], **WIDE}
GIANT |= {"swiglu": 1}


def _origin(config: Mapping[str, Any], licence: str = NON_COMMERCIAL, note: str = "") -> Origin:
    return Origin(licence, licence == APACHE, ("model.safetensors",), note, config)


BACKBONE = register(
    Backbone(
        name="da3",
        network=DA3,
        config=DA3Config,
        tiny=TINY,
        class_names=("DepthAnything3Net",),
        children=("backbone", "head", "cam_enc", "cam_dec"),
        config_from_names=config_from_names,
        config_from_module=config_from_module,
        from_upstream=from_upstream,
        geometry=geometry,
        sites=sites,
        patch_embedding="backbone.pretrained.patch_embed.proj",
        # Layers used only with given cameras are not quantized: images alone cannot calibrate them.
        quantizable=("backbone.*",),
        heads_in_float32=("head", "cam_enc", "cam_dec"),
        features=FeatureStream(_layer, _read),
        conditions=Conditioning(("poses", "intrinsics"), arguments, settle, GIVEN, together=True),
        origins={
            "depth-anything/DA3-SMALL": _origin(SMALL, APACHE),
            "depth-anything/DA3-BASE": _origin({}, APACHE),
            "depth-anything/DA3-LARGE": _origin(LARGE),
            "depth-anything/DA3-LARGE-1.1": _origin(LARGE),
            "depth-anything/DA3-GIANT": _origin(GIANT, note=NO_SPLATS),
            "depth-anything/DA3-GIANT-1.1": _origin(GIANT, note=NO_SPLATS),
        },
    )
)
