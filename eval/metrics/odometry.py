"""KITTI's odometry metric: end-point errors of sub-sequences of 100 to 800 metres (Geiger 2012).

As in the official development kit: starting at every tenth frame, for each of eight lengths, the motion to the first
frame farther away along the true path than this length is compared with the true motion. Translation is reported in
percent of the length, rotation in degrees per metre, each as the mean over all sub-sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.eval.metrics.geometry import camera_centers, rotation_angle_deg
from geoaccel.eval.metrics.pose import pose_pair

LENGTHS = tuple(float(length) for length in range(100, 900, 100))
STEP = 10
"""Frames between the starts of sub-sequences: one second of KITTI."""


@dataclass(frozen=True)
class SubsequenceErrors:
    """Errors of N sub-sequences.

    Attributes:
        first: First frame of each [N].
        length: Lengths in metres [N].
        translation: Distance of the two ends over the length [N].
        rotation_deg: Angle between the two ends over the length [N], in degrees per metre.
    """

    first: Tensor
    length: Tensor
    translation: Tensor
    rotation_deg: Tensor

    def means(self) -> dict[str, float]:
        """``kitti_translation_percent``, ``kitti_rotation_deg_per_m`` and their number, ``kitti_subsequences``.

        Empty if the path is shorter than the smallest length.
        """
        if not len(self.first):
            return {}
        return {
            "kitti_translation_percent": 100 * float(self.translation.mean()),
            "kitti_rotation_deg_per_m": float(self.rotation_deg.mean()),
            "kitti_subsequences": len(self.first),
        }

    @classmethod
    def joined(cls, parts: Sequence[SubsequenceErrors]) -> SubsequenceErrors:
        """The errors of several paths, joined."""
        names = ("first", "length", "translation", "rotation_deg")
        none = torch.empty(0, dtype=torch.float64)
        return cls(*(torch.cat([none, *(getattr(part, name) for part in parts)]) for name in names))


def distances(
    cam_from_world: Tensor,  # [S, 3|4, 4]
) -> Tensor:  # [S], float64
    """Distance of each camera from the first along the path."""
    centers = camera_centers(cam_from_world).double()
    steps = (centers[1:] - centers[:-1]).norm(dim=-1)
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def path_length(
    cam_from_world: Tensor,  # [S, 3|4, 4]
) -> float:
    """Length of the camera path, in the unit of the poses."""
    return float(distances(cam_from_world)[-1])


def subsequence_errors(
    pred: Tensor,  # [S, 3|4, 4], cam_from_world
    gt: Tensor,  # [S, 3|4, 4], cam_from_world, in metres
    *,
    scale: float = 1.0,
    lengths: Sequence[float] = LENGTHS,
    step: int = STEP,
) -> SubsequenceErrors:
    """Errors of all sub-sequences of one path.

    Args:
        pred: Predicted poses, in the order of the video.
        gt: Ground truth of the same frames.
        scale: Multiplies predicted translations: KITTI scores poses in metres, so predictions without a unit need one.
        lengths: Lengths along the true path.
        step: Frames between the starts of sub-sequences.
    """
    pred, gt = pose_pair(pred, gt)
    along = distances(gt)
    pairs = []
    for first in range(0, len(gt), step):
        for length in lengths:
            last = int(torch.searchsorted(along, along[first] + length, right=True))
            if last < len(gt):
                pairs.append((first, last, length))
    begin, end = (torch.tensor([pair[at] for pair in pairs], dtype=torch.long) for at in (0, 1))
    reach = torch.tensor([pair[2] for pair in pairs], dtype=torch.float64)
    # From the last camera to the first, as in the development kit.
    predicted, true = (poses[begin] @ invert_rigid(poses[end]) for poses in (pred, gt))
    predicted = predicted.clone()
    predicted[:, :3, 3] *= scale
    left = invert_rigid(predicted) @ true
    angle = rotation_angle_deg(left[:, :3, :3], torch.eye(3).expand(len(left), 3, 3))
    return SubsequenceErrors(begin.double(), reach, left[:, :3, 3].norm(dim=-1) / reach, angle / reach)
