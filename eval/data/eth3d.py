"""ETH3D high-resolution multi-view: 13 training scenes with laser scans (Schoeps et al., CVPR 2017).

    <root>/courtyard/images/dslr_images_undistorted/DSC_0286.JPG      about 6200 x 4130
    <root>/courtyard/dslr_calibration_undistorted/{cameras,images}.txt    COLMAP text, PINHOLE, metres
    <root>/courtyard/ground_truth_depth/dslr_images/DSC_0286.JPG      raw float32, row by row, infinite = unknown
    <root>/courtyard/dslr_calibration_jpg/cameras.txt                 THIN_PRISM_FISHEYE; needed for that depth
    <root>/courtyard/dslr_scan_eval/scan1.ply ... scan_alignment.mlp  laser scans; optional

From https://www.eth3d.net/datasets (7z archives per scene: dslr_undistorted, dslr_depth, dslr_jpg for its calibration,
scan_eval; all training scenes take tens of gigabytes).

The published depth maps are those of the *distorted* photographs (6048 x 4032), which is easily missed: read on the
undistorted grid they are off by several per cent near the edges. Here every undistorted pixel is projected through the
lens and takes the nearest depth, never interpolated; occluded or unseen pixels are 0. Without ``dslr_calibration_jpg``
there is no depth. The layout of pi3 and DUSt3R (``custom_undistorted``) is not supported.
"""

from __future__ import annotations

import xml.etree.ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import pixel_grid, transform_points
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.colmap_model import ColmapCamera, read_model, thin_prism_fisheye_pixels
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_folders

UNDISTORTED = "dslr_calibration_undistorted"
DISTORTED = "dslr_calibration_jpg"


@reader("eth3d")
def read(root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None) -> Iterator[EvalScene]:
    """Yield the scenes in order of name; arguments as in :class:`geoaccel.eval.data.registry.Reader`."""
    folder = files.folder_of(root, "the ETH3D folder that holds courtyard, ...")
    found = files.folders_with(folder, UNDISTORTED, "unpack *_dslr_undistorted.7z there")
    return read_folders(found, _read_scene, scenes, on_skip)


def _read_scene(folder: Path) -> EvalScene:
    cameras, images = read_model(folder / UNDISTORTED)
    depth_folder = folder / "ground_truth_depth" / "dslr_images"
    lenses: dict[str, ColmapCamera] = {}
    if depth_folder.is_dir() and (folder / DISTORTED).is_dir():
        distorted_cameras, distorted_images = read_model(folder / DISTORTED)
        lenses = {Path(image.name).name: distorted_cameras[image.camera_id] for image in distorted_images}
    frames = []
    for image in images:
        path = files.existing(folder / "images" / image.name)
        camera = cameras[image.camera_id]
        intrinsics = camera.intrinsics()
        if intrinsics is None or files.image_size(path) != camera.size:
            raise UserError(f"{image.name} does not match its camera in {UNDISTORTED}; unpack both again")
        read_depth = None
        if lenses:
            if path.name not in lenses or lenses[path.name].model != "THIN_PRISM_FISHEYE":
                raise UserError(f"{DISTORTED} has no THIN_PRISM_FISHEYE camera for {path.name}; unpack it again")
            depth_path = files.existing(depth_folder / path.name)
            read_depth = partial(_read_depth, depth_path, lenses[path.name], intrinsics, camera.size)
        frames.append(EvalFrame(path.stem, image.cam_from_world, intrinsics, path, read_depth=read_depth))
    scans = folder / "dslr_scan_eval" / "scan_alignment.mlp"
    return make_scene(folder.name, frames, read_points=partial(_read_scans, scans) if scans.is_file() else None)


def _read_depth(
    path: Path,
    lens: ColmapCamera,
    intrinsics: Tensor,  # [3, 3], of the undistorted photograph
    size: tuple[int, int],  # of the undistorted photograph
) -> Tensor:  # [H, W], float32, metres
    stored = np.fromfile(path, dtype="<f4")
    height, width = lens.size
    if stored.size != height * width:
        raise UserError(f"{path} holds {stored.size} values, not {height} x {width}; unpack *_dslr_depth.7z again")
    rays = (pixel_grid(*size, dtype=torch.float64) - intrinsics[:2, 2]) / intrinsics.diagonal()[:2]
    pixels = np.floor(thin_prism_fisheye_pixels(rays.numpy(), lens.params)).astype(np.int64)
    inside = ((pixels >= 0) & (pixels < (width, height))).all(axis=-1)
    u, v = np.moveaxis(pixels * inside[..., None], -1, 0)
    # Both images have the same optical centre and axis, so z-depth is unchanged
    return files.clean_depth(np.where(inside, stored.reshape(height, width)[v, u], 0.0))


def _read_scans(path: Path) -> Tensor:  # [N, 3], float32, metres
    """All laser scans, in the world coordinates of the poses."""
    try:
        meshes = list(xml.etree.ElementTree.fromstring(files.read_text(path)).iter("MLMesh"))
        parts = []
        for mesh in meshes:
            words = (mesh.findtext("MLMatrix44") or "").split()
            matrix = torch.tensor([float(word) for word in words], dtype=torch.float64).view(4, 4)
            points = files.read_points(path.parent / mesh.attrib["filename"])
            parts.append(transform_points(matrix, points.double()).float())
        return torch.cat(parts)
    except UserError:
        raise
    except (xml.etree.ElementTree.ParseError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} is not a MeshLab project ({error}); unpack *_dslr_scan_eval.7z again") from None
