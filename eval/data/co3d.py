"""Read CO3Dv2: real sequences (https://github.com/facebookresearch/co3d) and those of `co3d_layout`.

Annotations are read at once, images, masks and depth only on access. Poses and intrinsics are converted to the
package's conventions: ``cam_from_world`` with OpenCV axes, pixels with the first centre at (0.5, 0.5).
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.images.read import opened

# CO3D's cameras look along +z with x left and y up, ours with x right and y down
OPENCV_FROM_PYTORCH3D = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
INTRINSICS_FORMATS = ("ndc_isotropic", "ndc_norm_image_bounds")
MAX_ROTATION_ERROR = 1e-3


@dataclass(frozen=True)
class Co3dFrame:
    """One photograph of a sequence."""

    number: int
    image_path: Path
    size: tuple[int, int]  # height, width
    intrinsics: Tensor  # [3, 3], float64, pixels
    cam_from_world: Tensor  # [4, 4], float64
    mask_path: Path | None
    depth_path: Path | None
    depth_mask_path: Path | None
    depth_scale: float

    def image(self) -> Tensor:  # [3, H, W] in [0, 1]
        pixels = np.asarray(_open(self.image_path).convert("RGB"))
        self._check_size(self.image_path, pixels)
        return torch.from_numpy(pixels.copy()).movedim(-1, 0).float() / 255.0

    def mask(self) -> Tensor | None:  # [H, W], bool
        """The object; None if the frame has no mask."""
        if self.mask_path is None:
            return None
        mask = np.asarray(_open(self.mask_path).convert("L"))
        self._check_size(self.mask_path, mask)
        return torch.from_numpy(mask >= 128)

    def depth(self) -> Tensor | None:  # [H, W], float32
        """z-depth in the unit of the poses, 0 where unknown; None if the frame has no depth map."""
        if self.depth_path is None:
            return None
        stored = np.asarray(_open(self.depth_path))
        if stored.ndim != 2 or stored.dtype not in (np.uint16, np.int32):
            raise UserError(f"{self.depth_path} holds {stored.dtype} values; a CO3D depth map is a 16-bit grey PNG")
        self._check_size(self.depth_path, stored)
        depth = stored.astype(np.uint16).view(np.float16).astype(np.float32) * np.float32(self.depth_scale)
        known = np.isfinite(depth) & (depth > 0)
        if self.depth_mask_path is not None:
            known &= np.asarray(_open(self.depth_mask_path).convert("L")) > 0
        return torch.from_numpy(np.where(known, depth, np.float32(0.0)))

    def _check_size(self, path: Path, pixels: np.ndarray) -> None:
        if pixels.shape[:2] != self.size:
            raise UserError(f"{path} is {pixels.shape[:2]} (height, width), its annotation says {self.size}")


@dataclass(frozen=True)
class Co3dSequence:
    """One video of one object."""

    category: str
    name: str
    frames: tuple[Co3dFrame, ...]
    point_cloud_path: Path | None

    @property
    def intrinsics(self) -> Tensor:  # [S, 3, 3], float64
        return torch.stack([frame.intrinsics for frame in self.frames])

    @property
    def cam_from_world(self) -> Tensor:  # [S, 4, 4], float64
        return torch.stack([frame.cam_from_world for frame in self.frames])

    def points(self) -> Tensor | None:  # [N, 3], float32
        """The point cloud in world coordinates; None if the sequence has none."""
        if self.point_cloud_path is None:
            return None
        import trimesh

        cloud: Any = trimesh.load(_existing(self.point_cloud_path), process=False)
        return torch.from_numpy(np.array(cloud.vertices, dtype=np.float32))


def list_categories(root: str | Path) -> list[str]:
    """Names of the categories under a CO3D folder."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; give the CO3Dv2 folder with one folder per category")
    found = sorted(path.parent.name for path in root.glob("*/frame_annotations.jgz"))
    if not found:
        hint = " (this is a category: give its parent)" if (root / "frame_annotations.jgz").exists() else ""
        raise FileNotFoundError(
            f"no */frame_annotations.jgz under {root}{hint}; give the CO3Dv2 folder with one folder per category"
        )
    return found


