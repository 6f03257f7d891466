"""From images to a reconstruction: cameras, depth, points and confidence, and the files written from them.

`geoaccel.scene` documents what a reconstruction holds, with axes and pixel conventions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from geoaccel import export
from geoaccel.alignment import RobustFit
from geoaccel.backbone import require_module, require_network
from geoaccel.conditions import Conditions
from geoaccel.edges import check_edge_filter, depth_edges
from geoaccel.errors import UserError
from geoaccel.inputs import Inputs, check_path, check_takes, read_inputs
from geoaccel.memory import Limit
from geoaccel.outliers import without_outliers
from geoaccel.point_cloud import PointCloud
from geoaccel.prediction import counted_heads, needed_heads, predict
from geoaccel.priors import at_positions, one_camera, read_distance, with_distance, with_intrinsics
from geoaccel.reference import Reference, check_reference
from geoaccel.refine import bundle_adjust, check_refine, check_tracks, with_tracks
from geoaccel.runtime import pick_device
from geoaccel.scene import CONF_PERCENTILE, Scene
from geoaccel.tracks import measure_tracks
from geoaccel.tracks.follow import tracker_of

if TYPE_CHECKING:
    from geoaccel.images.calibration import IntrinsicsGiven
    from geoaccel.images.positions import Positions

logger = logging.getLogger(__name__)

MAX_POINTS = 1_000_000
WHOLE_SCENE = ("shared_camera", "scale", "positions", "refine", "drop_outliers")
"""Options of :func:`reconstruct` that need all images in one process."""


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction(Scene):
    """Reconstruction of S images: a scene that can be written to files.

    Attributes:
        found: Findings of the run: ``seconds`` of the network, ``left_out`` images and why, the ``memory`` plan, the
            factor of a given ``scale``, how well given ``positions`` agree, and ``edge_share``, the fraction of pixels
            that an edge filter removed.
    """

    found: dict[str, Any] = field(default_factory=dict)

    def without_edges(self, jump: float) -> Reconstruction:
        """The same without the pixels at depth edges, in `mask` and therefore in everything written.

        Args:
            jump: As in `geoaccel.edges.depth_edges`; 0.25 works well.

        Raises:
            ValueError: If no pixel is left.
        """
        mask = self.mask & ~depth_edges(self.depth, self.mask, jump, self.conf)
        if not mask.any():
            raise UserError(f"edge_filter={jump:g} leaves no pixel; give a larger value, or none (--edge-filter)")
        return replace(self, mask=mask)

    def summary(self) -> dict[str, Any]:
        """Summary for a calling program, as JSON-compatible values."""
        height, width = self.depth.shape[1:]
        return {"frames": len(self), "size": [height, width], "unit": self.unit, **self.found}

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
        formats: str | Sequence[str] = export.DEFAULT_FORMATS,
        *,
        images: str = "link",
        tracks: str = "auto",
        overwrite: bool = False,
        conf_percentile: float = CONF_PERCENTILE,
        mask: Tensor | None = None,  # [S, H, W]
        max_points: int | None = MAX_POINTS,
        seed: int = 0,
    ) -> PointCloud:
        """Write the reconstruction: a new folder appears at once, or, if anything fails, not at all.

        An existing folder is filled once everything is complete, ``files.json`` last.

        Args:
            folder: Where to; must not exist, be empty but for folders that hold the photographs and masks, or hold an
                earlier result (with `overwrite`).
            formats: Names of `geoaccel.export.FORMATS`, as a list or comma-separated, or ``all``.
            images: How ``images/`` is filled for COLMAP and nerfstudio: ``link`` (hard links), ``copy``, or ``none``
                (files refer to the photographs where they are).
            tracks: Observations of the COLMAP model: ``measure`` matches features in the photographs, which needs
                pycolmap (extra ``refine``) and about a second per image; ``project`` projects the points; ``auto``
                measures if pycolmap is installed. Earlier measurements are reused.
            overwrite: Replace an earlier result once the new one is complete; refused if an image lies in it.
            conf_percentile: As in `point_cloud`, like `mask`, which holds for all formats, `max_points` and `seed`.

        Returns:
            The points that were written; their `kept_share` is the fraction that the filter kept.
        """
        formats = export.read_formats(formats)
        frames = list(zip(self.names, self.paths, strict=True))
        export.check_images(images, formats, frames, folder, self.mask_files or [])
        export.check_output_folder(folder, overwrite=overwrite, inputs=self.inputs)
        check_tracks(tracks)
        scene = self if mask is None else self.selecting(mask)
        cloud = scene.point_cloud(conf_percentile=conf_percentile, max_points=max_points, seed=seed)
        scene = with_tracks(scene, tracks) if export.holds_tracks(formats) else scene
        export.write(scene, cloud, folder, formats, images=images, overwrite=overwrite)
        logger.info("%d points in %s (%.1f %% of the pixels kept)", len(cloud), folder, 100 * cloud.kept_share)
        return cloud


def reconstruct(
    images_or_paths: Any,
    *,
    model: nn.Module,
    points: Literal["depth", "head"] = "depth",
    size: int | None = None,
    mode: str | None = None,
    masks: str | Path | None = None,
    poses: str | Path | None = None,
    intrinsics: IntrinsicsGiven | None = None,
    depths: str | Path | None = None,
    conditions: Conditions | Mapping[str, Any] | None = None,
    shared_camera: bool = False,
    square_pixels: bool = False,
    scale: str | None = None,
    positions: str | Path | None = None,
    edge_filter: float | None = None,
    refine: str | None = None,
    tracks: str = "auto",
    reference: Reference = "first",
    drop_outliers: bool = False,
    device: torch.device | str | None = None,
    max_memory: str | int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    recursive: bool = False,
    skip_bad: bool = False,
    progress: bool = False,
    on_read: Callable[[Inputs], object] = lambda inputs: None,
) -> Reconstruction:
    """Reconstruct a scene from images. The command line has the same options under the same names.

    Example:
        >>> model = geoaccel.load_model("vggt-mini")
        >>> geoaccel.reconstruct("photos/", model=model, shared_camera=True).save("scene/", "ply,colmap")

    Args:
        images_or_paths: Folder, list of files, glob or video, preprocessed as the model requires; or a tensor [S, 3, H,
            W] in [0, 1] at a size that the model accepts. With one image, geometry rests on the network's prior alone.
        model: A geoaccel model, accelerated or not.
        points: Where world points come from: ``depth`` unprojects the depth with the cameras, so that points project
            exactly onto their pixels; ``head`` takes the points of the model's own point head.
        size: Width or long side of the network input, in place of the model's own.
        mode: How images are resized: ``crop``, ``pad``, ``budget`` or ``long``, in place of the model's own.
        masks: Folder with a mask for each image (:func:`geoaccel.images.load_masks`); only pixels that they keep give
            points.
        poses, depths: Known values, for a backbone that accepts them as conditions (``docs/backbones.md``): files as
            :func:`geoaccel.images.load_conditions` reads them.
        intrinsics: Known intrinsics, in pixels of the original images: ``f``, ``fx,fy,cx,cy``, a tensor [3, 3] or [S,
            3, 3], or a file (:func:`geoaccel.images.calibration.read_intrinsics`). The result has them for any
            backbone; one that accepts conditions also gets them as input.
        conditions: The same three as tensors at the size of the network input, or by kind.
        shared_camera: All images share one camera: the result has the median of their intrinsics, or the known ones.
        square_pixels: One focal length for both directions, unless intrinsics are known.
        scale: A known distance between the cameras of two images, ``a.jpg,b.jpg=1.25m`` (mm, cm, m, km, in, ft, which
            become metres, or no unit).
        positions: File with known positions of cameras, GPS too (:func:`geoaccel.images.positions.read_positions`): the
            result is in their world, fitted robustly; `Reconstruction.found` names those that do not agree.
        edge_filter: Leave out flying pixels, where depth jumps by more than this fraction (0.25 works well), or by less
            among the least confident sixth: points there hang between an object and what is behind it. None keeps them.
        refine: ``ba`` runs bundle adjustment of cameras, points and depth on tracks measured in the images, and keeps
            the result if it is an improvement (:func:`geoaccel.refine.bundle_adjust`); needs pycolmap, the extra
            ``refine``. Known intrinsics stay fixed. `Reconstruction.found` reports the outcome.
        tracks: ``head`` tracks features with the network's track head (VGGT's, if the checkpoint has it), one forward
            for each of up to eight images; verified like others, by pycolmap. `Reconstruction.save` handles the other
            choices.
        reference: Reference view, which defines VGGT's world frame and is the anchor of merging methods: ``first``,
            ``auto`` (the image most like the others, :mod:`geoaccel.reference`) or its number from 0. The result keeps
            the order of the images.
        drop_outliers: Leave images unlike the others (:mod:`geoaccel.outliers`) out of the result. A warning and
            ``files.json`` name them in any case.
        device: Moves the model there first (``cpu``, ``cuda``, ``cuda:N``, ``auto``); by default it stays where it is.
        max_memory: Memory limit on the device, or on a CPU for the process, such as ``24GB``, weights included. The
            fastest plan within it is used (:mod:`geoaccel.memory_plan`), with the same results. By default the limit is
            the free memory.
        fps: Frames per second to take from a video.
        max_frames: Use at most this many images.
        recursive: Search the subfolders of a folder, too.
        skip_bad: Leave out images that cannot be read; `Reconstruction.found` names them.
        progress: Show a progress bar while reading.
        on_read: Called with what was read, before the network runs.

    Raises:
        ValueError, OSError: In one line, for what cannot be read or does not go together.
    """
    from geoaccel.images.positions import match_positions

    require_module(model)
    for file, path in {"masks": masks, "poses": poses, "depths": depths, "positions": positions}.items():
        check_path(file, path)
    check_edge_filter(edge_filter)
    check_refine(refine)
    check_tracks(tracks)
    check_reference(reference)
    device = None if device is None else pick_device(device)
    require_network(model)
    limit = Limit.of(max_memory, device)
    if getattr(model, "sharing", None) is not None:
        asked = dict(zip(WHOLE_SCENE, (shared_camera, scale, positions, refine, drop_outliers), strict=True))
        asked["tracks"] = tracks == "head"
        if name := next((name for name, value in asked.items() if value), None):
            raise UserError(f"{name} needs all images in one process; leave it out, or run a single process")
    heads = needed_heads(model, points)
    counted = tuple(counted_heads(model, points, tracks))
    if limit is not None or tracks == "head":  # else all but the track head count
        limit = replace(limit or Limit(), heads=counted)
    given = {"poses": poses, "intrinsics": intrinsics, "depths": depths}
    given = {kind: value for kind, value in given.items() if value is not None}
    if conditions is not None and given:
        raise UserError(f"{next(iter(given))} and conditions were both given; pass everything one way or the other")
    conditions = given if conditions is None else conditions
    kinds = conditions.given if isinstance(conditions, Conditions) else tuple(conditions)
    check_takes(model, kinds)
    check_choices(
        points,
        intrinsics="intrinsics" if "intrinsics" in kinds else None,
        shared_camera=shared_camera,
        square_pixels=square_pixels,
        refine=refine,
        poses="poses" if "poses" in kinds else None,
        scale=scale,
        positions=positions,
    )
    inputs = read_inputs(
        images_or_paths, model, size=size, mode=mode, masks=masks, conditions=conditions, fps=fps,
        max_frames=max_frames, recursive=recursive, skip_bad=skip_bad, progress=progress, limit=limit,
    )  # fmt: skip
    batch = inputs.batch
    distance = None if scale is None else read_distance(scale, batch.names)
    places = None if positions is None else match_positions(positions, batch.names)
    on_read(inputs)
    if len(batch.names) == 1 and getattr(model, "sharing", None) is None:  # other processes have more
        logger.warning("one image: its camera and depth rest on the network's prior alone; no other view confirms them")
    if device is not None:
        model = model.to(device)
    began = time.perf_counter()
    scene = predict(model, inputs, heads, points, reference)
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "left_out": dict(batch.left_out)}
    if inputs.plan is not None:
        found["memory"] = str(inputs.plan)
    result = Reconstruction(**{part.name: getattr(scene, part.name) for part in fields(scene)}, found=found)
    known = inputs.known.has_intrinsics
    if inputs.known.intrinsics is not None:
        result = with_intrinsics(result, inputs.known.intrinsics, known)
        known = torch.ones(len(batch.names), dtype=torch.bool) if known is None else known
    if shared_camera or square_pixels:
        result = one_camera(result, shared=shared_camera, square=square_pixels, known=known)
    if tracks == "head":
        result = replace(result, tracks=measure_tracks(result, follow=tracker_of(model, batch.images, inputs.plan)))
    if refine is not None:
        result, found["refine"] = _refined(result, known is not None)
    if distance is not None:
        result, found["scale"] = with_distance(result, distance)
    if places is not None:
        result, fit = at_positions(result, places)
        found["positions"] = _agreement(fit, places, batch.names)
    if edge_filter is not None:
        before = int(result.mask.sum())
        result = result.without_edges(edge_filter)
        found["edge_share"] = 1 - int(result.mask.sum()) / before
    return without_outliers(result) if drop_outliers else result


def _refined(scene: Reconstruction, known_intrinsics: bool) -> tuple[Reconstruction, dict[str, Any]]:
    scene, done = bundle_adjust(scene, lens="fixed" if known_intrinsics else None)
    return scene, {**asdict(done), "text": str(done)}


def _agreement(fit: RobustFit, places: Positions, names: Sequence[str]) -> dict[str, Any]:
    """Agreement of given positions and predicted cameras, in the unit of the positions."""
    known = [name for name, there in zip(names, places.places.isfinite().all(-1).tolist(), strict=True) if there]
    errors = dict(zip(known, fit.residuals.tolist(), strict=True))
    wrong = {name: errors[name] for name, agrees in zip(known, fit.agrees.tolist(), strict=True) if not agrees}
    return {
        "known": len(known),
        "scale": float(fit.similarity.scale),
        "median_error": float(fit.residuals[fit.agrees].median()),
        "wrong": wrong,
        "on_a_line": fit.on_a_line,
    }


def check_choices(
    points: str = "depth",
    *,
    intrinsics: object = None,
    shared_camera: bool = False,
    square_pixels: bool = False,
    refine: object = None,
    poses: object = None,
    scale: object = None,
    positions: object = None,
) -> None:
    """Refuse options of :func:`reconstruct` that contradict each other for any images.

    Raises:
        ValueError: Naming the one to leave out.
    """
    changes = {"shared_camera": shared_camera, "square_pixels": square_pixels}
    changes |= {"intrinsics": intrinsics is not None, "refine": refine is not None}
    if points == "head" and (changed := next((name for name, value in changes.items() if value), None)):
        raise UserError(f"points='head' takes points as predicted, which {changed} cannot change; use points='depth'")
    if scale is not None and positions is not None:
        raise UserError("scale and positions both define the unit of length; give one of them (--scale or --positions)")
    if poses is not None and (scale is not None or positions is not None):
        raise UserError("poses already define scale and positions; leave out scale and positions, or the poses")
