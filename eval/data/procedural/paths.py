"""Long camera paths through procedural worlds, as if filmed while walking: small steps from frame to frame.

``loop`` goes once around the object and a twentieth further, so that its end overlaps its beginning. ``two-loops`` goes
around twice, higher the second time. ``corridor`` goes straight between two rows of the same primitives, looking ahead,
and never revisits a place.

Height, distance, aim and roll of the camera vary with a few slow waves of random phase; only exposure and noise are
drawn per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from geoaccel.errors import UserError
from geoaccel.eval.data.procedural.draws import Array, Draws, uniform_block
from geoaccel.eval.data.procedural.orbits import (
    MIN_CAMERA_HEIGHT,
    NUM_CAMERA_DRAWS,
    Cameras,
    Framing,
    cameras_at,
    look_at,
)
from geoaccel.eval.data.procedural.world import World
from geoaccel.registry import unknown

PATH_STREAM = 2
NUM_PATH_DRAWS = 128
WAVES = 4
OVERLAP = 0.05  # fraction of a revolution by which a loop overlaps its start
CORRIDOR_LENGTH, CORRIDOR_WIDTH = 18.0, 3.4


def draw_path(
    seed: int,
    path: str,
    frames: int,
    size: tuple[int, int],
    framing: Framing,
    subject_height: Array,  # [1]
) -> Cameras:
    """The cameras of one long path [1, S]. The path does not depend on the number of frames.

    Args:
        seed: Seed of the scene.
        path: A name of `PATHS`.
        frames: S.
        size: (H, W) in pixels.
        framing: Framing of the world, from `draw_worlds`.
        subject_height: Height of the point that cameras of a loop look at.

    Raises:
        UserError: For an unknown path.
    """
    if path not in PATHS:
        raise UserError(unknown("path", path, list(PATHS)))
    block = uniform_block([seed], PATH_STREAM, NUM_PATH_DRAWS + frames * NUM_CAMERA_DRAWS)
    scene, camera = Draws(block[:, :NUM_PATH_DRAWS]), Draws(block[:, NUM_PATH_DRAWS:].reshape(-1, NUM_CAMERA_DRAWS))
    along = np.linspace(0.0, 1.0, frames)
    center, target = PATHS[path](scene, along, float(framing.distance[0]), float(subject_height[0]))
    center[:, 2] = np.maximum(center[:, 2], MIN_CAMERA_HEIGHT)
    roll = np.radians(2.0) * _sway(scene, along)[:, None]
    return cameras_at(camera, look_at(center[None], target[None], roll[None]), size, framing)


def _sway(draws: Draws, along: Array) -> Array:  # [S], about 1 at most
    """A few slow waves of random phase, two to ten over the whole path."""
    frequency, phase = draws.uniform(2.0, 10.0, WAVES)[0], draws.uniform(0.0, 2 * np.pi, WAVES)[0]
    return np.sin(2 * np.pi * frequency * along[:, None] + phase).mean(axis=1)


def _round(turns: float, climb_deg: float) -> Callable[[Draws, Array, float, float], tuple[Array, Array]]:
    def walk(draws: Draws, along: Array, distance: float, height: float) -> tuple[Array, Array]:
        azimuth = draws.uniform(0.0, 2 * np.pi)[0] + 2 * np.pi * turns * along
        swing = np.sin(azimuth + draws.uniform(0.0, 2 * np.pi)[0])  # the same in each loop
        elevation = draws.uniform(12.0, 25.0)[0] + 4.0 * swing + 3.0 * _sway(draws, along) + climb_deg * along
        elevation = np.radians(elevation)
        reach = distance * (1.0 + 0.08 * swing + 0.05 * _sway(draws, along))
        heading = np.stack(
            [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=-1
        )
        subject = np.array([0.0, 0.0, height])
        aim = 0.12 * np.stack([_sway(draws, along) for _ in range(3)], axis=-1)
        return subject + reach[:, None] * heading, subject + aim

    return walk


def _straight(draws: Draws, along: Array, distance: float, height: float) -> tuple[Array, Array]:
    x = CORRIDOR_LENGTH * (along - 0.5)
    y, z = 0.4 * _sway(draws, along), 1.2 + 0.2 * _sway(draws, along)
    center = np.stack([x, y, z], axis=-1)
    ahead = np.stack([np.full_like(x, 3.0), 0.6 * _sway(draws, along), -0.3 + 0.2 * _sway(draws, along)], axis=-1)
    return center, center + ahead


PATHS = {"loop": _round(1 + OVERLAP, 0.0), "two-loops": _round(2 + OVERLAP, 14.0), "corridor": _straight}


def as_corridor(world: World) -> World:
    """The world with all objects arranged in two rows, between which a camera can walk."""
    from_world = world.from_world.double().clone()
    linear, offset = from_world[..., :3], from_world[..., 3]
    used = linear.abs().sum((-1, -2)) > 0  # an empty slot maps everything to one point
    center = torch.linalg.solve(torch.where(used[..., None, None], linear, torch.eye(3).double()), -offset)
    standing = used[0].nonzero()[:, 0]
    places = torch.linspace(-0.55, 0.6, (len(standing) + 1) // 2, dtype=torch.float64) * CORRIDOR_LENGTH
    footprint = world.footprint.clone()
    for rank, slot in enumerate(standing.tolist()):
        reach = float(footprint[0, slot, 2])
        place = torch.tensor([float(places[rank // 2]), (1 - 2 * (rank % 2)) * (CORRIDOR_WIDTH / 2 + reach)])
        moved = torch.zeros(3, dtype=torch.float64)
        moved[:2] = place - center[0, slot, :2]
        moved[2] = min(0.0, 0.9 - float(center[0, slot, 2]))  # lower what stood on something else to the ground
        from_world[0, slot, :, 3] -= linear[0, slot] @ moved
        footprint[0, slot, :2] = place
    return replace(world, from_world=from_world.float(), footprint=footprint)
