"""Procedural turntable scenes: images with exact depth, points, masks, intrinsics and poses, made from a seed.

A scene is an object on the ground among landmarks under a sky (`geoaccel.eval.data.procedural.world` has the full
distribution), filmed from an orbit (`geoaccel.eval.data.procedural.orbits`) as in CO3D:

    field of view   40 to 70 degrees over the longer side, the same for all frames of a scene
    distance        the object's bounding sphere fills 0.5 to 0.75 of the longer side; varies within 20 %
    span            60 to 360 degrees; each frame's azimuth is uniform within it; half of the scenes are in order
    elevation       -5 to 50 degrees: a base, a smooth swing along the orbit, 3 degrees of jitter
    aim             0.08 object radii of jitter, 3 degrees of roll
    sensor          noise of 0.004 to 0.02, 4 % exposure and 1.5 % white balance variation between frames

A scene depends only on its seed (and the `OrbitConfig`), not on other scenes of the batch, and frame i does not depend
on the number of frames after it unless the frames are in order. Parameters are drawn on the CPU, everything per pixel
is computed on `device`; no global random state is read or changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid, pixel_grid
from geoaccel.errors import UserError
from geoaccel.eval.data.procedural.orbits import Cameras, OrbitConfig, draw_cameras
from geoaccel.eval.data.procedural.raycast import render
from geoaccel.eval.data.procedural.world import IS_OBJECT, World, draw_worlds

# Three disjoint sets of scenes. Training and quantization calibration use any seed from here on.
FIRST_TRAIN_SEED = 1_000_000
# Nothing is trained, calibrated, tuned or chosen on these: they are only for published tables.
REPORT_SEEDS = range(8192, 8256)
# All others are validation scenes, on which everything is chosen: knobs, defaults, recipes, rounds of training. Those
# from 1000 on are for validation during training. TEST_SEEDS are the default of `data=synthetic`; results on them, in
# benchmarks/ and in the model cards, are of configurations partly chosen on them.
VALIDATION_SEEDS = range(1000, 1032)
TEST_SEEDS = range(0, 64)
SeedSet = Literal["training", "validation", "report"]
SEED_SETS: dict[str, tuple[str, range | None]] = {
    "training": (f"from {FIRST_TRAIN_SEED} on", None),
    "validation": ("0 to 63, 1000 to 1031 or any other", TEST_SEEDS),
    "report": (f"{REPORT_SEEDS[0]} to {REPORT_SEEDS[-1]}", REPORT_SEEDS),
}
"""By name of a set, its seeds in words, and the seeds used if only the set is named."""

# Rays that the uncompiled ray caster processes at once on a CPU: its temporaries then stay in the cache.
CPU_CHUNK_RAYS = 12_544


def set_of(seed: int) -> SeedSet:
    """Which of the three sets a scene belongs to."""
    if seed >= FIRST_TRAIN_SEED:
        return "training"
    return "report" if seed in REPORT_SEEDS else "validation"


def checked_seeds(seeds: Iterable[int], purpose: str, *allowed: SeedSet) -> list[int]:
    """The seeds, if all are from sets allowed for the purpose. Everything that trains or chooses must call this.

    Args:
        seeds: Seeds of scenes.
        purpose: In words: "cannot PURPOSE seed 8192".
        allowed: Names of sets.

    Raises:
        ValueError: If one is from another set.
    """
    found = list(seeds)
    for seed in found:
        if set_of(seed) not in allowed:
            why = ", on which nothing may be chosen" if set_of(seed) == "report" else ""
            others = " or ".join(f"{name} seeds ({SEED_SETS[name][0]})" for name in allowed)
            raise UserError(f"cannot {purpose} seed {seed}: it is in the {set_of(seed)} set{why}; use {others}")
    return found


@dataclass(frozen=True)
class SceneBatch:
    """B rendered scenes of S frames each; all tensors on one device."""

    images: Tensor  # [B, S, 3, H, W] in [0, 1]
    depth: Tensor  # [B, S, H, W], exact z-depth; 0 in the sky
    mask: Tensor  # [B, S, H, W], bool, the object in the middle
    points_world: Tensor  # [B, S, H, W, 3]; the camera's centre in the sky
    intrinsics: Tensor  # [B, S, 3, 3], pixels
    cam_from_world: Tensor  # [B, S, 4, 4]
    seeds: tuple[int, ...]

    @property
    def valid(self) -> Tensor:  # [B, S, H, W], bool
        """Pixels that show a surface."""
        return self.depth > 0

    def to(self, device: torch.device | str) -> SceneBatch:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "seeds"}
        return replace(self, **tensors)


def sample_batch(
    seeds: Sequence[int],
    *,
    frames: int,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    orbit: OrbitConfig | None = None,
    compile: bool = False,
) -> SceneBatch:
    """Render one scene per seed.

    Args:
        seeds: Non-negative integers; the same seed gives the same scene on every call.
        frames: Frames of each scene.
        size: Height and width in pixels.
        device: Where to render.
        orbit: Distribution of the cameras; by default the evaluation's full orbits.
        compile: Fuse the ray caster with ``torch.compile``: about four times as fast after a first call of about a
            minute. On a CPU this needs a C++ compiler.

    Example:
        >>> batch = sample_batch([1_000_000, 1_000_001], frames=3, size=(28, 42))
        >>> batch.images.shape
        torch.Size([2, 3, 3, 28, 42])
    """
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UserError(f"seeds={list(seeds)[:8]}: give one or more integers from 0 to 2**63 - 1")
    height, width = size
    if frames < 1 or height < 2 or width < 2:
        raise UserError(f"frames={frames}, size={tuple(size)}: give at least one frame of (height, width) >= (2, 2)")
    orbit = orbit or OrbitConfig()
    worlds, framing, subject_height = draw_worlds(seeds, orbit)
    cameras = draw_cameras(seeds, frames, (height, width), framing, subject_height, orbit)

    return render_cameras(worlds, cameras, (height, width), seeds, device=device, compile=compile)


def render_cameras(
    worlds: World,
    cameras: Cameras,
    size: tuple[int, int],
    seeds: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> SceneBatch:
    """Render each world, one row per scene, with its cameras; other arguments as in `sample_batch`."""
    height, width = size
    frames = cameras.cam_from_world.shape[1]
    arguments = [tensor.to(device) for tensor in _ray_caster_inputs(worlds, cameras, (height, width))]
    with torch.no_grad():
        if compile:
            rendered = _render_compiled(worlds.to(device).repeat(frames), *arguments)
        elif torch.device(device).type == "cpu":
            rendered = _render_in_chunks(worlds.repeat(frames), *arguments)
        else:
            rendered = render(worlds.to(device).repeat(frames), *arguments)
    images = [part.unflatten(0, (-1, frames)).unflatten(2, (height, width)) for part in rendered]
    depth, hit = images[6:]
    return SceneBatch(
        images=torch.stack(images[:3], dim=2),
        depth=depth,
        mask=torch.tensor([*IS_OBJECT, False, False], device=device)[hit],
        points_world=torch.stack(images[3:6], dim=-1),
        intrinsics=cameras.intrinsics.to(device),
        cam_from_world=cameras.cam_from_world.to(device),
        seeds=seeds,
    )


def sequence(
    seed: int, *, frames: int = 8, size: tuple[int, int] = (224, 224), device: torch.device | str = "cpu"
) -> SceneBatch:
    """One scene as used by the evaluation: full orbit difficulty, B = 1."""
    return sample_batch([seed], frames=frames, size=size, device=device)


def _ray_caster_inputs(worlds: World, cameras: Cameras, size: tuple[int, int]) -> list[Tensor]:
    """Inputs of `render` besides the worlds, one row per frame. Products of poses are computed in float64."""
    frames = cameras.cam_from_world.shape[1]
    world_from_cam = invert_rigid(cameras.cam_from_world.double().flatten(0, 1))
    from_world = worlds.from_world.double().repeat_interleave(frames, dim=0)
    from_cam = (from_world[..., :3].flatten(1, 2) @ world_from_cam[:, :3]).view_as(from_world)
    from_cam[..., 3] += from_world[..., 3]
    intrinsics = cameras.intrinsics.flatten(0, 1)
    lens = torch.cat([intrinsics.diagonal(dim1=1, dim2=2)[:, :2], intrinsics[:, :2, 2]], dim=-1)
    u, v = (part.contiguous() for part in pixel_grid(*size).flatten(0, 1).unbind(-1))
    number = torch.arange(len(u), dtype=torch.int32)
    gain, noise_key = cameras.exposure.flatten(0, 1), cameras.noise_key.flatten()
    return [from_cam.float(), world_from_cam.float(), lens, gain, noise_key, u, v, number]


def _render_in_chunks(
    rows: World,
    *arguments: Tensor,  # five of [F, ...], three of [R]
) -> tuple[Tensor, ...]:
    """`render` on one CPU thread and on few rays at a time, so that all temporaries stay in the cache.

    Its thousand operations are so short that several threads mostly wait at barriers, even more so if another process
    uses a core: two threads were measured 5 to 40 times as slow as one.
    """
    of_frame, of_pixel = arguments[:5], arguments[5:]
    num_frames, num_pixels = len(of_frame[0]), len(of_pixel[0])
    step = max(1, CPU_CHUNK_RAYS // num_pixels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bands = []
        for j in range(0, num_pixels, CPU_CHUNK_RAYS):
            band = [values[j : j + CPU_CHUNK_RAYS] for values in of_pixel]
            slices = [slice(i, i + step) for i in range(0, num_frames, step)]
            parts = [render(rows.rows(f), *(values[f] for values in of_frame), *band) for f in slices]
            bands.append([torch.cat(part) for part in zip(*parts, strict=True)])
        return tuple(torch.cat(band, dim=1) for band in zip(*bands, strict=True))
    finally:
        torch.set_num_threads(threads)


def _render_compiled(rows: World, *arguments: Tensor) -> tuple[Tensor, ...]:
    """`render` fused, compiled once for any number of frames (at least two) and pixels."""
    for tensor in (*(getattr(rows, f.name) for f in fields(rows)), *arguments):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled()(rows, *arguments)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, ...]]:
    # not dynamic=True: torch would identify the size of eight frames with that of eight sky coefficients
    return torch.compile(render, fullgraph=True)
