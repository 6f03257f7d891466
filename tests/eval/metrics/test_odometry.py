"""KITTI's measure against loops over its definition, and where it says nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from geoaccel.cameras import invert_rigid
from geoaccel.eval.metrics.odometry import LENGTHS, SubsequenceErrors, path_length, subsequence_errors
from geoaccel.windows.graph import exponential


def drive(frames: int, step: float, noise: float = 0.0, seed: int = 0) -> torch.Tensor:  # [S, 4, 4]
    """A winding road, one frame every `step` metres, and poses that drift along it."""
    generator = torch.Generator().manual_seed(seed)
    world_from_cam, poses = torch.eye(4, dtype=torch.float64), []
    for frame in range(frames):
        poses.append(world_from_cam)
        turn = torch.tensor([0.0, 0.02 * math.sin(frame / 30), 0.0, 0.0, 0.0, step, 0.0], dtype=torch.float64)
        moved = exponential((turn + noise * torch.randn(7, generator=generator, dtype=torch.float64))[None])
        motion = torch.eye(4, dtype=torch.float64)
        motion[:3, :3], motion[:3, 3] = moved.rotation[0], turn[3:6] + noise * step
        world_from_cam = world_from_cam @ motion
    return invert_rigid(torch.stack(poses))


def by_the_kit(pred: torch.Tensor, gt: torch.Tensor, scale: float) -> list[tuple[int, float, float, float]]:
    """The development kit in plain loops over matrices world_from_cam: first frame, length, translation, rotation."""
    result = [np.linalg.inv(pose.numpy()) for pose in pred]
    truth = [np.linalg.inv(pose.numpy()) for pose in gt]
    for pose in result:
        pose[:3, 3] *= scale
    along = [0.0]
    for before, here in itertools.pairwise(truth):
        along.append(along[-1] + math.dist(before[:3, 3], here[:3, 3]))
    found = []
    for first in range(0, len(truth), 10):
        for length in (100, 200, 300, 400, 500, 600, 700, 800):
            last = next((i for i in range(first, len(truth)) if along[i] > along[first] + length), None)
            if last is None:
                continue
            true = np.linalg.inv(truth[first]) @ truth[last]
            ours = np.linalg.inv(result[first]) @ result[last]
            error = np.linalg.inv(ours) @ true
            angle = math.acos(min(1.0, max(-1.0, 0.5 * (np.trace(error[:3, :3]) - 1))))
            found.append((first, float(length), np.linalg.norm(error[:3, 3]) / length, math.degrees(angle) / length))
    return found


def test_it_is_what_the_kit_computes() -> None:
    gt, pred = drive(620, 1.4), drive(620, 1.4, noise=3e-3, seed=1)
    expected = by_the_kit(pred, gt, 0.97)
    found = subsequence_errors(pred, gt, scale=0.97)
    assert len(expected) > 200
    assert {length for _, length, _, _ in expected} == set(LENGTHS)
    rows = torch.stack([found.first, found.length, found.translation, found.rotation_deg], dim=-1)
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-10)
    means = found.means()
    assert means["kitti_translation_percent"] == pytest.approx(100 * np.mean([row[2] for row in expected]))
    assert means["kitti_rotation_deg_per_m"] == pytest.approx(np.mean([row[3] for row in expected]))
    assert means["kitti_subsequences"] == len(expected)


def test_a_wrong_scale_is_a_drift_of_as_many_percent() -> None:
    """Of motion along a straight line, of which the length is that of the path."""
    gt = torch.eye(4, dtype=torch.float64).repeat(150, 1, 1)
    gt[:, 2, 3] = -torch.arange(150, dtype=torch.float64)
    means = subsequence_errors(gt, gt, scale=1.05).means()
    assert means["kitti_translation_percent"] == pytest.approx(5.0, rel=0.02)  # a frame more than the length
    assert means["kitti_rotation_deg_per_m"] == 0
    assert path_length(gt) == pytest.approx(149)


def test_a_short_path_says_nothing() -> None:
    gt = drive(70, 1.4)
    assert subsequence_errors(gt, gt).means() == {}
    assert SubsequenceErrors.joined([]).means() == {}
    long = subsequence_errors(drive(100, 1.4), drive(100, 1.4))
    both = SubsequenceErrors.joined([subsequence_errors(gt, gt), long])
    assert len(both.first) == len(long.first) > 0
