"""ScanNet v2: rooms filmed with a depth sensor on a tablet (Dai et al., CVPR 2017), as SensReader exports them.

    <root>/scene0000_00/color/0.jpg                        1296 x 968
    <root>/scene0000_00/depth/0.png                        640 x 480, 16 bits, millimetres
    <root>/scene0000_00/pose/0.txt                         world_from_cam 4 x 4; -inf where tracking was lost
    <root>/scene0000_00/intrinsic/intrinsic_color.txt      and intrinsic_depth.txt, 4 x 4
    <root>/scene0000_00/scene0000_00_vh_clean_2.ply        reconstructed mesh; optional

The download script comes by e-mail after signing the terms of use at http://www.scan-net.org (1,613 scans, 1.2 TB;
``.sens`` files of about 0.8 GB each; ``python reader.py`` of ScanNet/SensReader writes the folders above). Folders with
``color``, ``depth``, ``pose`` and ``intrinsic`` under ``<scan>/<something>/`` are not found: give their parent.

Frames without a pose are dropped and listed in ``dropped``. Intrinsics have the first pixel's centre at 0, so half a
pixel is added. Depth has a lower resolution: it is resampled to the photograph's by nearest neighbour, never
interpolated. The exported depth is already aligned with the colour camera; a calibration that says otherwise
(``extrinsic_*.txt`` is not the identity) is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, pixel_grid
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_folders

UNITS_PER_METER = 1000.0
PIXEL_SHIFT = 0.5
FIFTY = 50


@reader("scannet", is_sequence=True)
def read(
    root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None, fifty: bool = False
) -> Iterator[EvalScene]:
    """Yield the scans in order of name.

    Args:
        root: Folder of the scans.
        scenes: Only these scans.
        on_skip: Called with each scan that is left out.
        fifty: FastVGGT's ScanNet-50: 50 scans at equal steps in the sorted list of those on disk. The choice depends
            on which are on disk, so published ScanNet-50 numbers are only defined together with the list.
    """
    folder = files.folder_of(root, "the ScanNet folder that holds scene0000_00, ...")
    found = files.folders_with(folder, "pose/", "export the .sens files with SensReader first")
    if fifty:
        found = found[:: max(1, len(found) // FIFTY)][:FIFTY]
    return read_folders(found, _read_scan, scenes, on_skip)


def _read_scan(folder: Path) -> EvalScene:
    images = sorted((folder / "color").glob("*.jpg"), key=_number)
    if not images:
        raise FileNotFoundError(f"no {folder / 'color'}/*.jpg; export the scan again")
    color = _read_intrinsics(folder, "color")
    with_depth = (folder / "depth").is_dir()
    depth_intrinsics = _read_intrinsics(folder, "depth") if with_depth else None
    size = files.image_size(images[0])
    frames = []
    for image in images:
        pose = files.read_matrix(folder / "pose" / f"{image.stem}.txt", (4, 4))
        read_depth = None
        if depth_intrinsics is not None:
            path = files.existing(folder / "depth" / f"{image.stem}.png")
            read_depth = partial(_read_depth, path, depth_intrinsics, color, size)
        frames.append(EvalFrame(image.stem, invert_rigid(pose), color, image, read_depth=read_depth))
    mesh = folder / f"{folder.name}_vh_clean_2.ply"
    return make_scene(folder.name, frames, read_points=partial(files.read_points, mesh) if mesh.is_file() else None)


def _number(path: Path) -> int:
    if not path.stem.isdecimal():
        raise UserError(f"{path}: the file name is not a number; export the scan again")
    return int(path.stem)


def _read_intrinsics(folder: Path, camera: str) -> Tensor:  # [3, 3], float64
    extrinsic = folder / "intrinsic" / f"extrinsic_{camera}.txt"
    if extrinsic.is_file() and not files.read_matrix(extrinsic, (4, 4)).allclose(torch.eye(4, dtype=torch.float64)):
        raise UserError(f"{extrinsic} is not the identity: depth and photographs are not aligned; leave the scan out")
    intrinsics = files.read_matrix(folder / "intrinsic" / f"intrinsic_{camera}.txt", (3, 3))
    if not intrinsics.isfinite().all() or (intrinsics.diagonal() <= 0).any():
        raise UserError(f"intrinsic_{camera}.txt has no positive, finite focal lengths; export the scan again")
    intrinsics[:2, 2] += PIXEL_SHIFT
    return intrinsics


def _read_depth(
    path: Path,
    depth_intrinsics: Tensor,  # [3, 3]
    intrinsics: Tensor,  # [3, 3], of the photograph
    size: tuple[int, int],  # of the photograph
) -> Tensor:  # [H, W], float32, metres
    depth = files.read_depth_png(path, UNITS_PER_METER)
    pixels = pixel_grid(*size, dtype=torch.float64)
    rays = (pixels - intrinsics[:2, 2]) / intrinsics.diagonal()[:2]
    nearest = (rays * depth_intrinsics.diagonal()[:2] + depth_intrinsics[:2, 2]).floor().long()
    inside = ((nearest >= 0) & (nearest < torch.tensor([depth.shape[1], depth.shape[0]]))).all(dim=-1)
    u, v = (nearest * inside[..., None]).unbind(-1)
    return depth[v, u] * inside
