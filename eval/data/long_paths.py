"""Videos of procedural worlds along long paths, with exact poses and depth; frames are rendered when asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from geoaccel.eval.data.procedural.orbits import Cameras, OrbitConfig
from geoaccel.eval.data.procedural.paths import as_corridor, draw_path
from geoaccel.eval.data.procedural.world import World, draw_worlds
from geoaccel.eval.data.synthetic import SceneBatch, render_cameras


@dataclass(frozen=True)
class LongPath:
    """One world and the cameras that go through it.

    Attributes:
        world: One row.
        cameras: [1, S]; poses and intrinsics are exact.
        size: (H, W) in pixels.
        seed: Of the scene.
    """

    world: World
    cameras: Cameras
    size: tuple[int, int]
    seed: int

    def __len__(self) -> int:
        return self.cameras.cam_from_world.shape[1]

    def render(self, start: int, stop: int, device: torch.device | str = "cpu") -> SceneBatch:
        """Frames from `start` to before `stop`; each is the same in whatever range it is rendered."""
        part = {name: value[:, start:stop] for name, value in vars(self.cameras).items()}
        return render_cameras(self.world, replace(self.cameras, **part), self.size, (self.seed,), device=device)


def long_path(seed: int, path: str = "loop", *, frames: int = 600, size: tuple[int, int] = (112, 112)) -> LongPath:
    """A long path through the world of a seed.

    Example:
        >>> video = long_path(1000, "loop", frames=600)
        >>> video.render(0, 32).images.shape
        torch.Size([1, 32, 3, 112, 112])

    Args:
        seed: The same as of `sample_batch`: the world is the same.
        path: ``loop``, ``two-loops`` or ``corridor``.
        frames: S.
        size: Height and width in pixels.

    Raises:
        UserError: For a path that there is not.
    """
    world, framing, height = draw_worlds([seed], OrbitConfig())
    cameras = draw_path(seed, path, frames, size, framing, height)
    return LongPath(as_corridor(world) if path == "corridor" else world, cameras, size, seed)
