"""DTU MVS: objects on a table, photographed by a robot arm (Jensen et al., CVPR 2014), in MVSNet's test layout.

    <root>/scan24/images/00000000.jpg          1600 x 1200, 49 (or 64) photographs
    <root>/scan24/cams/00000000_cam.txt        "extrinsic", cam_from_world 4 x 4, "intrinsic", 3 x 3, depth range
    <root>/scan24/depths/00000000.npy          millimetres; optional
    <root>/scan24/binary_masks/00000000.png    optional
    <root>/Points/stl/stl024_total.ply         structured-light scan; optional
    <root>/ObsMask/ObsMask24_10.mat            observed region: ObsMask, BB, Res; optional
    <root>/ObsMask/Plane24.mat                 the table: P; optional

Images and cameras: the DTU test set of https://github.com/YoYo000/MVSNet (dtu.zip, 22 scans, under 1 GB); with
depths and masks: the evaluation data of Spann3R, CUT3R and pi3. Point clouds: "Points" of
https://roboimagedata.compute.dtu.dk (6 GB), and "ObsMask" of its "SampleSet", unpacked next to the scans; ``dtu-mvs``,
the benchmark's own protocol, needs all of them. No licence is stated: research use.

Poses and depth are in millimetres. The calibration has the first pixel's centre at 0, so half a pixel is added to the
principal point. Depth counts only inside the mask, but the mask is not eroded (pi3's protocol erodes it by a 10 x 10
square first: see `geoaccel.eval.metrics.points`). MVSNet's *training* cameras belong to images of a quarter of the
size; they are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.errors import ARRAY_ERRORS, MissingPackage, UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import (
    Candidate,
    EvalFrame,
    EvalScene,
    Names,
    OnSkip,
    Root,
    ScanRegion,
    make_scene,
    read_candidates,
)
from geoaccel.images.read import one_line

TEST_SCANS = (1, 4, 9, 10, 11, 12, 13, 15, 23, 24, 29, 32, 33, 34, 48, 49, 62, 75, 77, 110, 114, 118)
PIXEL_SHIFT = 0.5
MAX_OFF_CENTER = 0.25  # fraction of the side; the real principal point is within 0.02


@reader("dtu")
def read(root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None, split: str = "all") -> Iterator[EvalScene]:
    """Yield the scans in order of number.

    Args:
        root: Folder of the scans.
        scenes: Only these scans ("scan24").
        on_skip: Called with each scan that is left out.
        split: ``test`` for MVSNet's 22 test scans, all of which must exist, ``all`` for those on disk.
    """
    if split not in ("test", "all"):
        raise UserError(f"split={split!r}; known: test, all")
    folder = files.folder_of(root, "the DTU folder that holds scan1, scan4, ...")
    there = sorted(int(match[1]) for p in folder.iterdir() if (match := re.fullmatch(r"scan(\d+)", p.name)))
    if not there:
        raise FileNotFoundError(f"no scan* under {folder}; set data.root to the DTU folder that holds them")
    numbers = TEST_SCANS if split == "test" else there
    candidates = [Candidate(f"scan{n}", None, partial(_read_scan, folder, n)) for n in numbers]
    return read_candidates(candidates, scenes, on_skip)


def read_mvsnet_camera(path: Path) -> tuple[Tensor, Tensor]:  # intrinsics [3, 3], cam_from_world [4, 4]; float64
    """Read MVSNet's camera file, in the package's pixel convention."""
    words = files.read_text(path).split()
    try:
        if words[0] != "extrinsic" or words[17] != "intrinsic":
            raise UserError("'extrinsic' and 'intrinsic' are not in their places")
        numbers = torch.tensor([float(w) for w in (*words[1:17], *words[18:27])], dtype=torch.float64)
        cam_from_world, intrinsics = numbers[:16].view(4, 4), numbers[16:].reshape(3, 3).clone()
    except (ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} is not an MVSNet camera ({error}); fetch it again") from None
    intrinsics[:2, 2] += PIXEL_SHIFT
    return intrinsics, cam_from_world


def _read_scan(root: Path, number: int) -> EvalScene:
    folder = root / f"scan{number}"
    images = sorted((folder / "images").glob("*.jpg"))
    if not images:
        raise FileNotFoundError(f"no {folder / 'images'}/*.jpg; fetch the scan")
    with_depth, with_mask = (folder / "depths").is_dir(), (folder / "binary_masks").is_dir()
    frames = []
    for image in images:
        camera_path = folder / "cams" / f"{image.stem}_cam.txt"
        intrinsics, cam_from_world = read_mvsnet_camera(camera_path)
        _check_intrinsics(intrinsics, files.image_size(image), camera_path)
        mask = files.existing(folder / "binary_masks" / f"{image.stem}.png") if with_mask else None
        depth = files.existing(folder / "depths" / f"{image.stem}.npy") if with_depth else None
        frames.append(
            EvalFrame(
                image.stem,
                cam_from_world,
                intrinsics,
                image,
                read_depth=None if depth is None else partial(_read_depth, depth, mask),
                read_mask=None if mask is None else partial(files.read_mask, mask),
            )
        )
    cloud = root / "Points" / "stl" / f"stl{number:03d}_total.ply"
    mask, plane = root / "ObsMask" / f"ObsMask{number}_10.mat", root / "ObsMask" / f"Plane{number}.mat"
    return make_scene(
        folder.name,
        frames,
        read_points=partial(files.read_points, cloud) if cloud.is_file() else None,
        read_region=partial(read_region, mask, plane) if mask.is_file() and plane.is_file() else None,
    )


def read_region(mask_path: Path, plane_path: Path) -> ScanRegion:
    """Read the benchmark's observation mask and ground plane.

    Args:
        mask_path: ``ObsMaskN_10.mat``.
        plane_path: ``PlaneN.mat``.

    Raises:
        ValueError: If one of them has other contents.
        MissingPackage: If SciPy, which reads MATLAB files, cannot be imported.
    """
    mask, box, cell = _read_mat(mask_path, "ObsMask", "BB", "Res")
    (plane,) = _read_mat(plane_path, "P")
    if mask.ndim != 3 or box.shape != (2, 3) or cell.size != 1 or not cell > 0:
        raise UserError(f"{mask_path} lacks a mask [X, Y, Z], BB [2, 3] or a positive Res; fetch it again")
    if plane.size != 4:
        raise UserError(f"{plane_path} has P with {plane.size} numbers, expected 4; fetch it again")
    return ScanRegion(
        torch.from_numpy(mask > 0),
        torch.from_numpy(box.astype(np.float64)),
        float(cell.item()),
        torch.from_numpy(plane.astype(np.float64).flatten()),
    )


def _read_mat(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of numbers in a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingPackage(
            f"SciPy, which reads {path.name}, cannot be imported ({error}): pip install 'geoaccel[eval]'"
        ) from error
    try:
        held = loadmat(files.existing(path))
        found = [np.asarray(held[name]) for name in names]
        if not all(np.isfinite(array).all() for array in found):
            raise UserError("NaN or infinite numbers")
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files can raise anything in the reader
        raise UserError(f"{path} does not hold {', '.join(names)} ({one_line(error)}); fetch it again") from None
    return found


def _check_intrinsics(intrinsics: Tensor, size: tuple[int, int], path: Path) -> None:
    relative = intrinsics[:2, 2] / torch.tensor([size[1], size[0]], dtype=torch.float64)
    if not ((relative - 0.5).abs() < MAX_OFF_CENTER).all():
        raise UserError(
            f"{path} does not belong to an image of {size[1]} x {size[0]} pixels (principal point at "
            f"{intrinsics[0, 2]:.1f}, {intrinsics[1, 2]:.1f}); use the cameras of the test set"
        )


def _read_depth(path: Path, mask_path: Path | None) -> Tensor:  # [H, W], float32, millimetres
    try:
        depth = np.asarray(np.load(path))
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} is not an array ({error}); fetch it again") from None
    if depth.ndim != 2:
        raise UserError(f"{path} is an array {list(depth.shape)}; expected [H, W]")
    cleaned = files.clean_depth(depth)
    if mask_path is None:
        return cleaned
    mask = files.read_mask(mask_path)
    if mask.shape != cleaned.shape:
        raise UserError(f"{mask_path} is {list(mask.shape)}, the depth map {list(cleaned.shape)}; fetch both again")
    return cleaned * mask
