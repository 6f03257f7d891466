"""Result of a whole sequence in windows: poses of all frames, and of every window separately."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from geoaccel.eval.metrics.pieces import PlacedWindow


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A sequence of S frames in windows, which cuts divide into P parts; all tensors on the CPU.

    Attributes:
        cam_from_world: Poses of all frames [S, 4, 4], float64, each piece in its own world frame.
        part_piece: Index of the piece of each part [P].
        scale: Scale of the world frame of each part in that of its piece [P].
        rotation: Rotation from the world frame of each part to that of its piece [P, 3, 3].
        open_cam_from_world, open_part_piece, open_scale, open_rotation: The same without loop closure.
        owner: The part that each frame is taken from [S].
        parts: Per part, its window, its first frame and the one after its last [P, 3].
        part_poses: Poses of the frames of all parts [F, 4, 4], part by part, in the world frames of their windows.
        cuts: Frames before which there is a cut.
        wide: Per wide window: its first and last frame, its stride, whether it was used [V, 4].
        loops: Candidate pairs of frames, and whether they were closed [L, 3].
        lengths: Frames per window, and its overlap with the next [2].
    """

    cam_from_world: Tensor
    part_piece: Tensor
    scale: Tensor
    rotation: Tensor
    open_cam_from_world: Tensor
    open_part_piece: Tensor
    open_scale: Tensor
    open_rotation: Tensor
    owner: Tensor
    parts: Tensor
    part_poses: Tensor
    cuts: Tensor
    wide: Tensor
    loops: Tensor
    lengths: Tensor

    @property
    def window(self) -> int:
        """Frames of a window."""
        return int(self.lengths[0])

    def pieces(self, *, closed: bool = True) -> Tensor:  # [S]
        """Index of the piece of each frame, with or without loop closure."""
        return (self.part_piece if closed else self.open_part_piece)[self.owner]

    def windows(self, *, closed: bool = True) -> list[PlacedWindow]:
        """Every part and its placement, with or without loop closure."""
        piece, scale, rotation = (
            (self.part_piece, self.scale, self.rotation)
            if closed
            else (self.open_part_piece, self.open_scale, self.open_rotation)
        )
        found, at = [], 0
        for number, (_, start, stop) in enumerate(self.parts.tolist()):
            poses = self.part_poses[at : at + stop - start]
            at += stop - start
            found.append(PlacedWindow(start, stop, poses, int(piece[number]), float(scale[number]), rotation[number]))
        return found
