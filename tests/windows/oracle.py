"""A network that sees a long path exactly, in a world, a scale and with an error of its own for every window."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import Geometry, Preprocess
from geoaccel.eval.data.long_paths import LongPath, long_path
from geoaccel.windows.graph import exponential
from geoaccel.windows.store import Frame, Window, ranked

SIZE = (28, 28)


def windows_of(path: LongPath, spans: list[tuple[int, int]], features: Tensor | None = None) -> list[Window]:
    """What an exact network would say of each span, in worlds of its own."""
    found = []
    for number, (start, stop) in enumerate(spans):
        batch = path.render(start, stop)
        found.append(exact_window(batch, start, number, features=features))
    return found


def exact_window(batch: Any, start: int, seed: int, features: Tensor | None = None) -> Window:
    """One window of rendered frames: truth, moved by a similarity that the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    moved = exponential(0.5 * torch.randn(1, 7, generator=generator, dtype=torch.float64))
    world = type(moved)(moved.scale[0], moved.rotation[0], moved.translation[0])
    poses = world.apply_poses(batch.cam_from_world[0]).float()
    depth = (batch.depth[0] * world.scale).float()
    count = len(depth)
    frames = [Frame(f"frame{start + i:05d}.png", start + i, identity_transform(depth.shape[1:])) for i in range(count)]
    return Window(
        start=start,
        frames=frames,
        pixels=(batch.images[0] * 255).round().to(torch.uint8),
        valid=torch.ones_like(depth, dtype=torch.bool),
        cam_from_world=poses,
        intrinsics=batch.intrinsics[0],
        depth=depth,
        rank=ranked(1 / (1 + depth), batch.valid[0]),
        features=None if features is None else features[start : start + count],
        unit="arbitrary",
    )


def identity_transform(size: Any) -> Any:
    from geoaccel.images import ImageTransform

    height, width = (int(side) for side in size)
    return ImageTransform((height, width), (height, width), (1.0, 1.0), (0.0, 0.0))


class Oracle(nn.Module):
    """Recognises the frames of some videos by their pixels and predicts them exactly; each forward in another world.

    Args:
        videos: Images [S, 3, H, W] and the batch that they come from, for each. Frames of different videos, or that
            are far from each other where `blind` says so, come out in one world that means nothing.
    """

    heads = ("camera", "depth")

    def __init__(self, videos: list[Any], drift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.encoder = _Encoder()
        self.videos, self.drift, self.forwards = videos, drift, 0
        self.preprocess = Preprocess("crop", SIZE[1], 14)
        self.backbone = SimpleNamespace(geometry=self.geometry, conditions=None, unit="arbitrary", name="oracle")

    def activation_bytes(self, frames: int, size: tuple[int, int], **how: Any) -> int:
        return frames * size[0] * size[1]

    def memory_plans(self, device: str) -> list[Any]:
        return []

    def forward(self, images: Tensor, *, heads: Any) -> dict[str, Tensor]:
        self.forwards += 1
        return {"images": self.encoder(images)}

    def geometry(self, predictions: dict[str, Tensor], size: tuple[int, int]) -> Geometry:
        images = predictions["images"][0]
        poses, intrinsics, depth, conf = [], [], [], []
        for image in images:
            video, frame = self._find(image)
            poses.append(video.cam_from_world[0, frame])
            intrinsics.append(video.intrinsics[0, frame])
            depth.append(video.depth[0, frame].where(video.depth[0, frame] > 0, 50.0))
            conf.append((video.depth[0, frame] > 0) / (1 + video.depth[0, frame]))
        seed = int(torch.stack(poses).sum() * 1e6) % 2**31
        generator = torch.Generator().manual_seed(seed)
        step = 0.3 * torch.randn(1, 7, generator=generator, dtype=torch.float64)
        moved = exponential(step)
        world = type(moved)(moved.scale[0], moved.rotation[0], moved.translation[0])
        cam_from_world = world.apply_poses(torch.stack(poses)).float()
        if self.drift:  # centres spread too far, the more the later in the window
            stretch = 1 + self.drift * torch.linspace(-1, 1, len(poses))
            cam_from_world[:, :3, 3] *= stretch[:, None]
        depths = torch.stack(depth) * world.scale.float()
        points = torch.zeros(*depths.shape, 3)
        return Geometry(
            cam_from_world[None], torch.stack(intrinsics)[None], depths[None], points[None], torch.stack(conf)[None]
        )

    def _find(self, image: Tensor) -> tuple[Any, int]:
        best: tuple[float, Any, int] | None = None
        for video in self.videos:
            apart = (video.images[0] - image).abs().mean(dim=(1, 2, 3))
            frame = int(apart.argmin())
            if best is None or float(apart[frame]) < best[0]:
                best = (float(apart[frame]), video, frame)
        assert best is not None
        return best[1], best[2]


class _Encoder(nn.Module):
    """Patches are colours of a small picture; it has the slot that puts a frame first."""

    def __init__(self) -> None:
        super().__init__()
        self.reference: Any = None

    def forward(self, images: Tensor) -> Tensor:
        patches = nn.functional.avg_pool2d(images[0], 7)
        grid = (patches.shape[2], patches.shape[3])
        if self.reference is not None:
            # Colour and where it is: a mean over patches of colours by place.
            rows = patches.flatten(2).transpose(1, 2)
            codes = torch.nn.functional.one_hot(torch.arange(grid[0] * grid[1])).float()
            features = (rows[..., None] * codes[None, :, None, :]).flatten(2)
            order = self.reference(features[None], grid)
            if order is not None:
                return images[:, order]
        return images


def short_loop(frames: int = 48, seed: int = 1000, path: str = "loop") -> LongPath:
    """A path of small frames."""
    return long_path(seed, path, frames=frames, size=SIZE)


def images_of(oracle: Oracle, frames: Any = slice(None)) -> torch.Tensor:
    return torch.cat([video.images[0] for video in oracle.videos])[frames]
