"""``reconstruction.npz``: everything predicted, at the resolution of the network input, for your own programs.

Arrays: ``cam_from_world [S, 4, 4]``, ``intrinsics [S, 3, 3]``, ``depth [S, H, W]``, ``points_world [S, H, W, 3]``,
``conf [S, H, W]``, ``mask [S, H, W]``, ``selected [S, H, W]`` (pixels kept by the user's masks; all without masks),
``images [S, H, W, 3]`` (uint8), ``names [S]``, ``unit``, ``cut`` (percentage of the usable, selected pixels that the
points written with it left out for low confidence), and the mapping to the original images:
``original_intrinsics [S, 3, 3]``, ``original_size [S, 2]`` (height, width), ``scale [S, 2]`` and
``offset [S, 2]`` (x, y) with ``u_network = scale * u_original + offset``. Not compressed: that would be slow and gain
little on floats.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.view import least_sure
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

FILE = "reconstruction.npz"

WRITES["npz"] = (FILE,)


@FORMATS.register("npz")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write all arrays; the points are all of them, not only those of the filtered cloud."""
    tensors = ("cam_from_world", "intrinsics", "depth", "points_world", "conf", "mask")
    transforms = scene.transforms
    selected = torch.ones_like(scene.mask) if scene.selected is None else scene.selected
    images = (scene.images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    np.savez(
        folder / FILE,
        **{name: getattr(scene, name).numpy() for name in tensors},
        selected=selected.numpy(),
        images=images.numpy(),
        names=np.array(scene.names),
        unit=np.array(scene.unit),
        cut=np.array(least_sure(scene, cloud)),
        original_intrinsics=scene.original_intrinsics().numpy(),
        original_size=np.array([t.original_size for t in transforms]),
        scale=np.array([t.scale for t in transforms]),
        offset=np.array([t.offset for t in transforms]),
    )
