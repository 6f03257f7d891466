"""The ray caster: from worlds and cameras to colour, exact z-depth and the primitive hit.

One pure function of elementwise operations over ``[F, R]`` (F frames, R pixels of each) and of reductions over the
primitives of one kind, ``[F, n, R] -> [F, R]`` with n <= 10. ``torch.compile`` makes a few fused loops of it, in which
the ``[F, n, R]`` values live in registers; uncompiled it is best run on few rays at a time.
A ray is ``center + depth * direction`` with a direction whose z-component in the camera is one, so the ray parameter
*is* the z-depth.

Each primitive is intersected in coordinates where it is the unit ball, the cube [-1, 1]^3 or the unit cylinder.
Quadrics use the discriminant a - |o x d|^2: the textbook b^2 - ac loses the silhouette of distant small objects to
cancellation in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.eval.data.procedural.world import (
    BOX,
    CYLINDER,
    ELLIPSOID,
    GROUND_RADIUS,
    KINDS,
    NUM_GROUND_WAVES,
    NUM_RUGS,
    World,
)

Vector = tuple[Tensor, Tensor, Tensor]

NEAREST = 1e-3
SHADOW_OFFSET = 0.01
FAR = 1e9
GROUND_ID, SKY_ID = len(KINDS), len(KINDS) + 1
SLOTS = {kind: slice(KINDS.index(kind), KINDS.index(kind) + KINDS.count(kind)) for kind in (ELLIPSOID, BOX, CYLINDER)}


def render(
    world: World,  # one row a frame
    from_cam: Tensor,  # [F, N, 3, 4], as `world.from_world`, but from the camera's coordinates
    world_from_cam: Tensor,  # [F, 4, 4]
    lens: Tensor,  # [F, 4], focal lengths and principal point in pixels
    gain: Tensor,  # [F, 3]
    noise_key: Tensor,  # [F], int32
    u: Tensor,  # [R], column of the pixel's centre
    v: Tensor,  # [R], row of the pixel's centre
    number: Tensor,  # [R], int32, of each pixel in its image: chooses the noise
) -> tuple[Tensor, ...]:  # eight of [F, R]
    """Render F worlds with F cameras.

    No matrix product: on a GPU it might run in TF32, under autocast in bfloat16. No stacking: compiled, a stack would
    compute its parts once for each of its elements.

    Returns:
        Red, green and blue in [0, 1]; x, y and z of the world point (the camera's centre where no surface is hit);
        z-depth (0 there); and the index of the primitive hit, `GROUND_ID` or `SKY_ID`.
    """
    x = (u - lens[:, 2, None]) / lens[:, 0, None]
    y = (v - lens[:, 3, None]) / lens[:, 1, None]
    rotation, center = world_from_cam[:, :3, :3], world_from_cam[:, :3, 3]
    direction = _transform(rotation, (x, y, torch.ones_like(x)))
    depth, hit = _nearest_hit(from_cam, center, direction, x, y)
    point: Vector = tuple(center[:, i, None] + depth * direction[i] for i in range(3))  # type: ignore[assignment]

    prim = torch.clamp_max(hit, len(KINDS) - 1)
    albedo, normal = _surface(world, prim, point)
    on_ground, on_sky = hit == GROUND_ID, hit == SKY_ID
    ground = _ground_color(world, point[0], point[1])
    albedo = [torch.where(on_ground, g, a) for g, a in zip(ground, albedo, strict=True)]
    nx, ny = (torch.where(on_ground, 0.0, n) for n in normal[:2])
    nz = torch.where(on_ground, 1.0, normal[2])

    sun = world.light[:, 0, :, None]
    facing = (nx * sun[:, 0] + ny * sun[:, 1] + nz * sun[:, 2]).clamp_min(0.0)
    lifted = (point[0] + SHADOW_OFFSET * nx, point[1] + SHADOW_OFFSET * ny, point[2] + SHADOW_OFFSET * nz)
    facing = facing * _sunlit(world, lifted)
    above = (0.75 + 0.25 * nz) * torch.where(on_ground, _contact(world, point[0], point[1]), 1.0)
    sky = _sky_color(world, direction)
    channels = []
    for c in range(3):
        lit = albedo[c] * (world.light[:, 2, c, None] * above + world.light[:, 1, c, None] * facing)
        color = torch.where(on_sky, sky[c], lit) * gain[:, c, None]
        noise = world.noise[:, None] * _gaussian_hash(noise_key[:, None], number * 3 + c)
        channels.append((color + noise).clamp(0.0, 1.0))
    depth = torch.where(on_sky, 0.0, depth)
    surface = [torch.where(on_sky, center[:, i, None], point[i]) for i in range(3)]
    return *channels, *surface, depth, hit


def _transform(matrix: Tensor, vector: Vector) -> Vector:
    """Multiply the 3x3 part of ``matrix [F, (n,) 3, 3|4]`` with the parts of a vector, and add its fourth column."""
    rows = [sum(matrix[..., i, j, None] * vector[j] for j in range(3)) for i in range(3)]
    if matrix.shape[-1] == 4:
        rows = [row + matrix[..., i, 3, None] for i, row in enumerate(rows)]
    return tuple(rows)  # type: ignore[return-value]


def _nearest_hit(from_cam: Tensor, center: Tensor, direction: Vector, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    down = direction[2] < -1e-6
    to_ground = -center[:, 2, None] / torch.where(down, direction[2], -1.0)
    gx, gy = center[:, 0, None] + to_ground * direction[0], center[:, 1, None] + to_ground * direction[1]
    on_ground = down & (gx * gx + gy * gy < GROUND_RADIUS**2)
    depth = torch.where(on_ground, to_ground, FAR)
    hit = torch.where(on_ground, GROUND_ID, SKY_ID)

    ray = (x[:, None], y[:, None], torch.ones_like(x)[:, None])
    for kind, slots in SLOTS.items():
        origin: Vector = tuple(from_cam[:, slots, j, 3, None] for j in range(3))  # type: ignore[assignment]
        enter, leave = _intersect(kind, origin, _transform(from_cam[:, slots, :, :3], ray))
        nearest, index = torch.where((enter < leave) & (enter > NEAREST), enter, FAR).min(dim=1)
        closer = nearest < depth
        depth = torch.where(closer, nearest, depth)
        hit = torch.where(closer, index + slots.start, hit)
    return depth, hit


def _intersect(kind: int, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """Where a line in the primitive's own coordinates enters and leaves it; it misses unless enter < leave."""
    if kind == BOX:
        slabs = [_slab(o, d) for o, d in zip(origin, direction, strict=True)]
        enter = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
        leave = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
        return enter, leave
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    cz = ox * dy - oy * dx
    if kind == ELLIPSOID:
        a, middle = dx * dx + dy * dy + dz * dz, -(ox * dx + oy * dy + oz * dz)
        cx, cy = oy * dz - oz * dy, oz * dx - ox * dz
        discriminant = a - (cx * cx + cy * cy + cz * cz)
    else:
        a, middle = dx * dx + dy * dy, -(ox * dx + oy * dy)
        discriminant = a - cz * cz
    root, inverse = torch.sqrt(discriminant.clamp_min(0.0)), 1.0 / a.clamp_min(1e-12)
    enter, leave = (middle - root) * inverse, (middle + root) * inverse
    if kind == CYLINDER:
        bottom, top = _slab(oz, dz)
        enter, leave = torch.maximum(enter, bottom), torch.minimum(leave, top)
    # for rays that miss the quadric the root is zero, and so is the interval between enter and leave
    return enter, torch.where(discriminant > 0.0, leave, -FAR)


def _slab(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / torch.where(direction.abs() < 1e-9, 1e-9, direction)
    middle, half = -origin * inverse, inverse.abs()
    return middle - half, middle + half


def _surface(world: World, prim: Tensor, point: Vector) -> tuple[list[Tensor], Vector]:
    """Colour and unit normal of the primitives that were hit."""

    def pick(table: Tensor) -> Tensor:  # [F, N] -> [F, R]
        return table.gather(1, prim)

    matrix = [[pick(world.from_world[:, :, i, j]) for j in range(4)] for i in range(3)]
    q = [row[0] * point[0] + row[1] * point[1] + row[2] * point[2] + row[3] for row in matrix]

    swing = [
        torch.sin(sum(pick(world.waves[:, :, k, j]) * q[j] for j in range(3)) + pick(world.waves[:, :, k, 3]))
        for k in range(3)
    ]
    blend = 0.5 + 0.5 * swing[0]
    stripe = (0.5 + pick(world.pattern[:, :, 1]) * swing[1] * swing[2]).clamp(0.0, 1.0) * pick(world.pattern[:, :, 0])
    albedo = []
    for c in range(3):
        first, second, third = (pick(world.colors[:, :, k, c]) for k in range(3))
        base = first + blend * (second - first)
        albedo.append(base + stripe * (third - base))

    is_ellipsoid, is_box = prim < SLOTS[BOX].start, prim < SLOTS[CYLINDER].start
    size = [part.abs() for part in q]
    largest = torch.maximum(torch.maximum(size[0], size[1]), size[2])
    on_cap = size[2] * size[2] >= q[0] * q[0] + q[1] * q[1]
    local = []
    for j in range(3):
        box = torch.where(size[j] >= largest, q[j], 0.0)
        cylinder = torch.where(on_cap if j == 2 else ~on_cap, q[j], 0.0)
        local.append(torch.where(is_ellipsoid, q[j], torch.where(is_box, box, cylinder)))
    n = [matrix[0][j] * local[0] + matrix[1][j] * local[1] + matrix[2][j] * local[2] for j in range(3)]
    scale = torch.rsqrt((n[0] * n[0] + n[1] * n[1] + n[2] * n[2]).clamp_min(1e-12))
    return albedo, (n[0] * scale, n[1] * scale, n[2] * scale)


def _sunlit(world: World, point: Vector) -> Tensor:
    """1 in sunlight, 0 in shadow."""
    sun: Vector = tuple(world.light[:, 0, j, None, None] for j in range(3))  # type: ignore[assignment]
    start: Vector = tuple(part[:, None] for part in point)  # type: ignore[assignment]
    blocked = torch.zeros_like(point[0])
    for kind, slots in SLOTS.items():
        origin = _transform(world.from_world[:, slots], start)
        enter, leave = _intersect(kind, origin, _transform(world.from_world[:, slots, :, :3], sun))
        blocks = torch.where((enter < leave) & (leave > SHADOW_OFFSET), 1.0, 0.0)
        blocked = torch.maximum(blocked, blocks.amax(dim=1))
    return 1.0 - blocked


def _contact(world: World, px: Tensor, py: Tensor) -> Tensor:
    """Darken the ground softly near the objects on it."""
    feet = world.footprint[..., None]
    dx, dy = px[:, None] - feet[:, :, 0], py[:, None] - feet[:, :, 1]
    ratio = (dx * dx + dy * dy) / (feet[:, :, 2] * feet[:, :, 2])
    return 1.0 / (1.0 + 0.8 * (1.0 / (1.0 + ratio * ratio)).sum(dim=1))


def _ground_color(world: World, px: Tensor, py: Tensor) -> list[Tensor]:
    factors = world.ground_waves[..., None]
    waves = [
        torch.sin(factors[:, k, 0] * px + factors[:, k, 1] * py + factors[:, k, 2]) for k in range(NUM_GROUND_WAVES)
    ]
    first = (0.5 + 0.6 * (waves[0] + waves[1] + 0.5 * waves[2])).clamp(0.0, 1.0)
    second = (0.3 + 0.9 * (waves[3] + waves[4] * waves[5])).clamp(0.0, 1.0)
    shade = 1.0 + 0.12 * waves[6]

    matrix = world.rugs[..., None]
    u = matrix[:, :, 0, 0] * px[:, None] + matrix[:, :, 0, 1] * py[:, None] + matrix[:, :, 0, 2]
    v = matrix[:, :, 1, 0] * px[:, None] + matrix[:, :, 1, 1] * py[:, None] + matrix[:, :, 1, 2]
    round_ones = (torch.arange(NUM_RUGS, device=px.device) % 2 == 0)[:, None]
    distance = torch.where(round_ones, torch.sqrt(u * u + v * v), torch.maximum(u.abs(), v.abs()))
    # the nearest rug by its own metric is on top; a paler border and middle show which rug a part belongs to
    nearest, rug = distance.min(dim=1)
    tint = torch.where((nearest > 0.75) | (nearest < 0.3), 1.0, 0.7)
    mixed = []
    for c in range(3):
        colors = world.ground_colors[:, :, c, None]
        base = colors[:, 0] + first * (colors[:, 1] - colors[:, 0])
        base = shade * (base + second * (colors[:, 2] - base))
        mixed.append(torch.where(nearest < 1.0, tint * world.rug_colors[:, :, c].gather(1, rug), base))
    return mixed


def _sky_color(world: World, direction: Vector) -> list[Tensor]:
    dx, dy, dz = direction
    scale = torch.rsqrt(dx * dx + dy * dy + dz * dz)
    dx, dy, dz = dx * scale, dy * scale, dz * scale
    # cos and sin of once, twice and three times the azimuth, each times a power of cos(elevation): smooth at the zenith
    dx2, dy2 = dx * dx - dy * dy, 2.0 * dx * dy
    dx3, dy3 = dx2 * dx - dy2 * dy, dx2 * dy + dy2 * dx
    harmonics = (dx, dy, dx2, dy2, dx3, dy3, dz)
    return [
        (world.sky[:, c, 0, None] + sum(world.sky[:, c, k + 1, None] * h for k, h in enumerate(harmonics))).clamp(
            0.02, 1.0
        )
        for c in range(3)
    ]


def _gaussian_hash(key: Tensor, counter: Tensor) -> Tensor:
    """Roughly normal numbers from integers: the sum of a hashed counter's four bytes; the same on every device."""
    mixed = counter * -1640531535 + key
    for multiplier, shift in ((0x2C1B3C6D, 17), (0x297A2D39, 15)):
        mixed = (mixed ^ ((mixed >> shift) & 0x7FFF)) * multiplier
    mixed = mixed ^ ((mixed >> 15) & 0x1FFFF)
    total = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + ((mixed >> 24) & 255)
    return (total.to(torch.float32) - 510.0) * (1.0 / 147.8)
