"""Known conditions of a scene besides its images: poses, intrinsics and depth, each for all frames or for some.

Conventions are those of :mod:`geoaccel.cameras`. A backbone's descriptor says which of them it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoaccel.errors import UserError

KINDS = ("poses", "intrinsics", "depths")
ROTATION_TOLERANCE = 1e-2
"""Tolerance on the entries of R R^T: files round to a few digits; anything worse is not a rotation."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """Conditions for the S frames of one scene.

    Attributes:
        poses: ``cam_from_world`` [S, 4, 4], OpenCV axes.
        intrinsics: [S, 3, 3] in pixels of the network input.
        depths: z-depth [S, H, W] of the network input in the unit of the poses; 0 for unknown.
        has_pose, has_intrinsics, has_depth: Frames for which each is known [S], bool; None: all. Entries of the other
            frames are not read.
    """

    poses: Tensor | None = None
    intrinsics: Tensor | None = None
    depths: Tensor | None = None
    has_pose: Tensor | None = None
    has_intrinsics: Tensor | None = None
    has_depth: Tensor | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The kinds given."""
        return tuple(kind for kind in KINDS if getattr(self, kind) is not None)

    def known(self, kind: str) -> Tensor | None:  # [S] bool
        """Frames for which it is known; None: all."""
        return {"poses": self.has_pose, "intrinsics": self.has_intrinsics, "depths": self.has_depth}[kind]

    def check(self, frames: int, size: tuple[int, int]) -> None:
        """Refuse impossible values.

        Raises:
            UserError: For wrong shapes, poses without a rotation, intrinsics that cannot be inverted, and depths
                that are NaN, infinite or negative.
        """
        for kind in KINDS:
            mask = self.known(kind)
            if mask is not None and (mask.dtype != torch.bool or mask.shape != (frames,)):
                raise UserError(f"the mask of {kind} is {_like(mask)}; give bool [{frames}], one for each frame")
        check_poses(self.poses, (frames,), self.has_pose)
        check_intrinsics(self.intrinsics, (frames,), self.has_intrinsics)
        check_depths(self.depths, (frames, *size), self.has_depth)


def check_poses(poses: Tensor | None, lead: Sequence[int], known: Tensor | None = None) -> None:
    """Refuse poses [*lead, 4, 4] that are not rigid transforms.

    Raises:
        UserError: Naming the frame.
    """
    if poses is None:
        return
    _check_shape("poses", poses, (*lead, 4, 4))
    _check_frames("poses", ~poses.isfinite().flatten(-2).all(-1), known, "are NaN or infinite; leave this frame out")
    rotation = poses[..., :3, :3].double()
    off = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64, device=poses.device)).abs().amax((-1, -2))
    bad = (off > ROTATION_TOLERANCE) | (torch.linalg.det(rotation) < 0)
    _check_frames("poses", bad, known, "contain no rotation matrix; give rigid transforms [R t; 0 0 0 1] without scale")
    last = poses.new_tensor([0.0, 0.0, 0.0, 1.0])
    _check_frames("poses", (poses[..., 3, :] != last).any(-1), known, "must have the last row 0 0 0 1")


def check_intrinsics(intrinsics: Tensor | None, lead: Sequence[int], known: Tensor | None = None) -> None:
    """Refuse intrinsics [*lead, 3, 3] that cannot be inverted; errors as of :func:`check_poses`."""
    if intrinsics is None:
        return
    _check_shape("intrinsics", intrinsics, (*lead, 3, 3))
    finite = intrinsics.isfinite().flatten(-2).all(-1)
    _check_frames("intrinsics", ~finite, known, "are NaN or infinite; leave this frame out")
    positive = (intrinsics[..., 0, 0] > 0) & (intrinsics[..., 1, 1] > 0)
    positive &= torch.linalg.det(intrinsics.double()).abs() > 1e-9
    _check_frames(
        "intrinsics", ~positive, known, "are singular; focal lengths in pixels must be > 0, the last row 0 0 1"
    )
    last = intrinsics.new_tensor([0.0, 0.0, 1.0])
    _check_frames("intrinsics", (intrinsics[..., 2, :] != last).any(-1), known, "must have the last row 0 0 1")


def check_depths(depths: Tensor | None, shape: Sequence[int], known: Tensor | None = None) -> None:
    """Refuse depths that are NaN, infinite or negative.

    Raises:
        UserError: Naming the frame.
    """
    if depths is None:
        return
    _check_shape("depths", depths, shape)
    _check_frames("depths", ~depths.isfinite().flatten(-2).all(-1), known, "contain NaN or infinity; use 0 for unknown")
    _check_frames("depths", (depths < 0).flatten(-2).any(-1), known, "are negative; use 0 for unknown")


def _check_shape(what: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{what} are {_like(tensor)}; expected floats {list(shape)}, one for each frame")


def _like(thing: object) -> str:
    return f"{thing.dtype} {list(thing.shape)}" if isinstance(thing, Tensor) else f"a {type(thing).__name__}"


def _check_frames(what: str, bad: Tensor, known: Tensor | None, why: str) -> None:
    bad = bad if known is None else bad & known.to(bad.device)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        scene = f" of scene {place[0]}" if len(place) > 1 else ""
        raise UserError(f"the {what} of frame {place[-1]}{scene} {why}")
