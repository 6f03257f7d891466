"""Videos of procedural worlds along long paths, with exact poses and depth; frames are rendered on access.

As a dataset, a scene is "seed000001000", the world of that seed along one path; ``root`` is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data.procedural.orbits import Cameras, OrbitConfig
from geoaccel.eval.data.procedural.paths import PATHS, as_corridor, draw_path
from geoaccel.eval.data.procedural.world import World, draw_worlds
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, OnSkip, make_scene, read_candidates
from geoaccel.eval.data.synthetic import VALIDATION_SEEDS, SceneBatch, render_cameras
from geoaccel.eval.data.synthetic_scenes import whole_numbers
from geoaccel.registry import unknown

AT_ONCE = 32
"""Frames that are rendered together when one of them is accessed."""


@dataclass(frozen=True)
class LongPath:
    """One world and the cameras along its path.

    Attributes:
        world: One row.
        cameras: [1, S]; poses and intrinsics are exact.
        size: (H, W) in pixels.
        seed: Seed of the scene.
    """

    world: World
    cameras: Cameras
    size: tuple[int, int]
    seed: int

    def __len__(self) -> int:
        return self.cameras.cam_from_world.shape[1]

    def render(self, start: int, stop: int, device: torch.device | str = "cpu") -> SceneBatch:
        """Frames from `start` to before `stop`; a frame does not depend on the range in which it is rendered."""
        part = {name: value[:, start:stop] for name, value in vars(self.cameras).items()}
        return render_cameras(self.world, replace(self.cameras, **part), self.size, (self.seed,), device=device)


def long_path(seed: int, path: str = "loop", *, frames: int = 600, size: tuple[int, int] = (112, 112)) -> LongPath:
    """A long path through the world of a seed.

    Example:
        >>> video = long_path(1000, "loop", frames=600)
        >>> video.render(0, 32).images.shape
        torch.Size([1, 32, 3, 112, 112])

    Args:
        seed: As in `sample_batch`, with the same world.
        path: ``loop``, ``two-loops`` or ``corridor``.
        frames: S.
        size: Height and width in pixels.

    Raises:
        UserError: For an unknown path.
    """
    world, framing, height = draw_worlds([seed], OrbitConfig())
    cameras = draw_path(seed, path, frames, size, framing, height)
    return LongPath(as_corridor(world) if path == "corridor" else world, cameras, size, seed)


@reader("long_paths", is_sequence=True, is_rendered=True)
def read(
    root: str | Path | None = None,
    *,
    scenes: Collection[str] | None = None,
    on_skip: OnSkip | None = None,
    seeds: Iterable[int] = VALIDATION_SEEDS,
    num_frames: int = 600,
    path: str = "loop",
    size: tuple[int, int] = (112, 112),
) -> Iterator[EvalScene]:
    """Yield one video per seed.

    Args:
        root: Not used.
        scenes: Only these names.
        on_skip: Not called: every video can be rendered.
        seeds: Which worlds; by default 32 validation scenes.
        num_frames: Frames of the whole path.
        path: ``loop``, ``two-loops`` or ``corridor``.
        size: Height and width in pixels.

    Raises:
        ValueError: For an unknown path, or invalid size or seeds.
    """
    if path not in PATHS:
        raise UserError(unknown("data.options.path", path, list(PATHS)))
    height, width = whole_numbers("size", size, "height and width in pixels, such as [112, 112]", least=2, count=2)
    seeds = whole_numbers("seeds", seeds, "a list of whole numbers, such as [1000, 1001]", least=0)
    candidates = [
        Candidate(f"seed{seed:09d}", None, partial(_scene, (seed, path, num_frames, (height, width)))) for seed in seeds
    ]
    return read_candidates(candidates, scenes, on_skip)


_Key = tuple[int, str, int, tuple[int, int]]


@functools.lru_cache(maxsize=2)
def _path(key: _Key) -> LongPath:
    seed, path, frames, size = key
    return long_path(seed, path, frames=frames, size=size)


@functools.lru_cache(maxsize=2)
def _rendered(key: _Key, chunk: int) -> SceneBatch:
    return _path(key).render(chunk * AT_ONCE, min((chunk + 1) * AT_ONCE, key[2]))


def _scene(key: _Key) -> EvalScene:
    cameras = _path(key).cameras
    frames = [
        EvalFrame(
            f"frame{i:06d}",
            cameras.cam_from_world[0, i].double(),
            cameras.intrinsics[0, i].double(),
            read_image=partial(_pixels, key, "images", i),
            read_depth=partial(_pixels, key, "depth", i),
            read_mask=partial(_pixels, key, "mask", i),
        )
        for i in range(key[2])
    ]
    return make_scene(f"seed{key[0]:09d}", frames)


def _pixels(key: _Key, what: str, index: int) -> Tensor:
    return getattr(_rendered(key, index // AT_ONCE), what)[0, index % AT_ONCE].clone()
