"""Folders of posed photographs: ``poses.json``, nerfstudio's ``transforms.json``, or a COLMAP model.

A folder is one scene, or has one folder per scene. If it has several of these files, the first named here is used.

``poses.json``
    ``{"name", "units": "m" | "mm", "frames": [{"file", "extrinsic", "intrinsic", "width", "height"}, ...]}`` with
    ``extrinsic`` = ``cam_from_world`` 3 x 4, ``intrinsic`` 3 x 3 with the *centre of the first pixel at (0, 0)*: half a
    pixel is added on reading. In the same folder, both optional: ``depth.npz`` with ``depth_mm`` uint16 [N, H, W] (and
    ``files`` [N]), 0 = unknown; ``points.ply``.

``transforms.json`` (https://docs.nerf.studio/quickstart/data_conventions.html)
    ``transform_matrix`` = ``world_from_cam`` with OpenGL axes; ``fl_x fl_y cx cy`` per frame or for all;
    ``ply_file_path`` and ``mask_path`` are read, depth is not.

COLMAP
    ``cameras``, ``images`` and ``points3D`` (.bin or .txt) in the folder, ``sparse/0``, ``sparse`` or
    ``colmap/sparse/0``; photographs in ``images/``, or in the folder of the model.

If the lens has distortion there are no intrinsics: undistort first (``colmap image_undistorter``). Poses and points
have the unit of the file; depth has the same.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.errors import ARRAY_ERRORS, UserError
from geoaccel.eval.data import colmap_model, files
from geoaccel.eval.data.neural_rgbd import OPENGL_FROM_OPENCV
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_candidates
from geoaccel.images.read import IMAGE_SUFFIXES, one_line
from geoaccel.images.sources import natural_key

FORMATS = ("poses", "nerfstudio", "colmap")
PIXEL_SHIFT = 0.5
UNITS_PER_MM = {"m": 1e-3, "mm": 1.0}
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")


@reader("folder")
def read(
    root: Root,
    *,
    scenes: Names = None,
    on_skip: OnSkip | None = None,
    format: str | None = None,
    need_poses: bool = True,
) -> Iterator[EvalScene]:
    """Yield the scene or scenes of a folder.

    Args:
        root: The folder.
        scenes: Only folders with these names.
        on_skip: Called with each scene that is left out.
        format: ``poses``, ``nerfstudio`` or ``colmap``; by default the first that exists.
        need_poses: If False, a folder with only photographs is accepted, with poses of NaN: it cannot be scored, but
            two predictions of it can be compared.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format={format!r}; known: {', '.join(FORMATS)}")
    folder = files.folder_of(root, "a folder with poses.json, transforms.json or a COLMAP model").resolve()
    found = [folder] if _format_of(folder, format) else sorted(p for p in folder.iterdir() if _format_of(p, format))
    if not found and not need_poses and format is None:
        places = [folder] if _photographs(folder) else sorted(p for p in folder.iterdir() if p.is_dir())
        found = [place for place in places if _photographs(place)]
    if not found:
        there = f"{folder} or one folder below"
        if not any(_photographs(place) for place in (folder, *folder.iterdir()) if place.is_dir()):
            raise FileNotFoundError(f"no photographs in {there}; set data.root to a folder of them")
        wanted = format or "poses.json, transforms.json or COLMAP model"
        advice = "compare with the dense model (fidelity=true), or use geoaccel reconstruct"
        if not need_poses:  # which was asked for already
            advice = "leave data.options.format out, and they are compared with the dense model alone"
        raise FileNotFoundError(f"no {wanted} in {there}; photographs without poses cannot be scored: {advice}")
    candidates = [Candidate(path.name, None, partial(_READERS[_format_of(path, format)], path)) for path in found]
    return read_candidates(candidates, scenes, on_skip)


def _format_of(folder: Path, wanted: str | None) -> str:
    if not folder.is_dir():
        return ""
    there = {
        "poses": (folder / "poses.json").is_file(),
        "nerfstudio": (folder / "transforms.json").is_file(),
        "colmap": colmap_model.find_model(folder) is not None,
    }
    return next((name for name in FORMATS if there[name] and wanted in (None, name)), "")


def _read_poses(folder: Path) -> EvalScene:
    document = _read_json(folder / "poses.json")
    depth_path = folder / "depth.npz"
    scale = UNITS_PER_MM.get(str(document.get("units")))
    if depth_path.is_file() and scale is None:
        raise UserError(f'{folder / "poses.json"} has no units, which depth.npz needs; add "units": "m" or "mm"')
    entries = _frames(document, folder / "poses.json")
    frames = []
    for i, entry in enumerate(entries):
        path = files.existing(folder / str(_get(entry, "file", folder)))
        size = files.image_size(path)
        if size != (entry.get("height", size[0]), entry.get("width", size[1])):
            raise UserError(f"{path} is {size} (height, width), poses.json says otherwise: its intrinsics do not fit")
        intrinsics = _matrix(_get(entry, "intrinsic", folder), (3, 3), path)
        intrinsics[:2, 2] += PIXEL_SHIFT
        pose = to_homogeneous(_matrix(_get(entry, "extrinsic", folder), (3, 4), path))
        read_depth = None
        if depth_path.is_file() and scale is not None:
            read_depth = partial(_read_npz_depth, depth_path, i, path.name, len(entries), scale)
        frames.append(EvalFrame(str(entry["file"]), pose, _checked(intrinsics, path), path, read_depth=read_depth))
    return make_scene(folder.name, frames, read_points=_cloud(folder / "points.ply"))


