"""The analytic scene as a data set gives it, and the output of a perfect model."""

from __future__ import annotations

import torch
from analytic_scene import exact_depth, original_intrinsics, poses

from geoaccel.backbone import Geometry
from geoaccel.cameras import unproject_depth
from geoaccel.eval.data.scene import EvalFrame, EvalScene, make_scene


def pinhole_scene(size: tuple[int, int], frames: int = 3) -> EvalScene:
    """Images of the analytic scene with exact depth."""
    k = original_intrinsics(size)
    made = []
    for i, pose in enumerate(poses(frames)):
        depth = exact_depth(k, pose, size)
        image = (depth / 8).expand(3, *size).clone()
        made.append(
            EvalFrame(f"{i}", pose.double(), k.double(), read_image=lambda x=image: x, read_depth=lambda d=depth: d)
        )
    return make_scene("analytic", made, category="ball")


def exact_geometry(scene: EvalScene, transforms: list, size: tuple[int, int]) -> Geometry:
    """The output of a perfect model on the pixels of the network input."""
    assert scene.intrinsics is not None
    k = torch.stack([t.intrinsics_to_network(own) for t, own in zip(transforms, scene.intrinsics, strict=True)])
    pose = scene.cam_from_world
    depth = torch.stack([exact_depth(*pair, size) for pair in zip(k, pose, strict=True)])
    points = unproject_depth(depth.double(), k, pose)
    return Geometry(pose[None], k[None], depth[None], points[None].float(), torch.rand(1, len(pose), *size))
