"""A scene of posed images with depth, in geoaccel's conventions: what exporters write.

Poses and axes are those of `geoaccel.cameras`. A scene has the resolution of the network input; every frame has the
transform from its original image, and files for other programs (COLMAP, nerfstudio) are in pixels of the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from geoaccel.backbone import ARBITRARY
from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError
from geoaccel.point_cloud import PointCloud, check_max_points, random_rows

if TYPE_CHECKING:
    from geoaccel.images import ImageTransform
    from geoaccel.tracks import Tracks

CONF_PERCENTILE = 30.0


def check_conf_percentile(conf_percentile: float) -> None:
    """Refuse a percentage that leaves no point."""
    if isinstance(conf_percentile, bool) or not isinstance(conf_percentile, Real):
        raise UserError(
            f"conf_percentile={conf_percentile!r} is not a number; give one in [0, 100), 0 keeps every point"
        )
    if not 0 <= conf_percentile < 100:
        raise UserError(f"conf_percentile={conf_percentile} is not in [0, 100); 0 keeps every point")


@dataclass(frozen=True, eq=False, repr=False)
class Scene:
    """Cameras, depth, points and confidence of S images, as float32 tensors on the CPU.

    Attributes:
        cam_from_world: Poses [S, 4, 4], OpenCV axes.
        intrinsics: [S, 3, 3] in pixels of the network input, like `depth`.
        depth: z-depth [S, H, W] in the unit of the poses; 0 where the prediction is not finite.
        points_world: [S, H, W, 3].
        conf: [S, H, W], higher is more confident; only the order within a scene is meaningful.
        images: Network input [S, 3, H, W] in [0, 1].
        mask: Usable pixels [S, H, W]: not padding, not transparent, finite, in front of the camera.
        names: File names, one for each frame.
        transforms: From the original images to the network input.
        paths: Files of the images, None without a file (tensors, video frames).
        read_original: Returns image i, upright RGB [H0, W0, 3] uint8; for tensors the network input.
        unit: Unit of poses, depth and points; ``arbitrary`` if the scale is unknown.
        tracks: Feature tracks measured in the images; None if not measured.
        selected: Pixels that the user's masks keep [S, H, W]; None: all.
        mask_files: The mask of each image, if there are masks.
        numbers: Index of each image among those given, from 0; empty if none was left out.
        notes: Further entries of ``files.json``, as plain data.
    """

    cam_from_world: Tensor
    intrinsics: Tensor
    depth: Tensor
    points_world: Tensor
    conf: Tensor
    images: Tensor
    mask: Tensor
    names: list[str]
    transforms: list[ImageTransform]
    paths: list[Path | None]
    read_original: Callable[[int], Tensor]
    unit: str = ARBITRARY
    tracks: Tracks | None = None
    selected: Tensor | None = None
    mask_files: list[Path] | None = None
    numbers: list[int] = field(default_factory=list)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.depth)

    def __repr__(self) -> str:
        """Three lines, whatever the size."""
        height, width = self.depth.shape[1:]
        named = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        depth = self.depth[self.mask]
        seen = f"depth {depth.min():.3g} to {depth.max():.3g}" if len(depth) else "no depth"
        return (
            f"{type(self).__name__} of {len(self)} images, each {height} x {width} pixels (H x W) for the network\n"
            f"  {named}\n"
            f"  {seen}, {100 * self.mask.float().mean():.0f} % of the pixels usable"
        )

    def of_frames(self, kept: Sequence[int]) -> Self:
        """The scene with some of its frames, in this order; tracks with at least two views stay."""
        changed: dict[str, Any] = {} if self.tracks is None else {"tracks": self.tracks.of_frames(kept)}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Tensor):
                changed[part.name] = value[list(kept)]
            elif isinstance(value, list) and value:
                changed[part.name] = [value[frame] for frame in kept]
        changed.setdefault("numbers", list(kept))
        return replace(self, **changed, read_original=lambda frame: self.read_original(kept[frame]))

    def original_intrinsics(self) -> Tensor:  # [S, 3, 3]
        """Intrinsics in pixels of the original images."""
        return torch.stack([t.intrinsics_to_original(k) for t, k in zip(self.transforms, self.intrinsics, strict=True)])

    @property
    def inputs(self) -> list[Path]:
        """Input files of the scene: photographs and masks."""
        return [path for path in self.paths if path is not None] + (self.mask_files or [])

    @property
    def kept(self) -> Tensor:  # [S, H, W] bool
        """Usable pixels that the masks keep, whatever their confidence."""
        return self.mask if self.selected is None else self.mask & self.selected

    def usable(self, conf_percentile: float) -> Tensor:  # [S, H, W] bool
        """Pixels that the masks and the confidence filter of `point_cloud` keep."""
        return self.kept & (self.conf >= self.confidence_cut(conf_percentile))

    def selecting(
        self,
        mask: Tensor,  # [S, H, W]
    ) -> Self:
        """The scene with only these pixels selected, of those that were.

        Raises:
            UserError: If the shape of the mask differs from that of the depth.
        """
        if mask.shape != self.mask.shape:
            raise UserError(f"mask has shape {list(mask.shape)}, expected [S, H, W] = {list(self.mask.shape)}")
        mask = mask.to(device=self.mask.device, dtype=torch.bool)
        return replace(self, selected=mask if self.selected is None else self.selected & mask)

    def original_depth(self, frame: int) -> Tensor:  # [H0, W0]
        """Depth at the resolution of one original image, 0 where the network did not see it or predicted no depth."""
        # NaN propagates through the interpolation, so that no pixel mixes depth with a hole.
        depth = self.depth[frame].masked_fill(~self.mask[frame], torch.nan)
        return self.transforms[frame].depth_to_original(depth).nan_to_num(0.0)

    def original_points(self, frame: int) -> Tensor:  # [H0, W0, 3]
        """World point of every pixel of one original image, from `original_depth`; NaN where that is 0."""
        depth = self.original_depth(frame)
        intrinsics = self.transforms[frame].intrinsics_to_original(self.intrinsics[frame])
        points = unproject_depth(depth, intrinsics, self.cam_from_world[frame])
        return torch.where(depth[..., None] > 0, points, torch.nan)

    def confidence_cut(self, conf_percentile: float) -> float:
        """The given percentile of confidence over the scene's valid pixels."""
        check_conf_percentile(conf_percentile)
        valid = self.conf[self.mask]
        return float(np.percentile(valid.numpy(), conf_percentile)) if len(valid) else 0.0

    def point_cloud(
        self,
        *,
        conf_percentile: float = CONF_PERCENTILE,
        mask: Tensor | None = None,  # [S, H, W]
        max_points: int | None = None,
        seed: int = 0,
    ) -> PointCloud:
        """Select the confident points.

        Args:
            conf_percentile: Leave out this percentage of the scene's pixels, the least confident ones. A percentage and
                not a threshold, because confidences of different models and scenes have different scales.
            mask: Keep only these pixels (an object, for instance), in addition to the confidence filter and `selected`.
            max_points: Downsample to this many points at random.
            seed: Seed of the downsampling; torch's global generator is not used.
        """
        check_max_points(max_points)
        keep = (self if mask is None else self.selecting(mask)).usable(conf_percentile)
        frame, row, column = keep.nonzero(as_tuple=True)
        if len(frame) == 0 and not self.mask.any():
            raise UserError(
                "no point is left: no pixel is usable, as the images are transparent everywhere or have no finite "
                "depth; give other images"
            )
        if len(frame) == 0:
            raise UserError("no point is left: mask and confidence filter remove every pixel; relax one of them")
        kept_share = len(frame) / int(self.mask.sum())
        if max_points is not None and len(frame) > max_points:
            sampled = random_rows(len(frame), max_points, seed)
            frame, row, column = frame[sampled], row[sampled], column[sampled]
        pixels = torch.stack([column, row], dim=-1) + 0.5
        of_each = pixels.split(torch.bincount(frame, minlength=len(self)).tolist())  # frames ascend
        pixels = torch.cat([t.pixels_to_original(own) for t, own in zip(self.transforms, of_each, strict=True)])
        return PointCloud(
            points=self.points_world[frame, row, column],
            colors=(self.images[frame, :, row, column].clamp(0, 1) * 255).round().to(torch.uint8),
            frame=frame,
            pixels=pixels,
            conf=self.conf[frame, row, column],
            kept_share=kept_share,
        )