def _read_nerfstudio(folder: Path) -> EvalScene:
    document = _read_json(folder / "transforms.json")
    frames = []
    for entry in _frames(document, folder / "transforms.json"):
        path = _photograph(folder / str(_get(entry, "file_path", folder)))
        world_from_cam = _matrix(_get(entry, "transform_matrix", folder), (4, 4), path)
        mask = _path(entry, "mask_path", folder)
        frames.append(
            EvalFrame(
                str(entry["file_path"]),
                invert_rigid(world_from_cam @ OPENGL_FROM_OPENCV),
                _nerfstudio_intrinsics({**document, **entry}, path),
                path,
                read_mask=None if mask is None else partial(files.read_mask, files.existing(mask)),
            )
        )
    cloud = _path(document, "ply_file_path", folder)
    return make_scene(folder.name, frames, read_points=None if cloud is None else _cloud(cloud))


def _read_colmap(folder: Path) -> EvalScene:
    model = colmap_model.find_model(folder)
    assert model is not None
    cameras, images = colmap_model.read_model(model)
    base = folder / "images" if (folder / "images").is_dir() else folder
    frames = []
    for image in images:
        path = files.existing(base / image.name)
        camera = cameras[image.camera_id]
        if files.image_size(path) != camera.size:
            raise UserError(f"{path} is {files.image_size(path)} (height, width), its COLMAP camera {camera.size}")
        frames.append(EvalFrame(image.name, image.cam_from_world, camera.intrinsics(), path))
    points = partial(colmap_model.read_points, model) if colmap_model.has_points(model) else None
    return make_scene(folder.name, frames, read_points=points)


def _read_photographs(folder: Path) -> EvalScene:
    unknown_pose = torch.full((4, 4), torch.nan, dtype=torch.float64)
    frames = tuple(EvalFrame(path.name, unknown_pose, None, path) for path in _photographs(folder))
    return EvalScene(folder.name, None, frames)


def _photographs(folder: Path) -> list[Path]:
    there = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(there, key=natural_key)


_READERS = {"poses": _read_poses, "nerfstudio": _read_nerfstudio, "colmap": _read_colmap, "": _read_photographs}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(files.read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({one_line(error)}); export it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object; export it again")
    return document


def _frames(document: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    entries = document.get("frames")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} has no list of frames; export it again")
    return entries


def _get(entry: dict[str, Any], key: str, folder: Path) -> Any:
    if key not in entry:
        raise UserError(f"a frame of {folder.name} has no {key!r}, only {', '.join(entry)}; export it again")
    return entry[key]


def _path(entry: dict[str, Any], key: str, folder: Path) -> Path | None:
    """A path in an entry, relative to the file; None if there is none."""
    given = entry.get(key)
    if given is not None and not isinstance(given, str):
        raise UserError(f"{folder / 'transforms.json'} has {key}={given!r}, which is not a path; export it again")
    return folder / given if given else None


def _matrix(values: Any, shape: tuple[int, int], path: Path) -> Tensor:  # `shape`, float64
    try:
        return torch.tensor(values, dtype=torch.float64).reshape(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path.name}: its matrix is not {list(shape)} ({one_line(error)}); export it again") from None


def _checked(intrinsics: Tensor, path: Path) -> Tensor:
    if not intrinsics.isfinite().all() or (intrinsics.diagonal()[:2] <= 0).any():
        raise UserError(f"{path.name}: its intrinsics have no positive, finite focal lengths; fix or remove the frame")
    return intrinsics


def _cloud(path: Path) -> partial[Tensor] | None:
    return partial(files.read_points, path) if path.is_file() else None


def _photograph(path: Path) -> Path:
    """The photograph; some programs omit the suffix."""
    candidates = (path, *(path.with_name(path.name + suffix) for suffix in (".png", ".jpg", ".jpeg")))
    return files.existing(next((p for p in candidates if p.is_file()), path))


def _nerfstudio_intrinsics(camera: dict[str, Any], path: Path) -> Tensor | None:  # [3, 3], float64
    if camera.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        return None
    if "fl_x" not in camera or any(camera.get(key, 0.0) != 0.0 for key in DISTORTION):
        return None
    size = files.image_size(path)
    if size != (camera.get("h", size[0]), camera.get("w", size[1])):
        raise UserError(f"{path} is {size} (height, width), transforms.json says otherwise: its intrinsics do not fit")
    focal = camera["fl_x"]
    rows = [
        [focal, 0.0, camera.get("cx", size[1] / 2.0)],
        [0.0, camera.get("fl_y", focal), camera.get("cy", size[0] / 2.0)],
        [0.0, 0.0, 1.0],
    ]
    return _checked(_matrix(rows, (3, 3), path), path)


@functools.lru_cache(maxsize=1)
def _npz_depth(path: Path) -> tuple[np.ndarray, list[str] | None]:
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # NumPy leaves a damaged file open
            names = [Path(str(name)).name for name in arrays["files"]] if "files" in arrays else None
            return arrays["depth_mm"], names
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} has no depth_mm ({one_line(error)}); fetch it again, or export it again") from None


def _read_npz_depth(path: Path, index: int, name: str, count: int, scale: float) -> Tensor:  # [H, W], float32
    depth, names = _npz_depth(path)
    if depth.ndim != 3 or len(depth) != count or (names is not None and names[index] != name):
        raise UserError(f"{path} does not belong to the {count} frames of poses.json; export both again")
    return files.clean_depth(depth[index].astype(np.float64) * scale)
