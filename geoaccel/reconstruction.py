"""From photographs to a reconstruction: cameras, depth, points and confidence, and the files written from them.

Poses and axes are those of `geoaccel.cameras`. A reconstruction lives at the resolution of the network input; every
frame carries the transform back to its photograph, and whatever is written for other programs (COLMAP, nerfstudio)
is expressed in pixels of the original photographs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from geoaccel import export
from geoaccel.cameras import unproject_depth
from geoaccel.errors import UserError, UserTypeError
from geoaccel.point_cloud import PointCloud, random_rows
from geoaccel.registry import unknown

if TYPE_CHECKING:
    from geoaccel.backbone import Geometry
    from geoaccel.images import ImageBatch, ImageTransform
    from geoaccel.images.tensors import TensorBatch

logger = logging.getLogger(__name__)

CONF_PERCENTILE = 30.0
MAX_POINTS = 1_000_000


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What a model made of S photographs, as float32 tensors on the CPU.

    Attributes:
        cam_from_world: Poses [S, 4, 4], OpenCV axes.
        intrinsics: [S, 3, 3] in pixels of the network input, as `depth`.
        depth: z-depth [S, H, W] in the unit of the poses; 0 where the model predicted no finite number.
        points_world: [S, H, W, 3].
        conf: [S, H, W], higher is surer; only the order within a scene has a meaning.
        images: Network input [S, 3, H, W] in [0, 1].
        mask: Pixels that can be used [S, H, W]: not padding, not transparent, finite, in front of the camera.
        names: File names, one for each frame.
        transforms: From the original photographs to the network input.
        paths: Files of the photographs, None where there is none (tensors, video frames).
        read_original: Gives photograph i, upright RGB [H0, W0, 3] uint8; for tensors that is the network input.
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

    def __len__(self) -> int:
        return len(self.depth)

    def original_intrinsics(self) -> Tensor:  # [S, 3, 3]
        """Intrinsics in pixels of the original photographs."""
        return torch.stack([t.intrinsics_to_original(k) for t, k in zip(self.transforms, self.intrinsics, strict=True)])

    def original_depth(self, frame: int) -> Tensor:  # [H0, W0]
        """Depth at the resolution of one photograph, 0 where the network did not see it or gave no depth."""
        # NaN spreads through the interpolation, so that no pixel mixes a depth with a hole.
        depth = self.depth[frame].masked_fill(~self.mask[frame], torch.nan)
        return self.transforms[frame].depth_to_original(depth).nan_to_num(0.0)

    def original_points(self, frame: int) -> Tensor:  # [H0, W0, 3]
        """World point of every pixel of one photograph, unprojected from `original_depth`; NaN where that is 0."""
        depth = self.original_depth(frame)
        intrinsics = self.transforms[frame].intrinsics_to_original(self.intrinsics[frame])
        points = unproject_depth(depth, intrinsics, self.cam_from_world[frame])
        return torch.where(depth[..., None] > 0, points, torch.nan)

    def confidence_cut(self, conf_percentile: float) -> float:
        """The confidence that `conf_percentile` percent of the scene's valid pixels do not reach."""
        if not 0 <= conf_percentile < 100:
            raise UserError(f"conf_percentile={conf_percentile} is not in [0, 100); 0 keeps every point")
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
        """Select the points worth looking at.

        Args:
            conf_percentile: Leave out this share (in percent) of the scene's pixels, the least sure ones. A share
                and not a threshold, because confidences of different models and scenes have different scales.
            mask: Keep only these pixels (an object, for instance), on top of the confidence filter.
            max_points: Thin to this many points at random.
            seed: Of the thinning; torch's global generator is not touched.
        """
        keep = self.mask & (self.conf >= self.confidence_cut(conf_percentile))
        if mask is not None:
            if mask.shape != keep.shape:
                raise UserError(f"mask has shape {list(mask.shape)}, expected [S, H, W] = {list(keep.shape)}")
            keep = keep & mask.to(device=keep.device, dtype=torch.bool)
        frame, row, column = keep.nonzero(as_tuple=True)
        if len(frame) == 0:
            raise UserError("no point is left: mask and confidence filter remove every pixel; relax one of them")
        kept_share = len(frame) / int(self.mask.sum())
        if max_points is not None and len(frame) > max_points:
            drawn = random_rows(len(frame), max_points, seed)
            frame, row, column = frame[drawn], row[drawn], column[drawn]
        pixels = torch.stack([column, row], dim=-1) + 0.5
        for i, transform in enumerate(self.transforms):
            pixels[frame == i] = transform.pixels_to_original(pixels[frame == i])
        return PointCloud(
            points=self.points_world[frame, row, column],
            colors=(self.images[frame, :, row, column].clamp(0, 1) * 255).round().to(torch.uint8),
            frame=frame,
            pixels=pixels,
            conf=self.conf[frame, row, column],
            kept_share=kept_share,
        )

    def save(
        self,
        folder: str | Path,
        formats: Sequence[str] = export.DEFAULT_FORMATS,
        *,
        overwrite: bool = False,
        conf_percentile: float = CONF_PERCENTILE,
        mask: Tensor | None = None,  # [S, H, W]
        max_points: int | None = MAX_POINTS,
        seed: int = 0,
    ) -> PointCloud:
        """Write the reconstruction: a new folder appears at once, or, if anything fails, not at all.

        A folder that exists is filled when all is complete, ``files.json`` last.

        Args:
            folder: Where to; must not exist, be empty, or hold an earlier result (with `overwrite`).
            formats: Of `geoaccel.export.FORMATS`; each says in its file what it writes.
            overwrite: Replace an earlier result once the new one is complete; refused where a photograph lies in it.
            conf_percentile: As in `point_cloud`, like `mask`, `max_points` and `seed`.

        Returns:
            The points that were written; its `kept_share` says how much the filter left.
        """
        export.check_formats(formats)
        read = [path for path in self.paths if path is not None]
        export.check_output_folder(folder, overwrite=overwrite, needed=read)
        cloud = self.point_cloud(conf_percentile=conf_percentile, mask=mask, max_points=max_points, seed=seed)
        export.write(self, cloud, folder, formats, overwrite=overwrite)
        logger.info("%d points in %s (%.1f %% of the pixels kept)", len(cloud), folder, 100 * cloud.kept_share)
        return cloud


