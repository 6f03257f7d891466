"""The common format of all datasets: scenes of posed photographs, with depth, masks and points if available.

Poses are ``cam_from_world`` with OpenCV axes, intrinsics are in pixels with the first centre at (0.5, 0.5), depth is
z-depth in the unit of the poses (metres in metric datasets; millimetres in DTU; arbitrary in CO3D), on the pixel grid
of the photograph, 0 where unknown. Pixels are read only on access.

Readers (:data:`geoaccel.eval.data.registry.DATASETS`) leave out unusable scenes and report them through ``on_skip``; a
root folder that is not the dataset raises an exception. Everything can be pickled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.metrics.geometry import as_poses
from geoaccel.images.read import one_line
from geoaccel.registry import unknown

logger = logging.getLogger(__name__)

MIN_FRAMES = 2


@dataclass(frozen=True)
class Skipped:
    """A scene, or a frame of one, that was left out."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


OnSkip = Callable[[Skipped], None]
Root = str | Path | None
"""The folder of a dataset; None if it needs none, or none was given."""
Names = Collection[str] | None
"""Names of the scenes to read; None: all."""


def log_skip(skipped: Skipped) -> None:
    """Default handling of skipped scenes: a warning."""
    logger.warning("skipped %s", skipped)


@dataclass(frozen=True, eq=False)
class EvalFrame:
    """One photograph and its ground truth.

    Attributes:
        name: Unique within the scene.
        cam_from_world: [4, 4], float64.
        intrinsics: [3, 3], float64, pixels of the stored photograph. None if unknown, or if the lens has distortion,
            which a 3x3 matrix cannot represent.
        image_path: The photograph; None if it is rendered.
        read_image, read_depth, read_mask: Functions that read them; None if there is none.
    """

    name: str
    cam_from_world: Tensor
    intrinsics: Tensor | None
    image_path: Path | None = None
    read_image: Callable[[], Tensor] | None = None
    read_depth: Callable[[], Tensor] | None = None
    read_mask: Callable[[], Tensor] | None = None

    def image(self) -> Tensor:  # [3, H, W] in [0, 1]
        if self.read_image is not None:
            return self.read_image()
        assert self.image_path is not None
        return files.read_rgb(self.image_path)

    def size(self) -> tuple[int, int]:  # height, width
        """Size of the photograph."""
        if self.image_path is not None:
            return files.image_size(self.image_path)
        height, width = self.image().shape[-2:]
        return height, width

    def depth(self) -> Tensor | None:  # [H, W], float32
        """z-depth, 0 where unknown; None if the frame has no depth map.

        Raises:
            ValueError: If it cannot be read, or differs in size from the photograph.
        """
        return self._on_grid("depth map", self.read_depth)

    def mask(self) -> Tensor | None:  # [H, W], bool
        """The object; None if the frame has no mask."""
        return self._on_grid("mask", self.read_mask)

    def _on_grid(self, what: str, read: Callable[[], Tensor] | None) -> Tensor | None:
        if read is None:
            return None
        pixels = read()
        if tuple(pixels.shape) != self.size():
            raise UserError(
                f"{self.name}: the {what} is {list(pixels.shape)}, the photograph {list(self.size())}; "
                "resize them to the same size"
            )
        return pixels


@dataclass(frozen=True, eq=False)
class ScanRegion:
    """Region in which a scanned point cloud is valid, as in DTU.

    Attributes:
        mask: [X, Y, Z], bool, cells observed by the scanner.
        box: [2, 3], float64, lower and upper corner of the mask; its first cell is centred on the lower one.
        cell: Size of a cell.
        ground_plane: [4], float64; points count if their homogeneous coordinates have a positive product with it.
    """

    mask: Tensor
    box: Tensor
    cell: float
    ground_plane: Tensor


@dataclass(frozen=True, eq=False)
class EvalScene:
    """One scene to evaluate on.

    Attributes:
        name: Unique within the dataset, usable as a file name.
        category: Group over which scores are averaged first (the object class in CO3D); None if there is none.
        frames: At least two, with finite, rigid poses.
        dropped: Frames of the recording that were left out, and why.
        read_points: Reads the ground-truth point cloud; None if there is none.
        read_region: Reads the region in which that cloud is valid; None if undefined.
    """

    name: str
    category: str | None
    frames: tuple[EvalFrame, ...]
    dropped: tuple[Skipped, ...] = ()
    read_points: Callable[[], Tensor] | None = None
    read_region: Callable[[], ScanRegion] | None = None

    @property
    def cam_from_world(self) -> Tensor:  # [S, 4, 4], float64
        return torch.stack([frame.cam_from_world for frame in self.frames])

    @property
    def intrinsics(self) -> Tensor | None:  # [S, 3, 3], float64
        """None if those of any frame are unknown."""
        known = [frame.intrinsics for frame in self.frames if frame.intrinsics is not None]
        return torch.stack(known) if len(known) == len(self.frames) else None

    @property
    def image_paths(self) -> list[Path]:
        """The photographs; empty if they are rendered."""
        return [frame.image_path for frame in self.frames if frame.image_path is not None]

    def images(self) -> Tensor:  # [S, 3, H, W] in [0, 1]
        """All photographs, as stored."""
        return self._stacked([frame.image() for frame in self.frames])

    def depth(self) -> Tensor | None:  # [S, H, W], float32
        """All depth maps; zeros for a frame without one, None if no frame has one.

        Raises:
            ValueError: If no pixel of any frame is known, or the frames differ in size.
        """
        maps = [frame.depth() for frame in self.frames]
        if all(depth is None for depth in maps):
            return None
        pairs = zip(self.frames, maps, strict=True)
        depth = self._stacked([torch.zeros(f.size()) if depth is None else depth for f, depth in pairs])
        if not (depth > 0).any():
            raise UserError(f"{self.name}: no pixel of any depth map is known; leave the scene out")
        return depth

    def points(self) -> Tensor | None:  # [N, 3], float32
        """The ground-truth point cloud in world coordinates; None if the scene has none."""
        return None if self.read_points is None else self.read_points()

    def region(self) -> ScanRegion | None:
        """Region in which the point cloud is valid; None if undefined."""
        return None if self.read_region is None else self.read_region()

    def subset(self, indices: Sequence[int]) -> EvalScene:
        """The same scene with these frames, in this order."""
        return replace(self, frames=tuple(self.frames[i] for i in indices))

    def _stacked(self, pixels: list[Tensor]) -> Tensor:
        sizes = sorted({tuple(p.shape[-2:]) for p in pixels})
        if len(sizes) > 1:
            raise UserError(f"{self.name}: frames differ in size ({sizes[0]}, {sizes[-1]}); read them one by one")
        return torch.stack(pixels)


