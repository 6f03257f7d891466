"""From images to a reconstruction: cameras, depth, points and confidence, and the files written from them.

What a reconstruction holds, and in which axes and pixels, is said in `geoaccel.scene`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from geoaccel import export
from geoaccel.backbone import require_module
from geoaccel.cameras import unproject_depth
from geoaccel.conditions import Conditions
from geoaccel.edges import check_edge_filter, depth_edges
from geoaccel.errors import UserError
from geoaccel.outliers import name_outliers
from geoaccel.point_cloud import PointCloud
from geoaccel.reference import Reference, check_reference, reference_first
from geoaccel.registry import unknown
from geoaccel.scene import CONF_PERCENTILE, Scene

if TYPE_CHECKING:
    from geoaccel.backbone import Geometry
    from geoaccel.images import ImageBatch
    from geoaccel.images.tensors import TensorBatch

logger = logging.getLogger(__name__)

MAX_POINTS = 1_000_000


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction(Scene):
    """Reconstruction of S images: a scene that can be written to files."""

    def without_edges(self, jump: float) -> Reconstruction:
        """The same without the pixels at edges of the depth, in `mask` and so in all that is written.

        Args:
            jump: As in `geoaccel.edges.depth_edges`; 0.09 is a good one.

        Raises:
            ValueError: If no pixel is left.
        """
        mask = self.mask & ~depth_edges(self.depth, self.mask, jump)
        if not mask.any():
            raise UserError(f"edge_filter={jump:g} leaves no pixel; take a larger one, or none (--edge-filter)")
        return replace(self, mask=mask)

    def _repr_html_(self) -> str:
        """The same lines with the contact sheet, for notebooks."""
        import base64
        import html
        import io

        from geoaccel.export.contact_sheet import write_contact_sheet

        picture = io.BytesIO()
        write_contact_sheet(self, picture)
        data = base64.b64encode(picture.getvalue()).decode()
        return f'<pre>{html.escape(repr(self))}</pre><img src="data:image/png;base64,{data}" alt="contact sheet">'

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
            overwrite: Replace an earlier result once the new one is complete; refused where an image lies in it.
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
    conditions: Conditions | Mapping[str, Any] | None = None,
    edge_filter: float | None = None,
    reference: Reference = "first",
    drop_outliers: bool = False,
    device: torch.device | str | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    progress: bool = False,
) -> Reconstruction:
    """Reconstruct a scene from two or more images.

    Example:
        >>> model = geoaccel.load_model("vggt-mini")
        >>> geoaccel.reconstruct("photos/", model=model).save("scene/", ["ply", "colmap"])

    Args:
        images_or_paths: Folder, list of files, glob or video, read as the model wants it; or a tensor [S, 3, H, W] in
            [0, 1] at a size that the model accepts.
        model: A geoaccel model, accelerated or not.
        points: Where world points come from: ``depth`` unprojects the depth with the predicted cameras, so that points
            project exactly onto their pixels; ``head`` takes what the model's own point head says.
        conditions: What is known of the images, for a backbone that can be told (``docs/backbones.md``): tensors
            at the size of the network input, or files by kind (``poses``, ``intrinsics``, ``depths``) as
            :func:`geoaccel.images.load_conditions` reads them.
        edge_filter: Leave out the pixels where depth jumps by more than this share (0.09 is a good one): points there
            hang between an object and what is behind it. None keeps them.
        reference: The frame that VGGT expresses all others in, and that merging methods anchor: ``first``, ``auto``
            (the one that is most like the others, :mod:`geoaccel.reference`) or its number from 0. The order of the
            result is that of the images.
        drop_outliers: Leave images that are unlike the others (:mod:`geoaccel.outliers`) out of the result. They
            are named in a warning and in ``files.json`` in any case.
        device: Moves the model there first; by default it stays where it is.
        fps: Frames taken per second, of a video.
        max_frames: Use at most this many images.
        progress: Show a progress bar while reading.
    """
    require_module(model)
    check_edge_filter(edge_filter)
    check_reference(reference)
    heads = _needed_heads(model, points)
    check_takes(model, conditions.given if isinstance(conditions, Conditions) else conditions or ())
    batch = _as_batch(images_or_paths, model, fps=fps, max_frames=max_frames, progress=progress)
    num_frames, _, height, width = batch.images.shape
    if num_frames < 2 and getattr(model, "sharing", None) is None:  # other processes have more
        raise UserError(
            f"got {num_frames} image; a reconstruction needs at least two of the same scene; add images, or call "
            "the model itself for a single view: model(images)"
        )
    _check_memory(model, num_frames, (height, width))
    told = _told(conditions, batch)
    if device is not None:
        model = model.to(device)
    if drop_outliers and getattr(model, "sharing", None) is not None:
        raise UserError("drop_outliers needs all frames in one process; leave it out")
    if told.given and reference != "first":
        raise UserError(f"reference={reference!r} is for images alone; leave it out where more is known of them")
    with reference_first(model, "first" if told.given else reference, num_frames) as order:
        geometry = order.back(_predict(model, batch.images, heads, told))
    result = replace(_from_geometry(geometry, batch, points), unit=_unit(model, told))
    result = name_outliers(result, order, drop=drop_outliers)
    return result if edge_filter is None else result.without_edges(edge_filter)


def check_takes(model: nn.Module, kinds: Iterable[str]) -> None:
    """Refuse conditions that a backbone cannot be told.

    Raises:
        UserError: For a kind that does not exist, or that this backbone does not take.
    """
    from geoaccel.images.given import check_names

    backbone: Any = model.backbone
    taken = () if backbone.conditions is None else backbone.conditions.takes
    check_names(dict.fromkeys(kinds))
    if refused := [kind for kind in kinds if kind not in taken]:
        others = ", ".join(taken) or "none"
        raise UserError(
            f"{backbone.name} takes no {refused[0]} (of such conditions it takes: {others}); leave them out"
        )


def _told(conditions: Conditions | Mapping[str, Any] | None, batch: ImageBatch | TensorBatch) -> Conditions:
    """Conditions at the size of the network input, checked."""
    from geoaccel.images import load_conditions

    if not isinstance(conditions, Conditions):
        conditions = load_conditions(batch, **(conditions or {}))
    conditions.check(len(batch.names), (batch.images.shape[-2], batch.images.shape[-1]))
    return conditions


def _unit(model: Any, told: Conditions) -> str:
    conditioning = model.backbone.conditions
    return (conditioning.unit if told.given and conditioning is not None else None) or model.backbone.unit


@torch.inference_mode()
def _predict(
    model: Any,
    images: Tensor,  # [S, 3, H, W]
    heads: Sequence[str],
    told: Conditions,
) -> Geometry:
    # The network normalises in float32 and casts afterwards: bfloat16 has not even 8 bits for a pixel.
    device = next(model.parameters()).device
    conditioning = model.backbone.conditions if told.given else None
    given = {} if conditioning is None else conditioning.arguments(told)
    given = {name: value.to(device) for name, value in given.items()}
    predictions = model(images[None].to(device=device, dtype=torch.float32), heads=heads, **given)
    geometry = model.backbone.geometry(predictions, tuple(images.shape[-2:]))
    return geometry if conditioning is None else conditioning.settle(geometry, told)


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
    """Read the images, or wrap a tensor as if each frame were an image of its own size."""
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
    """Leave out what is not looked at: tracks, rays, and points of a model that has depth as well."""
    if points not in ("depth", "head"):
        raise UserError(unknown("source of points", points, ["depth", "head"]))
    if points == "head" and "point" not in model.heads:
        raise UserError(f"points='head' needs a point head; this model has {', '.join(model.heads)}; use 'depth'")
    unused = {"track", "ray"} | ({"point"} if points == "depth" and "depth" in model.heads else set())
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