def read_co3d(
    root: str | Path,
    category: str | None = None,
    *,
    sequences: Collection[str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> Iterator[Co3dSequence]:
    """Yield the sequences of one or all categories, in order of name, frames in order of number.

    Args:
        root: Folder with one folder per category.
        category: Only this category.
        sequences: Only sequences with these names.
        subset: Only frames of ``set_lists/set_lists_<subset>.json``, such as ``fewview_dev``.
        split: Only frames of this part of the subset: train, val or test.

    Raises:
        FileNotFoundError: Annotations, a set list or a listed image are missing.
        ValueError: They are damaged, or a camera is invalid (NaN, no rotation, no focal length).

    Example:
        >>> for sequence in read_co3d("co3d", "apple", subset="fewview_dev", split="test"):
        ...     images = torch.stack([frame.image() for frame in sequence.frames[:8]])
    """
    if split is not None and subset is None:
        raise UserError(f"split={split!r} is part of a subset; give subset= too, such as 'fewview_dev'")
    known = list_categories(root)
    if category is not None and category not in known:
        raise FileNotFoundError(f"no category {category!r} under {root}; available: {', '.join(known)}")
    for name in known if category is None else [category]:
        for entry in group_annotations(root, name, sequences=sequences, subset=subset, split=split).values():
            yield entry.read()


def opencv_from_viewpoint(
    viewpoint: dict[str, Any],
    size: tuple[int, int],  # height, width
    where: str,
) -> tuple[Tensor, Tensor]:  # intrinsics [3, 3], cam_from_world [4, 4]; float64
    """Convert CO3D's viewpoint annotation; `where` names the frame in errors."""
    try:
        rotation, translation, focal, principal = (
            torch.tensor(viewpoint[key], dtype=torch.float64).reshape(shape)
            for key, shape in (("R", (3, 3)), ("T", (3,)), ("focal_length", (2,)), ("principal_point", (2,)))
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{where}: the viewpoint lacks R, T, focal_length or principal_point ({error})") from None
    style = viewpoint.get("intrinsics_format", "ndc_norm_image_bounds")
    if style not in INTRINSICS_FORMATS:
        raise UserError(f"{where}: intrinsics_format {style!r} is unknown; known: {', '.join(INTRINSICS_FORMATS)}")
    numbers = torch.cat([rotation.flatten(), translation, focal, principal])
    skew = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max()
    if not numbers.isfinite().all() or skew > MAX_ROTATION_ERROR or rotation.det() < 0 or (focal <= 0).any():
        raise UserError(
            f"{where}: not a camera (R must be a rotation, focal lengths positive, all numbers finite); "
            "leave this sequence out with sequences=[...] or repair its annotation"
        )
    height, width = size
    sides = torch.tensor([width, height], dtype=torch.float64)
    half = (sides.amin().expand(2) if style == "ndc_isotropic" else sides) / 2.0
    intrinsics = torch.eye(3, dtype=torch.float64)
    intrinsics[0, 0], intrinsics[1, 1] = focal * half
    intrinsics[:2, 2] = sides / 2.0 - principal * half
    cam_from_world = torch.eye(4, dtype=torch.float64)
    cam_from_world[:3, :3] = OPENCV_FROM_PYTORCH3D @ rotation.T
    cam_from_world[:3, 3] = OPENCV_FROM_PYTORCH3D @ translation
    return intrinsics, cam_from_world


def group_annotations(
    root: str | Path,
    category: str,
    *,
    sequences: Collection[str] | None = None,
    subset: str | None = None,
    split: str | None = None,
) -> dict[str, SequenceEntry]:
    """Annotations of one category by sequence, in order of name; arguments as in `read_co3d`."""
    folder = Path(root) / category
    wanted = _read_set_list(folder, subset, split) if subset is not None else None
    clouds: dict[str, Any] = {}
    qualities: dict[str, Any] = {}
    for entry in _read_annotations(folder / "sequence_annotations.jgz"):
        clouds[entry["sequence_name"]] = (entry.get("point_cloud") or {}).get("path")
        qualities[entry["sequence_name"]] = entry.get("viewpoint_quality_score")
    grouped: dict[str, list[dict[str, Any]]] = {}
    for entry in _read_annotations(folder / "frame_annotations.jgz"):
        name = entry["sequence_name"]
        if (sequences is None or name in sequences) and (wanted is None or (name, entry.get("frame_number")) in wanted):
            grouped.setdefault(name, []).append(entry)
    return {
        name: SequenceEntry(Path(root), category, name, grouped[name], clouds.get(name), qualities.get(name))
        for name in sorted(grouped)
    }


@dataclass(frozen=True)
class SequenceEntry:
    """A sequence as annotated; `read` checks it."""

    root: Path
    category: str
    name: str
    entries: list[dict[str, Any]]
    cloud: str | None
    quality: float | None  # of the cameras

    def read(self) -> Co3dSequence:
        frames = sorted((_frame(self.root, entry) for entry in self.entries), key=lambda frame: frame.number)
        return Co3dSequence(self.category, self.name, tuple(frames), self.root / self.cloud if self.cloud else None)


def _frame(root: Path, entry: dict[str, Any]) -> Co3dFrame:
    where = f"{entry['sequence_name']}, frame {entry.get('frame_number')}"
    try:
        image, height, width = entry["image"]["path"], *(int(side) for side in entry["image"]["size"])
        viewpoint = entry["viewpoint"]
        mask, depth = entry.get("mask") or {}, entry.get("depth") or {}
        scale = float(depth.get("scale_adjustment", 1.0))
        number = int(entry["frame_number"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: damaged annotation ({type(error).__name__}: {error})") from None
    if viewpoint is None or not math.isfinite(scale):
        raise UserError(f"{where}: no viewpoint or no finite depth scale; leave the sequence out with sequences=[...]")
    intrinsics, cam_from_world = opencv_from_viewpoint(viewpoint, (height, width), where)

    def inside(path: str | None) -> Path | None:
        return root / path if path else None

    return Co3dFrame(
        number=number,
        image_path=_existing(root / image),
        size=(height, width),
        intrinsics=intrinsics,
        cam_from_world=cam_from_world,
        mask_path=inside(mask.get("path")),
        depth_path=inside(depth.get("path")),
        depth_mask_path=inside(depth.get("mask_path")),
        depth_scale=scale,
    )


def _read_annotations(path: Path) -> list[dict[str, Any]]:
    try:
        data = json.loads(gzip.decompress(_existing(path).read_bytes()))
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not gzipped JSON ({error}); fetch it again from CO3Dv2") from None
    if not isinstance(data, list) or any(not isinstance(e, dict) or "sequence_name" not in e for e in data):
        raise UserError(f"{path} is not a list of annotations with a sequence_name; fetch it again from CO3Dv2")
    return data


def _read_set_list(folder: Path, subset: str | None, split: str | None) -> set[tuple[str, int]]:
    path = folder / "set_lists" / f"set_lists_{subset}.json"
    if not path.is_file():
        known = sorted(p.stem.removeprefix("set_lists_") for p in path.parent.glob("set_lists_*.json"))
        raise FileNotFoundError(f"no {path}; subsets of {folder.name}: {', '.join(known) or 'none'}")
    try:
        parts = json.loads(path.read_text(encoding="utf-8-sig"))
        if split is not None and split not in parts:
            raise UserError(f"split={split!r} is not in {path}; it has: {', '.join(parts)}")
        chosen = [split] if split is not None else list(parts)
        return {(str(entry[0]), int(entry[1])) for name in chosen for entry in parts[name]}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, IndexError, KeyError) as error:
        raise UserError(f"{path} is not a CO3D set list ({error}); fetch it again from CO3Dv2") from None


def _open(path: Path) -> Image.Image:
    try:
        with opened(_existing(path)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, FileNotFoundError | UserError):
            raise
        raise UserError(f"{path} is not a readable image ({error}); fetch it again") from None
    return image


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}, which the annotations need; fetch the rest of the dataset")
    return path