def reconstruct(
    images_or_paths: Any,
    *,
    model: nn.Module,
    points: Literal["depth", "head"] = "depth",
    device: torch.device | str | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    progress: bool = False,
) -> Reconstruction:
    """Reconstruct a scene from two or more photographs.

    Example:
        >>> model = geoaccel.load_model("vggt-mini")
        >>> geoaccel.reconstruct("photos/", model=model).save("scene/", ["ply", "colmap"])

    Args:
        images_or_paths: Folder, list of files, glob or video, read as the model wants it; or a tensor [S, 3, H, W] in
            [0, 1] at a size that the model accepts.
        model: A geoaccel model, accelerated or not.
        points: Where world points come from: ``depth`` unprojects the depth with the predicted cameras, so that points
            project exactly onto their pixels; ``head`` takes what the model's own point head says.
        device: Moves the model there first; by default it stays where it is.
        fps: Frames taken per second, of a video.
        max_frames: Use at most this many images.
        progress: Show a progress bar while reading.
    """
    if not isinstance(model, nn.Module):
        raise UserTypeError(f"model is {model!r}; load it first: geoaccel.load_model(...)")
    heads = _needed_heads(model, points)
    batch = _as_batch(images_or_paths, model, fps=fps, max_frames=max_frames, progress=progress)
    num_frames, _, height, width = batch.images.shape
    if num_frames < 2:
        raise UserError(
            f"got {num_frames} image; a reconstruction needs at least two of the same scene; add photographs, or call "
            "the model itself for a single view: model(images)"
        )
    _check_memory(model, num_frames, (height, width))
    if device is not None:
        model = model.to(device)
    return _from_geometry(_predict(model, batch.images, heads), batch, points)


@torch.inference_mode()
def _predict(
    model: Any,
    images: Tensor,  # [S, 3, H, W]
    heads: Sequence[str],
) -> Geometry:
    # The network normalises in float32 and casts afterwards: bfloat16 has not even 8 bits for a pixel.
    device = next(model.parameters()).device
    predictions = model(images[None].to(device=device, dtype=torch.float32), heads=heads)
    return model.backbone.geometry(predictions, tuple(images.shape[-2:]))


