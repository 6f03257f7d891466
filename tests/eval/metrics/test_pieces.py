"""Errors of sequences in pieces and of their windows, where the truth of all of them is known."""

from __future__ import annotations

import math

import pytest
import torch
from random_poses import random_poses

from geoaccel.alignment import Similarity
from geoaccel.eval.metrics.odometry import path_length, subsequence_errors
from geoaccel.eval.metrics.pieces import PlacedWindow, drift_summary, errors_in_pieces, window_errors
from geoaccel.eval.metrics.trajectories import trajectory_errors
from geoaccel.windows.graph import exponential


def similarity(seed: int, scale: float = 1.0) -> Similarity:
    """Some world of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = exponential(0.4 * torch.randn(1, 7, generator=generator, dtype=torch.float64))
    return Similarity(torch.tensor(scale, dtype=torch.float64), found.rotation[0], found.translation[0])


def noisy(poses: torch.Tensor, amount: float = 0.05) -> torch.Tensor:
    moved = poses.clone()
    moved[:, :3, 3] += amount * torch.randn(len(poses), 3, generator=torch.Generator().manual_seed(9)).double()
    return moved


def test_one_piece_is_scored_as_any_trajectory() -> None:
    gt = random_poses(60)
    pred = similarity(1, 3.0).apply_poses(noisy(gt))
    found = errors_in_pieces(pred, gt, torch.zeros(60, dtype=torch.long))
    expected = trajectory_errors(pred, gt)
    for name in ("ate_rmse", "are_rmse_deg", "rpe_translation", "rpe_rotation_deg"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    assert found["ate_percent"] == pytest.approx(100 * expected["ate_rmse"] / path_length(gt))
    assert found["scored_share"] == 1
    kitti = subsequence_errors(pred, gt, scale=expected["ate_scale"]).means()
    assert kitti["kitti_subsequences"] > 3
    assert {name: found[name] for name in kitti} == kitti


def test_the_motion_over_other_pieces_is_no_motion_from_frame_to_frame() -> None:
    """A loop joins frames 0 to 9 and 15 to 24; from 9 to 15 the camera turned by 40 degrees more than was predicted."""
    gt, piece = random_poses(25), torch.tensor([0] * 10 + [1] * 5 + [0] * 10)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = exponential(torch.tensor([[0.7, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)).rotation[0]
    pred = gt.clone()
    pred[15:] = gt[15:] @ turn
    found = errors_in_pieces(pred, gt, piece)
    assert found["rpe_rotation_deg"] < 1e-5
    assert found["are_rmse_deg"] > 5
    path = path_length(gt[:10]) + path_length(gt[15:])
    assert found["ate_percent"] == pytest.approx(100 * found["ate_rmse"] / path)
    alone = errors_in_pieces(gt, gt, torch.tensor([0, 1] * 12 + [0]))
    assert "rpe_rotation_deg" not in alone  # nor is it measured across pieces
    assert "ate_rmse" in alone


def test_no_subsequence_crosses_other_pieces() -> None:
    """Both parts of a piece are without an error by themselves, and the turn between them is not driven."""
    gt, piece = random_poses(120), torch.tensor([0] * 50 + [1] * 20 + [0] * 50)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = exponential(torch.tensor([[0.7, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)).rotation[0]
    pred = gt.clone()
    pred[70:] = gt[70:] @ turn
    found = errors_in_pieces(pred, gt, piece)
    parts = [subsequence_errors(pred[own], gt[own]).means() for own in (slice(0, 50), slice(70, 120), slice(50, 70))]
    counts = [part.get("kitti_subsequences", 0) for part in parts]
    assert min(counts[:2]) > 3
    assert found["kitti_subsequences"] == sum(counts)
    assert found["kitti_rotation_deg_per_m"] < 1e-5


def test_pieces_are_not_glued_and_are_no_better_for_being_short() -> None:
    gt = random_poses(40)
    piece = torch.tensor([0] * 25 + [1] * 13 + [2] * 2)
    moved = noisy(gt)
    pred = torch.cat([similarity(i, 0.5 + i).apply_poses(moved[piece == i]) for i in range(3)])
    found = errors_in_pieces(pred, gt, piece)
    parts = [trajectory_errors(pred[piece == i], gt[piece == i]) for i in range(2)]
    ate = math.sqrt((25 * parts[0]["ate_rmse"] ** 2 + 13 * parts[1]["ate_rmse"] ** 2) / 38)
    assert found["ate_rmse"] == pytest.approx(ate)
    rpe = math.sqrt((24 * parts[0]["rpe_rotation_deg"] ** 2 + 12 * parts[1]["rpe_rotation_deg"] ** 2) / 36)
    assert found["rpe_rotation_deg"] == pytest.approx(rpe)
    shares = [100 * parts[i]["ate_rmse"] / path_length(gt[piece == i]) for i in range(2)]
    assert found["ate_percent"] == pytest.approx(math.sqrt((25 * shares[0] ** 2 + 13 * shares[1] ** 2) / 38))
    assert found["scored_share"] == pytest.approx(38 / 40)
    glued = errors_in_pieces(pred, gt, torch.zeros_like(piece))
    assert glued["ate_rmse"] > 3 * found["ate_rmse"]


def test_a_camera_that_stands_still_has_no_error_after_a_similarity() -> None:
    gt = torch.eye(4, dtype=torch.float64).repeat(10, 1, 1)
    assert errors_in_pieces(noisy(gt), gt, torch.zeros(10, dtype=torch.long)) == {"scored_share": 0}


def placed(gt: torch.Tensor, spans: list[tuple[int, int]], drift: float, turn_deg: float) -> list[PlacedWindow]:
    """Exact windows in worlds of their own, placed so that each is larger and turned more than the one before."""
    found = []
    for number, (start, stop) in enumerate(spans):
        world = similarity(number, 1.0 + number)  # from the truth into the window's own world
        angle = math.radians(turn_deg * number)
        turn = torch.eye(3, dtype=torch.float64)
        turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        scale = drift**number / float(world.scale)  # from there into the piece's
        own = world.apply_poses(gt[start:stop])
        found.append(PlacedWindow(start, stop, own, 0, scale, turn @ world.rotation.T))
    return found


def test_drift_that_was_planted_is_found() -> None:
    gt = random_poses(40)
    spans = [(0, 16), (8, 24), (16, 32), (24, 40)]
    rows = window_errors(placed(gt, spans, 1.05, 2.0), gt)
    for number, row in enumerate(rows):
        assert (row["start"], row["stop"], row["piece"]) == (*spans[number], 0)
        assert row["ate_percent"] == pytest.approx(0, abs=1e-6)
        assert row["are_rmse_deg"] == pytest.approx(0, abs=1e-6)
        assert row["scale"] == pytest.approx(1.05**-number)  # the truth finds one unit of a larger world shorter
        assert row["rotation_deg"] == pytest.approx(2.0 * number, abs=1e-6)
        assert (row["scale_step_percent"] is None) == (row["rotation_step_deg"] is None) == (number == 0)
        if number:
            assert row["scale_step_percent"] == pytest.approx(100 * (1 / 1.05 - 1))
            assert row["rotation_step_deg"] == pytest.approx(2.0)
    found = drift_summary(rows)
    assert found["scale_step_percent"] == pytest.approx(100 * (1 - 1 / 1.05))
    assert found["rotation_step_deg"] == pytest.approx(2.0)
    assert found["window_ate_percent"] == pytest.approx(0, abs=1e-6)


def test_the_error_of_a_window_is_its_own_and_steps_do_not_cross_pieces() -> None:
    gt = random_poses(32)
    windows = placed(gt, [(0, 16), (16, 32)], 1.0, 0.0)
    bad = PlacedWindow(16, 32, noisy(windows[1].cam_from_world), 1, windows[1].scale, windows[1].rotation)
    first, second = window_errors([windows[0], bad], gt)
    assert first["ate_rmse"] < 1e-6 < 0.01 < second["ate_rmse"]
    assert second["scale"] == 1
    assert second["scale_step_percent"] is None


def test_windows_that_do_not_move_have_no_scale_and_the_next_ones_do() -> None:
    gt = random_poses(24)
    gt[:8] = gt[0]
    rows = window_errors(placed(gt, [(0, 8), (8, 16), (16, 24)], 1.1, 0.0), gt)
    assert rows[0]["scale"] is rows[0]["ate_rmse"] is rows[1]["scale_step_percent"] is None
    assert rows[1]["scale"] == 1
    assert rows[2]["scale"] == pytest.approx(1 / 1.1)
    assert rows[2]["scale_step_percent"] == pytest.approx(100 * (1 / 1.1 - 1))
    assert drift_summary([]) == {}
