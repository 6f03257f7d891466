"""A scene whose depth is a formula (a sphere before a wall), and a model that predicts it exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from geoaccel.backbone import Geometry, Preprocess
from geoaccel.cameras import invert_rigid, pixel_grid, to_homogeneous, unproject_depth
from geoaccel.images import ImageTransform, load_images

WALL_Z = 6.0
SPHERE = torch.tensor([0.2, -0.1, 4.0])
RADIUS = 0.8


def poses(count: int) -> Tensor:  # [S, 4, 4]
    """Cameras beside each other, turned towards the sphere and rolled a little."""
    out = []
    for i, offset in enumerate(torch.linspace(-0.8, 0.8, count).tolist()):
        yaw, roll = -0.2 * offset, 0.05 * i
        turn = torch.tensor([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        twist = torch.tensor([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
        centre = torch.tensor([offset, 0.1 * i, 0.0], dtype=torch.float64)
        world_from_cam = torch.cat([turn @ twist, centre[:, None]], dim=1)
        out.append(invert_rigid(to_homogeneous(world_from_cam)))
    return torch.stack(out).float()


def original_intrinsics(size: tuple[int, int]) -> Tensor:  # [3, 3]
    """A camera with a focal length of its own and a principal point beside the centre."""
    height, width = size
    focal = 0.9 * max(size)
    return torch.tensor([[focal, 0, 0.52 * width], [0, focal, 0.49 * height], [0, 0, 1]])


def exact_depth(intrinsics: Tensor, cam_from_world: Tensor, size: tuple[int, int]) -> Tensor:  # [H, W]
    """z-depth of every pixel of one camera."""
    pixels = pixel_grid(*size, dtype=torch.float64)
    k, pose = intrinsics.double(), invert_rigid(cam_from_world.double())
    rays = torch.cat([(pixels - k[:2, 2]) / k.diagonal()[:2], torch.ones(*size, 1)], dim=-1) @ pose[:3, :3].T
    centre = pose[:3, 3]
    wall = (WALL_Z - centre[2]) / rays[..., 2]
    to_sphere = SPHERE.double() - centre
    a, b, c = (rays**2).sum(-1), rays @ to_sphere, to_sphere @ to_sphere - RADIUS**2
    discriminant = b**2 - a * c
    sphere = (b - discriminant.clamp(min=0).sqrt()) / a
    return torch.where(discriminant > 0, sphere, wall).float()


class AnalyticModel(nn.Module):
    """Predicts the scene exactly; `change` spoils the geometry where a test wants that."""

    heads = ("camera", "depth", "point")

    def __init__(self, transforms: list[ImageTransform], preprocess: Preprocess | None = None, change=lambda g: g):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.transforms, self.preprocess, self.change = transforms, preprocess or Preprocess(size=112), change
        self.backbone = SimpleNamespace(geometry=self.geometry, conditions=None, unit="arbitrary", name="analytic")

    def forward(self, images: Tensor, *, heads: tuple[str, ...]) -> dict[str, Tensor]:
        assert images.shape[:2] == (1, len(self.transforms))
        assert images.dtype == torch.float32, "a network casts after it has normalised"
        self.asked = list(heads)
        return {"images": images}

    def geometry(self, predictions: dict[str, Tensor], size: tuple[int, int]) -> Geometry:
        cameras = poses(len(self.transforms))
        intrinsics = torch.stack(
            [t.intrinsics_to_network(original_intrinsics(t.original_size)) for t in self.transforms]
        )
        depth = torch.stack([exact_depth(k, pose, size) for k, pose in zip(intrinsics, cameras, strict=True)])
        points = unproject_depth(depth, intrinsics, cameras)
        conf = 1 / depth + 0.1 * torch.linspace(0, 1, depth.numel()).view_as(depth)  # no two are equal
        return self.change(Geometry(cameras[None], intrinsics[None], depth[None], points[None], conf[None]))


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """One image for each (H, W), with a colour that says where in the picture a pixel is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (height, width) in enumerate(sizes):
        red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        pixels = np.stack([red, green, np.full_like(red, 40 * i)], axis=-1).round().astype(np.uint8)
        paths.append(folder / f"photo_{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


MODES = {
    "crop": (Preprocess("crop", 112, 14), [(180, 130), (180, 130), (160, 120)]),
    "pad": (Preprocess("pad", 112, 14), [(120, 160), (160, 110), (97, 160)]),
    "stretch": (Preprocess("budget", 112, 14, max_pixels=12_000), [(120, 160), (130, 160), (120, 150)]),
}


def load(folder: Path, mode: str):
    """Images of different sizes, as one preprocessing mode makes them, and the model that knows the scene."""
    preprocess, sizes = MODES[mode]
    batch = load_images(write_images(folder, sizes), preprocess)
    return batch, AnalyticModel(batch.transforms, preprocess)


@pytest.fixture(scope="module")
def checked_memory() -> Iterator[list[dict]]:
    """Replaces the memory estimate, which knows nothing of this model; returns what it was asked."""
    asked: list[dict] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geoaccel.memory.check_memory", lambda model, **size: asked.append(size))
        yield asked
