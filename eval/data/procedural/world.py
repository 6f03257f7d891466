"""Contents of a scene, drawn from its seed: an object, the ground, landmarks all around, a sky, a light.

World coordinates: z up, the ground is z = 0, the object is at the origin within a sphere of radius 1.15.

*Object.* Five to nine primitives (of four ellipsoids, four boxes, two cylinders): one in the middle, up to four on the
ground around it, the rest on top of those. Six in ten are upright, the others are rotated at random.
*Surfaces.* Each primitive has two colours that blend along a wave of low frequency in its own coordinates, and three of
four have a third colour in stripes or checks (a product of two waves) of random frequency.
*Ground.* Three colours mixed by seven waves in random directions with wavelengths of 1.5 to 12, so that the pattern
does not repeat, and ten discs and square rugs of other colours. It ends at radius 12.
*Landmarks.* Seven to ten large pillars, blocks and balls all around, outside the cameras' orbit.
*Sky.* Each colour channel is a random sum of the first three harmonics of the azimuth, so that hue varies with it.
*Light.* A sun of random azimuth and elevation with hard shadows, and ambient light that is stronger from above.

Everything is rotated about the vertical by its own random angle and all colours are redrawn for each scene: a single
image gives no information on where on the orbit its camera is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from geoaccel.eval.data.procedural.draws import SCENE_STREAM, Array, Draws, Mask, uniform_block, yaw_rotation
from geoaccel.eval.data.procedural.orbits import MAX_DISTANCE_FACTOR, Framing, OrbitConfig, draw_framing

# The kind of each slot is fixed, so that the ray caster needs no branch; a slot may stay empty. A world's N primitives
# are sorted by kind, and by object before landmark within it.
ELLIPSOID, BOX, CYLINDER = 0, 1, 2
OBJECT_KINDS = np.repeat([ELLIPSOID, BOX, CYLINDER], [4, 4, 2])
LANDMARK_KINDS = np.repeat([ELLIPSOID, BOX, CYLINDER], [2, 5, 3])
_UNSORTED_KINDS = np.concatenate([OBJECT_KINDS, LANDMARK_KINDS])
_ORDER = np.argsort(_UNSORTED_KINDS, kind="stable")
KINDS = tuple(int(kind) for kind in _UNSORTED_KINDS[_ORDER])
IS_OBJECT = tuple(bool(slot < len(OBJECT_KINDS)) for slot in _ORDER)
NUM_RUGS = 10
NUM_GROUND_WAVES = 7
GROUND_RADIUS = 12.0
OBJECT_RADIUS = 1.15
NUM_SCENE_DRAWS = 1600


@dataclass(frozen=True)
class World:
    """The worlds of B scenes as small tensors, N primitives each."""

    from_world: Tensor  # [B, N, 3, 4], to coordinates where the primitive is the unit ball, cube or cylinder
    colors: Tensor  # [B, N, 3, 3], blend from the first to the second, pattern in the third
    waves: Tensor  # [B, N, 3, 4], wave vector and phase of the blend and of the pattern's two factors
    pattern: Tensor  # [B, N, 2], opacity and sharpness
    footprint: Tensor  # [B, N, 3], (x, y, radius) of the contact shadow
    ground_colors: Tensor  # [B, 3, 3]
    ground_waves: Tensor  # [B, NUM_GROUND_WAVES, 3], wave vector and phase
    rugs: Tensor  # [B, NUM_RUGS, 2, 3], to coordinates where the rug is the unit disc or square
    rug_colors: Tensor  # [B, NUM_RUGS, 3]
    sky: Tensor  # [B, 3, 8], per channel: constant, six harmonics, slope along z
    light: Tensor  # [B, 3, 3], direction to the sun, its colour, ambient colour
    noise: Tensor  # [B], standard deviation of the sensor's noise

    def to(self, device: torch.device | str) -> World:
        return World(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def repeat(self, frames: int) -> World:
        """One row per frame."""
        return World(**{f.name: getattr(self, f.name).repeat_interleave(frames, dim=0) for f in fields(self)})

    def clone(self) -> World:
        return World(**{f.name: getattr(self, f.name).clone() for f in fields(self)})

    def rows(self, index: slice) -> World:
        return World(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def draw_worlds(seeds: Sequence[int], config: OrbitConfig) -> tuple[World, Framing, Array]:
    """Draw the worlds of all seeds.

    Returns:
        The worlds, lens and distance of each, and the height of the point its cameras look at.
    """
    draws = Draws(uniform_block(seeds, SCENE_STREAM, NUM_SCENE_DRAWS))
    framing = draw_framing(draws, config)
    object_poses, top = _draw_object(draws)
    landmark_poses = _draw_landmarks(draws, framing)
    pairs = zip(object_poses, landmark_poses, strict=True)
    rotation, axes, center, active = (np.concatenate(pair, axis=1)[:, _ORDER] for pair in pairs)
    from_world = np.swapaxes(rotation, -1, -2) / axes[..., None]
    from_world = np.concatenate([from_world, -from_world @ center[..., None]], axis=-1)
    # an empty slot maps every ray to one point outside the unit shape
    nowhere = np.zeros((3, 4))
    nowhere[2, 3] = 1e3
    from_world = np.where(active[..., None, None], from_world, nowhere)
    footprint = np.concatenate([center[..., :2], np.where(active, axes[..., :2].mean(-1), 1e-3)[..., None]], axis=-1)

    arrays = {"from_world": from_world, "footprint": footprint}
    arrays |= _draw_surfaces(draws, len(KINDS)) | _draw_ground(draws) | _draw_sky_and_light(draws)
    world = World(**{name: torch.from_numpy(np.ascontiguousarray(a)).float() for name, a in arrays.items()})
    return world, framing, top / 2.0


def _half_height(kind: np.ndarray, rotation: Array, axes: Array) -> Array:  # [...]
    """How far a posed primitive extends above its centre."""
    up = np.abs(rotation[..., 2, :]) * axes
    ellipsoid, box = np.linalg.norm(up, axis=-1), up.sum(-1)
    cylinder = np.hypot(up[..., 0], up[..., 1]) + up[..., 2]
    return np.choose(kind, [ellipsoid, box, cylinder])


def _draw_object(draws: Draws) -> tuple[tuple[Array, Array, Array, Mask], Array]:
    """Pose the primitives of the object.

    Returns:
        Rotation [B, n, 3, 3], semi-axes [B, n, 3], centre [B, n, 3], active [B, n], and the object's height [B].
    """
    num = len(OBJECT_KINDS)
    order = draws.permutation(num)  # rank -> slot
    kind = OBJECT_KINDS[order]
    active = np.arange(num) < np.floor(draws.uniform(5.0, 10.0))[:, None]

    low = np.array([0.32] + [0.18] * 4 + [0.14] * 5)
    high = np.array([0.55] + [0.42] * 4 + [0.3] * 5)
    axes = draws.uniform(low[:, None], high[:, None], num, 3)
    axes[..., 1] = np.where(kind == CYLINDER, axes[..., 0], axes[..., 1])  # round cylinders
    upright = draws.flag(0.6, num)[..., None, None]
    rotation = np.where(upright, yaw_rotation(draws.uniform(0.0, 2.0 * np.pi, num)), draws.rotation(num))
    half_height = _half_height(kind, rotation, axes)

    angle = draws.uniform(0.0, 2.0 * np.pi)[:, None] + np.pi / 2.0 * (np.arange(num) + draws.uniform(-0.3, 0.3, num))
    radius = draws.uniform(0.0, 0.15, num)
    radius[:, 1:5] = draws.uniform(0.45, 0.85, 4)
    center = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.97 * half_height], axis=-1)
    for rank in range(5, num):
        below = rank - 5
        center[:, rank, :2] += center[:, below, :2]
        center[:, rank, 2] = center[:, below, 2] + 0.92 * (half_height[:, below] + half_height[:, rank])

    top = np.where(active, center[..., 2] + half_height, 0.0).max(-1)
    reach = np.linalg.norm(center - np.array([0.0, 0.0, 0.5]) * top[:, None, None], axis=-1)
    corner = np.choose(kind, [axes.max(-1), np.linalg.norm(axes, axis=-1), np.hypot(axes[..., 0], axes[..., 2])])
    scale = OBJECT_RADIUS / np.where(active, reach + corner, 0.0).max(-1)
    slot = np.argsort(order, axis=-1)

    def by_slot(values: np.ndarray) -> np.ndarray:
        index = slot.reshape(*slot.shape, *[1] * (values.ndim - 2))
        return np.take_along_axis(values, index, axis=1)

    axes, center = axes * scale[:, None, None], center * scale[:, None, None]
    return (by_slot(rotation), by_slot(axes), by_slot(center), by_slot(active)), top * scale


def _draw_landmarks(draws: Draws, framing: Framing) -> tuple[Array, Array, Array, Mask]:
    """Pose the landmarks: all around, and far enough that no camera of the orbit can be inside one."""
    num = len(LANDMARK_KINDS)
    distance = framing.distance[:, None]
    kind = LANDMARK_KINDS
    width = draws.uniform(0.13, 0.3, num) * distance
    axes = np.stack([width, width * draws.uniform(0.6, 1.2, num), draws.uniform(0.15, 0.6, num) * distance], axis=-1)
    axes[..., 1] = np.where(kind == CYLINDER, axes[..., 0], axes[..., 1])
    axes[..., 2] = np.where(kind == ELLIPSOID, axes[..., 0] * draws.uniform(0.8, 1.3, num), axes[..., 2])
    rotation = yaw_rotation(draws.uniform(0.0, 2.0 * np.pi, num))
    angle = draws.permutation(num) + draws.uniform(-0.3, 0.3, num)
    angle = 2.0 * np.pi / num * angle + draws.uniform(0.0, 2.0 * np.pi)[:, None]
    inner = MAX_DISTANCE_FACTOR * distance + 0.4 + np.hypot(axes[..., 0], axes[..., 1])
    radius = np.minimum(inner + draws.uniform(0.0, 2.5, num), GROUND_RADIUS - 1.0)
    center = np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.98 * axes[..., 2]], axis=-1)
    active = draws.permutation(num) < np.floor(draws.uniform(7.0, 11.0))[:, None]
    return rotation, axes, center, active


def _draw_surfaces(draws: Draws, num: int) -> dict[str, Array]:
    saturation, value = draws.uniform(0.2, 0.75)[:, None], draws.uniform(0.3, 0.55)[:, None]
    colors = draws.color(num * 3, saturation=(saturation, 1.0), value=(value, 1.0)).reshape(-1, num, 3, 3)
    waves = np.empty((*colors.shape[:2], 3, 4))
    waves[..., 0, :3] = draws.direction(num) * draws.uniform(0.8, 2.2, num)[..., None]
    waves[..., 1, :3] = draws.direction(num) * draws.uniform(3.0, 10.0, num)[..., None]
    # a second factor turns stripes into checks; a wave vector of zero with phase pi/2 keeps them stripes
    checks = draws.flag(0.5, num)[..., None]
    waves[..., 2, :3] = np.where(checks, draws.direction(num) * draws.uniform(3.0, 8.0, num)[..., None], 0.0)
    waves[..., 3] = draws.uniform(0.0, 2.0 * np.pi, num, 3)
    waves[..., 2, 3] = np.where(checks[..., 0], waves[..., 2, 3], np.pi / 2.0)
    opacity = draws.flag(0.75, num) * draws.uniform(0.5, 1.0, num)
    pattern = np.stack([opacity, draws.uniform(0.7, 6.0, num)], axis=-1)
    return {"colors": colors, "waves": waves, "pattern": pattern}


def _draw_ground(draws: Draws) -> dict[str, Array]:
    saturation = draws.uniform(0.15, 0.6)[:, None]
    colors = draws.color(3, saturation=(saturation, saturation + 0.3), value=(0.3, 0.95))
    length = np.exp(draws.uniform(np.log(1.5), np.log(12.0), NUM_GROUND_WAVES))
    angle = draws.uniform(0.0, 2.0 * np.pi, NUM_GROUND_WAVES)
    phase = draws.uniform(0.0, 2.0 * np.pi, NUM_GROUND_WAVES)
    waves = np.stack([np.cos(angle) * 2 * np.pi / length, np.sin(angle) * 2 * np.pi / length, phase], axis=-1)

    radius, turn = draws.uniform(0.8, 9.0, NUM_RUGS), draws.uniform(0.0, 2.0 * np.pi, NUM_RUGS)
    half_width = draws.uniform(0.3, 0.7, NUM_RUGS) * (1.0 + radius / 4.0)
    center = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=-1)
    linear = yaw_rotation(draws.uniform(0.0, 2.0 * np.pi, NUM_RUGS))[..., :2, :2] / half_width[..., None, None]
    rugs = np.concatenate([linear, -linear @ center[..., None]], axis=-1)
    return {
        "ground_colors": colors,
        "ground_waves": waves,
        "rugs": rugs,
        "rug_colors": draws.color(NUM_RUGS, saturation=(0.3, 0.95), value=(0.25, 1.0)),
    }


def _draw_sky_and_light(draws: Draws) -> dict[str, Array]:
    sky = np.empty((len(draws.uniform(0.0, 1.0)), 3, 8))
    sky[..., 0] = draws.uniform(0.5, 0.72, 3)
    amplitude = draws.uniform([0.18, 0.08, 0.03], [0.34, 0.2, 0.1], 3, 3)
    phase = draws.uniform(0.0, 2.0 * np.pi, 3, 3)
    sky[..., 1:7:2], sky[..., 2:7:2] = amplitude * np.cos(phase), amplitude * np.sin(phase)
    sky[..., 7] = draws.uniform(-0.35, 0.2)[:, None] + draws.uniform(-0.1, 0.1, 3)

    elevation, azimuth = np.radians(draws.uniform(25.0, 75.0)), draws.uniform(0.0, 2.0 * np.pi)
    direction = np.stack(
        [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)], axis=-1
    )
    sun = draws.uniform(0.45, 0.8)[:, None] * draws.uniform(0.88, 1.0, 3)
    ambient = draws.uniform(0.42, 0.6)[:, None] * draws.uniform(0.92, 1.0, 3)
    light = np.stack([direction, sun, ambient], axis=1)
    return {"sky": sky, "light": light, "noise": draws.uniform(0.004, 0.02)}
