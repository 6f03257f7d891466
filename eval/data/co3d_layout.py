"""Write CO3Dv2's layout on disk, so that one reader serves real and procedural sequences.

    <root>/<category>/frame_annotations.jgz  sequence_annotations.jgz     gzipped JSON lists
    <root>/<category>/set_lists/set_lists_<subset>.json                   {"test": [[sequence, frame, image path]], ...}
    <root>/<category>/<sequence>/images/frame000001.jpg
    <root>/<category>/<sequence>/depths/frame000001.jpg.geometric.png     16 bits: the bit pattern of a float16
    <root>/<category>/<sequence>/{masks,depth_masks}/frame000001.png
    <root>/<category>/<sequence>/pointcloud.ply

Paths in the annotations are relative to ``<root>``. A viewpoint is PyTorch3D's: row vectors (``x_cam = x_world R + T``)
with x left and y up, and intrinsics in ``ndc_isotropic`` units, in which the shorter side of the image is two long.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.atomic import atomic_folder
from geoaccel.eval.data.co3d import OPENCV_FROM_PYTORCH3D
from geoaccel.eval.data.synthetic import SceneBatch

JPEG_QUALITY = 95
MAX_CLOUD_POINTS = 100_000
SPLITS = ("train", "val", "test")
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class SequenceToWrite:
    """One sequence of S frames of one size. Fields that are None are omitted from the layout, as CO3D allows."""

    name: str
    images: Tensor  # [S, 3, H, W] in [0, 1]
    intrinsics: Tensor  # [S, 3, 3], pixels
    cam_from_world: Tensor  # [S, 4, 4]
    depth: Tensor | None = None  # [S, H, W], 0 where there is none
    mask: Tensor | None = None  # [S, H, W], bool, the object
    points: Tensor | None = None  # [N, 3], world
    point_colors: Tensor | None = None  # [N, 3] in [0, 1]

    def __post_init__(self) -> None:
        num, _, height, width = self.images.shape
        expected = {"intrinsics": (num, 3, 3), "cam_from_world": (num, 4, 4)}
        expected |= {"depth": (num, height, width), "mask": (num, height, width)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(
                    f"sequence {self.name!r}: {name} is {list(value.shape)}, images {list(self.images.shape)} "
                    f"need {list(shape)}"
                )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"sequence name {self.name!r} is not a folder name; use letters, digits, '_' and '-'")


def from_scenes(batch: SceneBatch) -> list[SequenceToWrite]:
    """The scenes of a batch as sequences, each with the object's visible surface as its point cloud."""
    batch = batch.to("cpu")
    sequences = []
    for b, seed in enumerate(batch.seeds):
        mask = batch.mask[b]
        step = max(1, int(mask.sum()) // MAX_CLOUD_POINTS)
        sequences.append(
            SequenceToWrite(
                name=f"seed{seed:09d}",
                images=batch.images[b],
                intrinsics=batch.intrinsics[b],
                cam_from_world=batch.cam_from_world[b],
                depth=batch.depth[b],
                mask=mask,
                points=batch.points_world[b][mask][::step],
                point_colors=batch.images[b].movedim(1, -1)[mask][::step],
            )
        )
    return sequences


def write_co3d(
    root: str | Path,
    sequences: Iterable[SequenceToWrite],
    *,
    category: str = "procedural",
    subset: str = "fewview_dev",
    split: str = "test",
    overwrite: bool = False,
) -> Path:
    """Write a category atomically.

    Args:
        root: Folder of all categories; created if missing.
        sequences: May be a generator: one sequence is in memory at a time.
        category: Name of the category's folder.
        subset: The set list to write, ``set_lists/set_lists_<subset>.json``.
        split: The part of the set list that all frames belong to: train, val or test.
        overwrite: Replace an earlier result.

    Returns:
        The category's folder.

    Example:
        >>> batch = sample_batch(TEST_SEEDS[:4], frames=8, size=(224, 224))
        >>> write_co3d("data", from_scenes(batch))
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    target = Path(root) / category
    frame_annotations: list[dict[str, Any]] = []
    sequence_annotations: list[dict[str, Any]] = []
    with atomic_folder(target, overwrite=overwrite) as work:
        for sequence in sequences:
            if any(known["sequence_name"] == sequence.name for known in sequence_annotations):
                raise ValueError(f"two sequences are named {sequence.name!r}; give each a unique name")
            (work / sequence.name).mkdir()
            frame_annotations += _write_frames(work, category, sequence)
            sequence_annotations.append(_write_sequence(work, category, sequence))
        _write_json_gz(work / "frame_annotations.jgz", frame_annotations)
        _write_json_gz(work / "sequence_annotations.jgz", sequence_annotations)
        frames = [[f["sequence_name"], f["frame_number"], f["image"]["path"]] for f in frame_annotations]
        (work / "set_lists").mkdir()
        set_list = {name: frames if name == split else [] for name in SPLITS}
        (work / "set_lists" / f"set_lists_{subset}.json").write_text(json.dumps(set_list))
    return target


def viewpoint_from_opencv(
    intrinsics: Tensor,  # [3, 3], pixels
    cam_from_world: Tensor,  # [4, 4]
    size: tuple[int, int],  # height, width
) -> dict[str, Any]:
    """CO3D's viewpoint annotation of a camera. Skew is lost: CO3D cannot represent it."""
    height, width = size
    half = min(height, width) / 2.0
    intrinsics, cam_from_world = intrinsics.double().cpu(), cam_from_world.double().cpu()
    center = torch.tensor([width, height], dtype=torch.float64) / 2.0
    return {
        "R": (OPENCV_FROM_PYTORCH3D @ cam_from_world[:3, :3]).T.tolist(),
        "T": (OPENCV_FROM_PYTORCH3D @ cam_from_world[:3, 3]).tolist(),
        "focal_length": (intrinsics.diagonal()[:2] / half).tolist(),
        "principal_point": ((center - intrinsics[:2, 2]) / half).tolist(),
        "intrinsics_format": "ndc_isotropic",
    }


def _write_frames(work: Path, category: str, sequence: SequenceToWrite) -> list[dict[str, Any]]:
    folder, inside = work / sequence.name, f"{category}/{sequence.name}"
    kinds = (
        ["images"] + ["depths", "depth_masks"] * (sequence.depth is not None) + ["masks"] * (sequence.mask is not None)
    )
    for kind in kinds:
        (folder / kind).mkdir()
    height, width = sequence.images.shape[-2:]
    annotations = []
    for i, image in enumerate(sequence.images):
        name = f"frame{i + 1:06d}"
        pixels = (image.movedim(0, -1).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg", quality=JPEG_QUALITY, subsampling=0)
        depth = mask = None
        if sequence.depth is not None:
            depth = {
                "path": f"{inside}/depths/{name}.jpg.geometric.png",
                "scale_adjustment": _write_depth(folder / "depths" / f"{name}.jpg.geometric.png", sequence.depth[i]),
                "mask_path": f"{inside}/depth_masks/{name}.png",
            }
            _write_mask(folder / "depth_masks" / f"{name}.png", sequence.depth[i] > 0)
        if sequence.mask is not None:
            _write_mask(folder / "masks" / f"{name}.png", sequence.mask[i])
            mask = {"path": f"{inside}/masks/{name}.png", "mass": float(sequence.mask[i].sum())}
        annotations.append(
            {
                "sequence_name": sequence.name,
                "frame_number": i + 1,
                "frame_timestamp": i / 10.0,
                "image": {"path": f"{inside}/images/{name}.jpg", "size": [height, width]},
                "depth": depth,
                "mask": mask,
                "viewpoint": viewpoint_from_opencv(sequence.intrinsics[i], sequence.cam_from_world[i], (height, width)),
                "meta": None,
            }
        )
    return annotations


def _write_sequence(work: Path, category: str, sequence: SequenceToWrite) -> dict[str, Any]:
    cloud = None
    if sequence.points is not None:
        colors = None if sequence.point_colors is None else (sequence.point_colors * 255).round().byte().cpu().numpy()
        path = work / sequence.name / "pointcloud.ply"
        import trimesh

        trimesh.PointCloud(sequence.points.double().cpu().numpy(), colors=colors).export(path)
        name = f"{category}/{sequence.name}/pointcloud.ply"
        cloud = {"path": name, "quality_score": 1.0, "n_points": len(sequence.points)}
    return {
        "sequence_name": sequence.name,
        "category": category,
        "video": None,
        "point_cloud": cloud,
        "viewpoint_quality_score": 1.0,
    }


def _write_depth(path: Path, depth: Tensor) -> float:
    """Write a depth map and return the scale by which it must be multiplied."""
    values = depth.detach().float().cpu().numpy()
    largest = float(values.max(initial=0.0))
    if not np.isfinite(values).all():
        raise ValueError(f"{path.name}: the depth map holds inf or NaN; set pixels without a surface to 0")
    # float16 counts in steps of 1/2048 relative between 6e-5 and 65504
    scale = 1.0 if largest < FLOAT16_MAX / 2 else largest / 1000.0
    Image.fromarray((values / scale).astype(np.float16).view(np.uint16)).save(path)
    return scale


def _write_mask(path: Path, mask: Tensor) -> None:
    Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255).save(path)


def _write_json_gz(path: Path, data: list[dict[str, Any]]) -> None:
    # without a timestamp in the header, equal annotations give identical bytes
    path.write_bytes(gzip.compress(json.dumps(data).encode(), mtime=0))
