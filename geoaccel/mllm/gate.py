"""Which tokens may merge into which, by frame and by world position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GateKind = Literal["radius", "voxel"]


def voxel_of(
    xyz: Tensor,  # [n, 3]
    side: float,
) -> Tensor:  # [n], int64
    """Index of the voxel of each point; voxels are aligned with the axes and the origin."""
    return (xyz.double() / side).floor().unique(dim=0, return_inverse=True)[1]


class Gate:
    """A mask for :func:`geoaccel.mllm.joint.best_partner`.

    A token without a candidate within reach may merge into the nearest one, since it must merge somewhere.

    Args:
        kind: ``radius``, ``voxel``, or None: coordinates are ignored.
        size: Radius, or side of a voxel.
        xyz: [n, 3], world coordinates.
        frame_of: [n], frame indices; tokens of different frames never merge. None: they may.
    """

    def __init__(self, kind: GateKind | None, size: float | None, xyz: Tensor | None, frame_of: Tensor | None) -> None:
        self.size = 0.0 if size is None else size
        self.xyz = None if kind is None or xyz is None else xyz.float()
        self.voxel = voxel_of(xyz, self.size) if kind == "voxel" and xyz is not None else None
        self.frame_of = frame_of

    def __call__(
        self,
        source: Tensor,  # [m], int64
        target: Tensor,  # [K], int64
    ) -> Tensor:  # [m, K], bool
        """Which pairs are allowed."""
        here = torch.ones(len(source), len(target), dtype=torch.bool, device=source.device)
        if self.frame_of is not None:
            here = self.frame_of[source][:, None] == self.frame_of[target]
        if self.xyz is None:
            return here
        if self.voxel is not None:
            near = here & (self.voxel[source][:, None] == self.voxel[target])
        else:
            near = here & (self._distance(source, target) <= self.size)
        alone = (~near.any(dim=-1)).nonzero()[:, 0]
        if len(alone):
            distance = self._distance(source[alone], target).masked_fill_(~here[alone], torch.inf)
            near[alone] = distance == distance.amin(dim=-1, keepdim=True)
        return near

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:  # [m, K]
        assert self.xyz is not None
        # Differences, not the expanded square, which loses precision far from the origin.
        return torch.cdist(self.xyz[source], self.xyz[target], compute_mode="donot_use_mm_for_euclid_dist")
