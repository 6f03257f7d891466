"""The procedural scenes as evaluation scenes; nothing is on disk, ``root`` is not used.

A scene is "seed000000000"; it is rendered when yielded, and again if needed after another scene.
Depth, masks, poses and intrinsics are exact; the point cloud is every visible surface point of every frame.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, OnSkip, make_scene, read_candidates
from geoaccel.eval.data.synthetic import TEST_SEEDS, SceneBatch, sequence


@reader("synthetic", is_rendered=True)
def read(
    root: str | Path | None = None,
    *,
    scenes: Collection[str] | None = None,
    on_skip: OnSkip | None = None,
    seeds: Iterable[int] = TEST_SEEDS,
    num_frames: int = 8,
    size: tuple[int, int] = (224, 224),
) -> Iterator[EvalScene]:
    """Yield one scene per seed.

    Args:
        root: Not used.
        scenes: Only these names.
        on_skip: Not called: every scene can be rendered.
        seeds: Which scenes; by default the 64 default validation scenes.
        num_frames: Frames per scene.
        size: Height and width in pixels.

    Raises:
        ValueError: If ``size`` is not height and width, or ``seeds`` not a list of whole numbers.
    """
    height, width = whole_numbers("size", size, "height and width in pixels, such as [224, 224]", least=1, count=2)
    seeds = whole_numbers("seeds", seeds, "a list of whole numbers, such as [3, 4]", least=0)
    candidates = [
        Candidate(f"seed{seed:09d}", None, partial(_scene, seed, num_frames, (height, width))) for seed in seeds
    ]
    return read_candidates(candidates, scenes, on_skip)


def whole_numbers(name: str, given: Any, wanted: str, *, least: int, count: int | None = None) -> list[int]:
    """An option that is a list of whole numbers.

    Raises:
        ValueError: If it is anything else; the message says what is expected.
    """
    numbers = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    right = numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= least for n in numbers)
    if not right or count not in (None, len(numbers)):
        raise UserError(f"{name}={given!r}: give {wanted}")
    return numbers


@functools.lru_cache(maxsize=1)
def _rendered(seed: int, num_frames: int, size: tuple[int, int]) -> SceneBatch:
    return sequence(seed, frames=num_frames, size=size)


def _scene(seed: int, num_frames: int, size: tuple[int, int]) -> EvalScene:
    key = (seed, num_frames, size)
    batch = _rendered(*key)
    frames = [
        EvalFrame(
            f"frame{i:06d}",
            batch.cam_from_world[0, i].double(),
            batch.intrinsics[0, i].double(),
            read_image=partial(_pixels, key, "images", i),
            read_depth=partial(_pixels, key, "depth", i),
            read_mask=partial(_pixels, key, "mask", i),
        )
        for i in range(num_frames)
    ]
    return make_scene(f"seed{seed:09d}", frames, read_points=partial(_points, key))


def _pixels(key: tuple[int, int, tuple[int, int]], what: str, index: int) -> Tensor:
    return getattr(_rendered(*key), what)[0, index].clone()


def _points(key: tuple[int, int, tuple[int, int]]) -> Tensor:  # [N, 3]
    batch = _rendered(*key)
    return batch.points_world[0][batch.valid[0]]