def _from_geometry(geometry: Geometry, batch: ImageBatch | TensorBatch, points: str) -> Reconstruction:
    """Take the one scene out of a batch of size one, to float32 on the CPU, and mark what cannot be used."""
    fields = (geometry.cam_from_world, geometry.intrinsics, geometry.depth, geometry.conf)
    poses, intrinsics, depth, conf = (x[0].detach().to("cpu", torch.float32, copy=True) for x in fields)
    _require_finite_cameras(poses, intrinsics, batch.names)
    poses[:, :3, :3] = _nearest_rotations(poses[:, :3, :3])
    if points == "head":
        points_world = geometry.points_world[0].detach().to("cpu", torch.float32, copy=True)
    else:
        points_world = unproject_depth(depth, intrinsics, poses)

    finite = depth.isfinite() & conf.isfinite() & points_world.isfinite().all(dim=-1)
    if not finite.any():
        raise UserError(
            "the model predicted no finite depth for any pixel; its weights or its precision are broken: "
            "try dtype=torch.float32 and an unaccelerated model"
        )
    if not finite.all():
        share = 100 * (~finite).float().mean().item()
        logger.warning("%.2f %% of the pixels have no finite prediction and are left out", share)
        depth[~finite], conf[~finite], points_world[~finite] = 0.0, 0.0, 0.0
    return Reconstruction(
        cam_from_world=poses,
        intrinsics=intrinsics,
        depth=depth,
        points_world=points_world,
        conf=conf,
        images=batch.images.detach().to("cpu", torch.float32),
        mask=batch.valid_mask & finite & (depth > 0),
        names=list(batch.names),
        transforms=list(batch.transforms),
        paths=list(batch.paths),
        read_original=batch.original,
    )


def _as_batch(
    images_or_paths: Any, model: Any, *, fps: float | None, max_frames: int | None, progress: bool
) -> ImageBatch | TensorBatch:
    """Read the photographs, or wrap a tensor as if each frame were a photograph of its own size."""
    from geoaccel.images import ImageBatch, load_images
    from geoaccel.images.tensors import tensor_batch

    if isinstance(images_or_paths, ImageBatch):
        return images_or_paths
    if not isinstance(images_or_paths, Tensor):
        fits = partial(_check_memory, model, unread=True)
        options: Any = {"fps": fps, "max_frames": max_frames, "progress": progress, "fits": fits}
        return load_images(images_or_paths, model.preprocess, **options)
    return tensor_batch(images_or_paths, fps=fps, max_frames=max_frames)


def _needed_heads(model: Any, points: str) -> list[str]:
    """Leave out what is not looked at: tracks, and points of a model that has depth as well."""
    if points not in ("depth", "head"):
        raise UserError(unknown("source of points", points, ["depth", "head"]))
    if points == "head" and "point" not in model.heads:
        raise UserError(f"points='head' needs a point head; this model has {', '.join(model.heads)}; use 'depth'")
    unused = {"track"} | ({"point"} if points == "depth" and "depth" in model.heads else set())
    return [head for head in model.heads if head not in unused]


def _check_memory(model: nn.Module, frames: int, size: tuple[int, int], *, unread: bool = False) -> None:
    from geoaccel.memory import check_memory

    check_memory(model, frames=frames, size=size, unread=unread)


def _require_finite_cameras(
    cam_from_world: Tensor,  # [S, 4, 4]
    intrinsics: Tensor,  # [S, 3, 3]
    names: Sequence[str],
) -> None:
    finite = cam_from_world.isfinite().flatten(1).all(dim=1) & intrinsics.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
        raise UserError(
            f"the model predicted no finite camera (NaN or infinity) for {len(bad)} of {len(names)} images, first "
            f"{bad[0]}; its weights or its precision are broken: try dtype=torch.float32 and an unaccelerated model"
        )


def _nearest_rotations(
    matrices: Tensor,  # [S, 3, 3]
) -> Tensor:  # [S, 3, 3]
    """Remove the rounding of low precision: files store rotations as quaternions, which know nothing but rotations."""
    u, _, vt = torch.linalg.svd(matrices.double())
    u[:, :, 2] *= torch.linalg.det(u @ vt)[:, None]
    return (u @ vt).to(matrices.dtype)
