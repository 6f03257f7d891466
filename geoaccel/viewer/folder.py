"""Reading a folder that ``reconstruct`` or ``demo`` wrote, for the viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geoaccel.backbone import ARBITRARY
from geoaccel.errors import ARRAY_ERRORS, UserError
from geoaccel.export.npz import FILE as ARRAYS
from geoaccel.export.ply import FILE as POINTS
from geoaccel.export.view import DENSE_FILE, FILE, MAX_POINTS, View, lens_of, make_view, read_view, small_jpeg
from geoaccel.images.read import read_image

RESULT = "result"
DENSE = "dense"
ACCELERATED = "accelerated"


def read_results(folder: Path, against: Path | None = None) -> dict[str, View]:
    """Results by name: one, or two to compare.

    Args:
        folder: Folder of a result.
        against: Folder of another result of the same photographs. By default the dense model's result in the same
            folder, if there is one.

    Raises:
        UserError: If there is nothing to show.
    """
    if against is not None:
        names = (folder.resolve().name, against.resolve().name)
        if len(set(names)) < 2:
            names = (str(folder), str(against))
        if folder.resolve() == against.resolve():
            raise UserError(f"{folder} was given twice; give --against another result of the same photographs")
        return dict(zip(names, (read_result(folder), read_result(against)), strict=True))
    found = read_result(folder)
    if (folder / DENSE_FILE).is_file():
        return {DENSE: read_view(folder / DENSE_FILE), ACCELERATED: found}
    return {RESULT: found}


def read_result(folder: Path) -> View:
    """The best available source: ``view.npz``, all arrays, or points with the cameras of a COLMAP model."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that geoaccel reconstruct or geoaccel demo wrote")
    if (folder / FILE).is_file():
        return read_view(folder / FILE)
    if (folder / ARRAYS).is_file():
        return _from_arrays(folder / ARRAYS)
    if (folder / POINTS).is_file():
        return _from_points(folder)
    if pieces := sorted(path.name for path in folder.glob("piece_*")):
        raise UserError(
            f"{folder} has {len(pieces)} pieces, each in its own world frame; view one: {folder / pieces[0]}"
        )
    raise UserError(
        f"nothing to show in {folder}: it has no {FILE}, {ARRAYS} or {POINTS}; "
        "write them with geoaccel reconstruct --formats view"
    )


def _from_arrays(path: Path) -> View:
    import torch

    from geoaccel.edges import depth_jumps

    try:
        with path.open("rb") as file, np.load(file) as stored:  # NumPy leaves a damaged file open
            arrays = {name: stored[name] for name in stored.files}
        mask, images = arrays["mask"], arrays["images"]
        kept = mask & arrays.get("selected", mask)  # results of earlier versions do not store masks
        depth, conf = torch.from_numpy(arrays["depth"]), torch.from_numpy(arrays["conf"])
        jumps = depth_jumps(depth, torch.from_numpy(mask), conf).numpy()
        size = np.tile(images.shape[1:3], (len(images), 1))
        cameras = {
            "cam_from_world": arrays["cam_from_world"],
            "lens": lens_of(arrays["intrinsics"], size),
            "size": size,
            "names": arrays["names"],
        }
        view = make_view(
            arrays["points_world"][kept],
            images[kept],
            cameras,
            conf=arrays["conf"][kept],
            jump=jumps[kept],
            photographs=[small_jpeg(image) for image in images],
            unit=str(arrays["unit"]),
            cut=float(arrays.get("cut", 0.0)),  # nor did earlier ones say this
        )
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} cannot be read ({error}); write it again: --formats view") from None
    return view.thin(MAX_POINTS)


def _from_points(folder: Path) -> View:
    """Points of a PLY file, which has no confidence."""
    import trimesh

    try:
        cloud: Any = trimesh.load(folder / POINTS)
        points = np.asarray(cloud.vertices, np.float32)
        colors = np.asarray(cloud.colors)[:, :3]
    except (OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{folder / POINTS} cannot be read ({error}); write it again: --formats view") from None
    cameras, photographs = _colmap_cameras(folder)
    return make_view(points, colors, cameras, photographs=photographs, unit=ARBITRARY).thin(MAX_POINTS)


def _colmap_cameras(folder: Path) -> tuple[dict[str, np.ndarray], list[bytes]]:
    """Cameras and photographs of a COLMAP model next to the points; none without a model."""
    from geoaccel.eval.data.colmap_model import find_model, read_model

    model = find_model(folder)
    if model is None:
        return {
            "cam_from_world": np.zeros((0, 4, 4)),
            "lens": np.zeros((0, 4)),
            "size": np.zeros((0, 2), int),
            "names": np.zeros(0, str),
        }, []
    cameras, images = read_model(model)
    taken = [cameras[image.camera_id] for image in images]
    matrices = [camera.intrinsics() for camera in taken]
    size = np.array([camera.size for camera in taken])
    intrinsics = np.array([np.eye(3) if matrix is None else matrix.numpy() for matrix in matrices])
    return {
        "cam_from_world": np.array([image.cam_from_world.numpy() for image in images]),
        "lens": lens_of(intrinsics, size),
        "size": size,
        "names": np.array([image.name for image in images]),
    }, [_small_file(folder / "images" / image.name) for image in images]


def _small_file(path: Path) -> bytes:
    try:
        picture = read_image(path, lambda image: image.draft("RGB", (512, 512)))
    except (OSError, UserError):
        return b""
    return small_jpeg(np.asarray(picture.convert("RGB")))