def make_scene(
    name: str,
    frames: Iterable[EvalFrame],
    *,
    category: str | None = None,
    dropped: Sequence[Skipped] = (),
    read_points: Callable[[], Tensor] | None = None,
    read_region: Callable[[], ScanRegion] | None = None,
) -> EvalScene:
    """A scene of the frames with a valid pose; those with NaN, infinities or no rotation are dropped.

    Raises:
        ValueError: If fewer than two frames are left.
    """
    kept, left_out = [], list(dropped)
    for frame in frames:
        problem = _pose_problem(frame.cam_from_world)
        if problem is None:
            kept.append(frame)
        else:
            left_out.append(Skipped(frame.name, problem))
    if len(kept) < MIN_FRAMES:
        why = f"; first of {len(left_out)} left out: {left_out[0]}" if left_out else ""
        raise UserError(f"{len(kept)} usable frame(s), at least {MIN_FRAMES} are needed{why}")
    return EvalScene(name, category, tuple(kept), tuple(left_out), read_points, read_region)


def _pose_problem(
    cam_from_world: Tensor,  # [4, 4]
) -> str | None:
    if not cam_from_world.isfinite().all():
        return "the pose is NaN or infinite"
    try:
        as_poses(cam_from_world[None])
    except UserError:
        return "the pose is not a rotation and a translation"
    return None


@dataclass(frozen=True)
class Candidate:
    """A scene that a reader has found, before it is read.

    Attributes:
        name: As in `EvalScene`.
        category: As in `EvalScene`.
        build: Reads it; on UserError or OSError the scene is skipped.
    """

    name: str
    category: str | None
    build: Callable[[], EvalScene]


def read_candidates(
    candidates: Sequence[Candidate], scenes: Collection[str] | None, on_skip: OnSkip | None
) -> Iterator[EvalScene]:
    """Read the scenes found, one at a time.

    Args:
        candidates: All scenes of the dataset, in order.
        scenes: Only these names or categories.
        on_skip: Called with each scene that cannot be read.

    Raises:
        ValueError: If `scenes` has a name that is not in the dataset.
    """
    chosen = list(candidates)
    if scenes is not None:
        wanted = {scenes} if isinstance(scenes, str) else set(scenes)
        known = {c.name for c in candidates} | {c.category for c in candidates if c.category is not None}
        for name in sorted(wanted - known):
            raise UserError(unknown("scene", name, sorted(known)))
        chosen = [c for c in candidates if c.name in wanted or c.category in wanted]
    return _read(chosen, on_skip or log_skip)


class Categories:
    """Categories that are read one by one: unreadable ones are skipped; if all are, the first error is raised.

    Args:
        on_skip: Called with each category that is left out.
    """

    def __init__(self, on_skip: OnSkip | None) -> None:
        self._on_skip = on_skip or log_skip
        self._failed: list[Exception] = []

    def skip(self, category: str, error: Exception) -> None:
        """Skip a category."""
        self._failed.append(error)
        self._on_skip(Skipped(category, one_line(error)))

    def finish(self, count: int) -> None:
        """Raise the first error if all ``count`` failed: then the root is wrong, not a single file."""
        if self._failed and len(self._failed) == count:
            raise self._failed[0]


def read_folders(
    folders: Iterable[Path], build: Callable[[Path], EvalScene], scenes: Names, on_skip: OnSkip | None
) -> Iterator[EvalScene]:
    """Read folders with one scene each, named after the folders; ``build`` can be pickled."""
    return read_candidates([Candidate(path.name, None, partial(build, path)) for path in folders], scenes, on_skip)


def _read(candidates: list[Candidate], on_skip: OnSkip) -> Iterator[EvalScene]:
    for candidate in candidates:
        try:
            scene = candidate.build()
        except (UserError, OSError) as error:
            on_skip(Skipped(candidate.name, one_line(error)))
        else:
            yield scene
