"""A tilted wall, cameras that look at it, and files of datasets: what small datasets on disk are made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from geoaccel.cameras import invert_rigid, pixel_grid

WALL_NORMAL = torch.tensor([-0.3, 0.2, 1.0], dtype=torch.float64)
WALL_OFFSET = 2.5


def camera_poses(count: int = 3) -> Tensor:  # [S, 4, 4], float64
    """Cameras that look at the wall, each turned about all axes."""
    poses = []
    for i in range(count):
        angles = torch.tensor([0.05 + 0.04 * i, -0.1 + 0.07 * i, 0.2 * i], dtype=torch.float64)
        skew = torch.zeros(3, 3, dtype=torch.float64)
        skew[2, 1], skew[0, 2], skew[1, 0] = angles
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3, :3] = torch.linalg.matrix_exp(skew - skew.T)
        pose[:3, 3] = torch.tensor([0.2 * i - 0.1, 0.1, 0.15 * i], dtype=torch.float64)
        poses.append(pose)
    return torch.stack(poses)


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Tensor:  # [3, 3], float64
    return torch.tensor([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], dtype=torch.float64)


def depth_of_rays(
    rays: Tensor,  # [..., 2], x / z and y / z
    cam_from_world: Tensor,  # [4, 4]
) -> Tensor:  # [...]
    world_from_cam = invert_rigid(cam_from_world)
    directions = torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1) @ world_from_cam[:3, :3].T
    return (WALL_OFFSET - WALL_NORMAL @ world_from_cam[:3, 3]) / (directions @ WALL_NORMAL)


def wall_depth(intrinsics: Tensor, cam_from_world: Tensor, size: tuple[int, int]) -> Tensor:  # [H, W], float64
    pixels = pixel_grid(*size, dtype=torch.float64)
    return depth_of_rays((pixels - intrinsics[:2, 2]) / intrinsics.diagonal()[:2], cam_from_world)


def write_photograph(path: Path, size: tuple[int, int], number: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size[1], size[0]), (40 * number, 100, 200)).save(path, **options)
    return path


def write_depth_png(path: Path, depth: Tensor, units: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((depth * units).round().numpy().astype(np.uint16)).save(path, compress_level=1)
    return path


def write_text(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else " ".join(repr(float(x)) for x in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_ply(path: Path, points: np.ndarray) -> Path:
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}", "property float x", "property float y"]
    return write_text(path, *header, "property float z", "end_header", *points)


@dataclass
class Tree:
    """A dataset on disk and the truth about it."""

    dataset: str
    root: Path
    scene: str
    intrinsics: Tensor | None
    size: tuple[int, int]
    images: list[Path] = field(default_factory=list)
    depths: list[Path] = field(default_factory=list)
    tolerance: float = 2e-3
    options: dict[str, Any] = field(default_factory=dict)
    can_be_partial: bool = False  # a file fewer is a frame fewer, as far as the reader can know
