"""An evaluation scene as the network sees it, and the ground truth on the network's pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.backbone import Preprocess
from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalFrame, EvalScene
from geoaccel.images import ImageTransform, load_images


@dataclass(frozen=True)
class Truth:
    """Ground truth of the frames of a scene, on the pixels of the network input.

    Attributes:
        cam_from_world: [S, 4, 4], float64.
        depth: z-depth [S, H, W], 0 where unknown; None if the scene has no depth.
        valid: [S, H, W], where depth is known; None if `depth` is.
        points_world: [S, H, W, 3] of the valid pixels; None if `depth` is, or intrinsics are unknown.
    """

    cam_from_world: Tensor
    depth: Tensor | None = None
    valid: Tensor | None = None
    points_world: Tensor | None = None


def network_input(
    scene: EvalScene, preprocess: Preprocess, *, resize: bool
) -> tuple[Tensor, list[ImageTransform]]:  # [1, S, 3, H, W]
    """The images of a scene, ready for the model.

    Args:
        scene: The scene.
        preprocess: The model's rule.
        resize: If False, use the images at their stored size; both sides must be multiples of the patch size.

    Raises:
        ValueError: If an image cannot be read or does not fit.
    """
    if resize:
        images = [frame.image_path or frame.image() for frame in scene.frames]
        batch = load_images(images, preprocess)
        return batch.images[None], batch.transforms
    stored = scene.images()
    height, width = stored.shape[-2:]
    if height % preprocess.patch_size or width % preprocess.patch_size:
        raise UserError(
            f"{scene.name}: {width} x {height} pixels are not multiples of the patch size {preprocess.patch_size}; "
            "choose another size or set data.resize=true"
        )
    same = ImageTransform((height, width), (height, width), (1.0, 1.0), (0.0, 0.0))
    return stored[None], [same] * len(scene.frames)


def truth_of(scene: EvalScene, transforms: list[ImageTransform]) -> Truth:
    """Resample a scene's ground truth to the pixels of the network input.

    With lens distortion, and so without intrinsics, depth is still valid per pixel; only points are not available.

    Raises:
        ValueError: If a depth map cannot be read, or no pixel of any is known.
    """
    poses, intrinsics = scene.cam_from_world, scene.intrinsics
    depth = resampled_depth(scene, transforms)
    if depth is None:
        return Truth(poses)
    valid = depth > 0
    if not valid.any():
        raise UserError("no depth map has a known pixel in the network input; leave the scene out")
    if intrinsics is None:
        return Truth(poses, depth, valid)
    network_intrinsics = torch.stack([t.intrinsics_to_network(k) for t, k in zip(transforms, intrinsics, strict=True)])
    points = unproject_depth(depth.double(), network_intrinsics, poses).float()
    return Truth(poses, depth, valid, points)


def resampled_depth(
    scene: EvalScene,
    transforms: Sequence[ImageTransform],
) -> Tensor | None:  # [S, H, W]
    """All depth maps on the pixels after the transforms; None if no frame has one.

    Values are from the nearest pixel: interpolating across an edge would invent surfaces. One full-size map is in
    memory at a time: those of ETH3D take 100 MB each.
    """

    def read(frame: EvalFrame, transform: ImageTransform) -> Tensor | None:
        depth = frame.depth()
        return None if depth is None else transform.nearest(depth)

    maps = [read(*pair) for pair in zip(scene.frames, transforms, strict=True)]
    if all(depth is None for depth in maps):
        return None
    sizes = sorted({transform.network_size for transform in transforms})
    if len(sizes) > 1:
        raise UserError(f"{scene.name}: frames differ in size ({sizes[0]}, {sizes[-1]}); leave the scene out")
    return torch.stack([torch.zeros(sizes[0]) if depth is None else depth for depth in maps])
