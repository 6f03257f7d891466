"""From joined windows to scenes that can be written: poses of all frames, a downsampled cloud, depth on disk.

The pose of a frame in several windows is the mean of theirs, weighted by the frame's distance from the ends of each
window, so that the path has no jumps between windows. Its depth, intrinsics and points are those of the window in which
it is farthest from the ends. Depth is memory-mapped from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.errors import UserError
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene
from geoaccel.windows.join import Joined, Read
from geoaccel.windows.store import RANKS, Frame, Window
from geoaccel.windows.voxels import Voxels


class NoPoints(UserError):
    """A piece has no points."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Connected frames.

    Attributes:
        frames: Their indices in the sequence.
        cam_from_world: [n, 4, 4], float64.
        part: For each frame, the part that it is taken from.
    """

    frames: list[int]
    cam_from_world: Tensor
    part: list[int]


def place_frames(joined: Joined, frames: int, read: Read, *, closed: bool = True) -> list[Piece]:
    """Poses of all frames of every piece.

    Args:
        joined: Placement of all parts.
        frames: Number of frames.
        read: Returns a window by its number.
        closed: False ignores loops; the pieces are those with loops.
    """
    similarities = joined.similarities if closed else joined.unclosed
    centre, turn, total = torch.zeros(frames, 3).double(), torch.zeros(frames, 3, 3).double(), torch.zeros(frames)
    piece_of = {part: number for number, members in enumerate(joined.pieces) for part in members}
    owner, best = [-1] * frames, [0] * frames
    for number, part in enumerate(joined.parts):
        for frame in range(part.start, part.stop):
            if part.depth_of(frame) > best[frame]:
                owner[frame], best[frame] = number, part.depth_of(frame)
    for number, (part, similarity) in enumerate(zip(joined.parts, similarities, strict=True)):
        window = read(part.window)
        poses = similarity.apply_poses(window.cam_from_world[part.rows(window, part.start, part.stop)])
        for frame, pose in zip(range(part.start, part.stop), invert_rigid(poses), strict=True):
            if piece_of[number] == piece_of[owner[frame]]:
                weight = part.depth_of(frame)
                centre[frame] += weight * pose[:3, 3]
                turn[frame] += weight * pose[:3, :3]
                total[frame] += weight
    u, _, vt = torch.linalg.svd(turn)
    u[:, :, 2] *= torch.linalg.det(u @ vt)[:, None]
    world_from_cam = torch.cat([u @ vt, (centre / total[:, None])[..., None]], dim=-1)
    cam_from_world = invert_rigid(world_from_cam)
    found = []
    for number in range(len(joined.pieces)):
        own = [frame for frame in range(frames) if piece_of[owner[frame]] == number]
        found.append(Piece(own, cam_from_world[own], [owner[frame] for frame in own]))
    return [piece for piece in found if piece.frames]


def build_scene(
    piece: Piece,
    joined: Joined,
    frames: Sequence[Frame],
    read: Read,
    folder: Path,
    *,
    conf_percentile: float,
    max_points: int | None,
    paths: Sequence[Path | None],
    numbers: Sequence[int],
    read_original: Callable[[int], Tensor],
    on_frame: Callable[[], object] = lambda: None,
) -> tuple[Scene, PointCloud]:
    """The scene of one piece, and its downsampled cloud.

    Points, confidence and images of a whole sequence are not stored: their tensors are NaN and take no memory.

    Args:
        piece: Frames and poses.
        joined: Placement of all parts.
        frames: Frames of the sequence.
        read: Returns a window by its number.
        folder: For the file that depth is memory-mapped from.
        conf_percentile: Percentage of every window's pixels left out, the least confident ones.
        max_points: Most points of the cloud.
        paths: File of each frame of the sequence, if it has one.
        numbers: Index of each frame of the sequence among the images given.
        read_original: Returns a frame of the sequence, upright at its original size.
        on_frame: Called after each frame.

    Raises:
        NoPoints: If no point is left.
    """
    first = read(joined.parts[piece.part[0]].window)
    height, width = first.depth.shape[1:]
    count = len(piece.frames)
    depth = np.lib.format.open_memmap(folder / "depth.npy", "w+", np.float32, (count, height, width))
    intrinsics = torch.empty(count, 3, 3)
    scale = float(joined.similarities[piece.part[0]].scale)
    voxels = Voxels(scale * first.size / float(first.intrinsics[0, 0, 0]), max_points)
    used = 0
    for place, (frame, number) in enumerate(zip(piece.frames, piece.part, strict=True)):
        window = read(joined.parts[number].window)
        row = frame - window.start
        used += int((window.rank[row] > 0).sum())
        intrinsics[place] = window.intrinsics[row]
        depth[place] = _add_frame(
            voxels, window, row, place, piece.cam_from_world[place], frames[frame], joined, number, conf_percentile
        )
        on_frame()
    depth.flush()
    points = voxels.points()
    if not len(points):
        relax = "the confidence filter removes every pixel; relax it (--conf-percentile)"
        nothing = (
            "the images are transparent everywhere, or --edge-filter removes every pixel; give others, or relax it"
        )
        raise NoPoints(f"no point is left: {relax if used else nothing}")
    cloud = PointCloud(
        points=torch.from_numpy(points["xyz"].copy()),
        colors=torch.from_numpy(points["rgb"].copy()),
        frame=torch.from_numpy(points["frame"].astype(np.int64)),
        pixels=torch.from_numpy(points["pixel"].copy()),
        conf=torch.from_numpy(points["rank"].astype(np.float32)) / RANKS,
        kept_share=voxels.seen / used,
    )
    mapped = torch.from_numpy(np.load(folder / "depth.npy", mmap_mode="r+"))
    nowhere = torch.full((1,), torch.nan)
    scene = Scene(
        cam_from_world=piece.cam_from_world.float(),
        intrinsics=intrinsics,
        depth=mapped,
        points_world=nowhere.expand(count, height, width, 3),
        conf=nowhere.expand(count, height, width),
        images=nowhere.expand(count, 3, height, width),
        mask=torch.ones(1, dtype=torch.bool).expand(count, height, width),
        names=[frames[frame].name for frame in piece.frames],
        transforms=[frames[frame].transform for frame in piece.frames],
        paths=[paths[frame] for frame in piece.frames],
        read_original=lambda place: read_original(piece.frames[place]),
        unit=first.unit,
        numbers=[numbers[frame] for frame in piece.frames],
    )
    return scene, cloud


def _add_frame(
    voxels: Voxels,
    window: Window,
    row: int,
    place: int,
    cam_from_world: Tensor,  # [4, 4]
    frame: Frame,
    joined: Joined,
    number: int,
    conf_percentile: float,
) -> np.ndarray:  # [H, W]
    """Add the points of a frame, and return its depth in the unit of the piece, 0 where not usable."""
    depth = (window.depth[row] * joined.similarities[number].scale).float()
    depth = depth.where(window.rank[row] > 0, 0.0)
    sure = window.rank[row].float() / RANKS > conf_percentile / 100
    v, u = (sure & (window.rank[row] > 0)).nonzero(as_tuple=True)
    points = unproject_depth(depth, window.intrinsics[row], cam_from_world.float())[v, u]
    pixels = frame.transform.pixels_to_original(torch.stack([u, v], dim=-1) + 0.5)
    colors = window.pixels[row][:, v, u].T
    voxels.add(points.numpy(), colors.numpy(), window.rank[row][v, u].numpy(), place, pixels.numpy())
    return depth.numpy()
