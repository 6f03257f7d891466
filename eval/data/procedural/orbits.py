"""The cameras of a scene: a jittered orbit around the object, as if filmed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data.procedural.draws import CAMERA_STREAM, Array, Draws, uniform_block

NUM_CAMERA_DRAWS = 24
MIN_CAMERA_HEIGHT = 0.3
MAX_DISTANCE_FACTOR = 1.2
EXPOSURE_SIGMA = 0.04
WHITE_BALANCE_SIGMA = 0.015


@dataclass(frozen=True)
class OrbitConfig:
    """Distribution of the cameras. The defaults are the evaluation's; training may start with shorter baselines.

    Args:
        span_deg: Range from which each scene draws how far its cameras go around the object.
        elevation_deg: Lowest and highest elevation of a camera, seen from the object.
        fov_deg: Range of the field of view over the longer side of the image, constant within a scene.
        fill: Range of the fraction of the longer side that the object's bounding sphere fills.
        distance_jitter: Spread (sigma) of the camera's distance, relative to the scene's.
        elevation_jitter_deg: Spread of the elevation in addition to its smooth variation.
        look_at_jitter: Spread of the point that a camera looks at, in object radii.
        roll_deg: Spread of the rotation about the optical axis.
    """

    span_deg: tuple[float, float] = (60.0, 360.0)
    elevation_deg: tuple[float, float] = (-5.0, 50.0)
    fov_deg: tuple[float, float] = (40.0, 70.0)
    fill: tuple[float, float] = (0.5, 0.75)
    distance_jitter: float = 0.05
    elevation_jitter_deg: float = 3.0
    look_at_jitter: float = 0.08
    roll_deg: float = 3.0

    def __post_init__(self) -> None:
        limits = {"span_deg": (0, 360), "elevation_deg": (-10, 80), "fov_deg": (20, 100), "fill": (0.2, 0.85)}
        for name, (lowest, highest) in limits.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise UserError(
                    f"{name}=({low}, {high}) is not a range within [{lowest}, {highest}]; give (low, high), low first"
                )


@dataclass(frozen=True)
class Framing:
    """Lens and mean distance of each scene."""

    half_fov_tan: Array  # [B]
    distance: Array  # [B]


@dataclass(frozen=True)
class Cameras:
    """The cameras of B scenes."""

    cam_from_world: Tensor  # [B, S, 4, 4]
    intrinsics: Tensor  # [B, S, 3, 3], pixels
    exposure: Tensor  # [B, S, 3], gain of each colour channel
    noise_key: Tensor  # [B, S], int32


def draw_framing(draws: Draws, config: OrbitConfig) -> Framing:
    """Choose lens and distance so that the object fills its fraction of the image."""
    half_fov_tan = np.tan(np.radians(draws.uniform(*config.fov_deg) / 2.0))
    return Framing(half_fov_tan, 1.0 / (half_fov_tan * draws.uniform(*config.fill)))


def draw_cameras(
    seeds: Sequence[int],
    num_frames: int,
    size: tuple[int, int],
    framing: Framing,
    subject_height: Array,  # [B], height of the point to look at
    config: OrbitConfig,
) -> Cameras:
    """Draw the cameras of every scene. Except in ordered scenes, frame i does not depend on the number of frames.

    Half of the scenes are ordered by azimuth, like a video, the others are not.
    """
    block = uniform_block(seeds, CAMERA_STREAM, 8 + num_frames * NUM_CAMERA_DRAWS)
    scene, camera = Draws(block[:, :8]), Draws(block[:, 8:].reshape(-1, NUM_CAMERA_DRAWS))

    def per_camera(values: Array) -> Array:
        return values.reshape(len(seeds), num_frames, *values.shape[1:])

    span = np.radians(scene.uniform(*config.span_deg))
    azimuth = span[:, None] * (per_camera(camera.uniform(0.0, 1.0)) - 0.5)
    azimuth = np.where(scene.flag(0.5)[:, None], np.sort(azimuth, axis=1), azimuth)
    azimuth = azimuth + scene.uniform(0.0, 2.0 * np.pi)[:, None]

    low, high = config.elevation_deg
    margin = 0.15 * (high - low)
    swing = scene.uniform(0.0, 0.2 * (high - low))[:, None] * np.sin(azimuth + scene.uniform(0.0, 2 * np.pi)[:, None])
    elevation = scene.uniform(low + margin, high - margin)[:, None] + swing
    elevation = elevation + config.elevation_jitter_deg * per_camera(camera.normal())
    elevation = np.radians(np.clip(elevation, low, high))

    factor = 1.0 + 0.08 * np.sin(azimuth + scene.uniform(0.0, 2.0 * np.pi)[:, None])
    factor = factor + config.distance_jitter * np.clip(per_camera(camera.normal()), -2.0, 2.0)
    distance = framing.distance[:, None] * np.clip(factor, 2.0 - MAX_DISTANCE_FACTOR, MAX_DISTANCE_FACTOR)

    subject = np.stack([np.zeros_like(subject_height), np.zeros_like(subject_height), subject_height], axis=-1)
    heading = np.stack(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=-1
    )
    center = subject[:, None] + distance[..., None] * heading
    center[..., 2] = np.maximum(center[..., 2], MIN_CAMERA_HEIGHT)
    jitter = config.look_at_jitter * np.stack([per_camera(camera.normal()) for _ in range(3)], axis=-1)
    roll = np.radians(config.roll_deg) * per_camera(camera.normal())[..., None]
    return cameras_at(camera, look_at(center, subject[:, None] + jitter, roll), size, framing)


def cameras_at(
    draws: Draws,  # one row per camera; eight numbers are used
    cam_from_world: Array,  # [B, S, 4, 4]
    size: tuple[int, int],
    framing: Framing,
) -> Cameras:
    """Cameras with these poses; exposure and noise are drawn for each."""
    scenes, frames = cam_from_world.shape[:2]

    def per_camera(values: Array) -> Array:
        return values.reshape(scenes, frames, *values.shape[1:])

    height, width = size
    focal = max(height, width) / (2.0 * framing.half_fov_tan)
    intrinsics = np.zeros((scenes, frames, 3, 3))
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal[:, None]
    intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = width / 2, height / 2, 1.0
    white_balance = np.stack([per_camera(draws.normal()) for _ in range(3)], axis=-1)
    exposure = np.exp(EXPOSURE_SIGMA * per_camera(draws.normal())[..., None] + WHITE_BALANCE_SIGMA * white_balance)
    noise_key = np.floor(per_camera(draws.uniform(-(2.0**31), 2.0**31)))
    return Cameras(
        cam_from_world=torch.from_numpy(cam_from_world).float(),
        intrinsics=torch.from_numpy(intrinsics).float(),
        exposure=torch.from_numpy(exposure).float(),
        noise_key=torch.from_numpy(noise_key.astype(np.int32)),
    )


def look_at(
    center: Array,  # [B, S, 3]
    target: Array,  # [B, S, 3]
    roll: Array,  # [B, S, 1], radians
) -> Array:  # [B, S, 4, 4]
    """``cam_from_world`` of cameras that look at a point, upright except for the roll."""
    forward = target - center
    forward /= np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    pose = np.zeros((*center.shape[:-1], 4, 4))
    pose[..., :3, :3] = np.stack([right, down, forward], axis=-2)
    pose[..., :3, 3] = -np.einsum("...ij,...j->...i", pose[..., :3, :3], center)
    pose[..., 3, 3] = 1.0
    return pose
