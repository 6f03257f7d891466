"""Random rotations, poses and similarities for the metric tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from geoaccel.alignment import Similarity

seeds = st.integers(0, 10**6)


def rotation_about(axis: str, angle_deg: float) -> Tensor:  # [3, 3], float64
    """Rotation about a coordinate axis."""
    angle = torch.deg2rad(torch.tensor(angle_deg, dtype=torch.float64))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotation = torch.eye(3, dtype=torch.float64)
    rotation[i, i] = rotation[j, j] = angle.cos()
    rotation[j, i], rotation[i, j] = angle.sin(), -angle.sin()
    return rotation


def random_rotations(count: int, generator: torch.Generator) -> Tensor:  # [count, 3, 3]
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return q * torch.linalg.det(q)[:, None, None]


def poses_from(rotation: Tensor, center: Tensor) -> Tensor:  # [S, 3, 3], [S, 3] -> [S, 4, 4] cam_from_world
    poses = torch.eye(4, dtype=torch.float64).repeat(len(rotation), 1, 1)
    poses[:, :3, :3] = rotation
    poses[:, :3, 3] = -(rotation @ center[..., None])[..., 0]
    return poses


def random_poses(count: int, seed: int = 0) -> Tensor:  # [count, 4, 4], cam_from_world
    generator = torch.Generator().manual_seed(seed)
    center = 3 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return poses_from(random_rotations(count, generator), center)


def jitter(poses: Tensor, amount: float, seed: int = 0) -> Tensor:  # [S, 4, 4]
    """Perturb rotations by about `amount` radians and centres by `amount`."""
    generator = torch.Generator().manual_seed(seed)
    skew = amount * torch.randn(len(poses), 3, 3, generator=generator, dtype=torch.float64)
    turn = torch.linalg.matrix_exp(skew - skew.transpose(-1, -2))
    shift = amount * torch.randn(len(poses), 3, generator=generator, dtype=torch.float64)
    moved = poses.clone()
    moved[:, :3, :3] = turn @ poses[:, :3, :3]
    moved[:, :3, 3] += shift
    return moved


def random_similarity(seed: int = 0) -> Similarity:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 4 + 0.1
    translation = 5 * torch.randn(3, generator=generator, dtype=torch.float64)
    return Similarity(scale, random_rotations(1, generator)[0], translation)


def two_cameras(second_center, second_rotation=None):  # looking along z, the first at the origin
    second_rotation = torch.eye(3, dtype=torch.float64) if second_rotation is None else second_rotation
    rotation = torch.stack([torch.eye(3, dtype=torch.float64), second_rotation])
    return poses_from(rotation, torch.tensor([[0.0, 0, 0], second_center], dtype=torch.float64))
