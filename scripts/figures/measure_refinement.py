"""Results of ``--refine ba`` on rendered scenes whose true cameras were perturbed by 1 degree and 2 % of the depth.

    python scripts/figures/measure_refinement.py --work build/refinement --out benchmarks/refinement-rendered.json

AUC@5 of every scene (8 frames of 448 x 448 pixels): perturbed, refined with tracks measured in the images, and refined
with projections of true points. Depth is the true one. The rules of bundle adjustment were chosen on the validation
scenes of seeds 1000 to 1031, nothing on the report set (``--seeds 8192-8223``). The work folder stores tracks and
scores of each scene: runs resume, and runs with different ``--seeds`` share it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from frame_tables import rounded
from geoaccel.atomic import write_text
from geoaccel.cameras import invert_rigid, unproject_depth
from geoaccel.errors import run_program
from geoaccel.eval.data.synthetic import sequence
from geoaccel.eval.metrics.effects import interval
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.images import ImageTransform
from geoaccel.reconstruction import Reconstruction
from geoaccel.refine import bundle_adjust
from geoaccel.tracks import Cameras, Tracks, measure_tracks
from seed_command import kept_in, parser, provenance, seeds_of, write

FRAMES, SIZE, TRUE_POINTS = 8, 448, 500


def rendered(seed: int, *, frames: int, size: int) -> Reconstruction:
    """A rendered scene with its true cameras and depth."""
    batch = sequence(seed, frames=frames, size=(size, size))
    depth, intrinsics, poses = batch.depth[0], batch.intrinsics[0], batch.cam_from_world[0]
    pictures = (batch.images[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return Reconstruction(
        cam_from_world=poses,
        intrinsics=intrinsics,
        depth=depth,
        points_world=unproject_depth(depth, intrinsics, poses),
        conf=torch.ones_like(depth),
        images=batch.images[0],
        mask=depth > 0,
        names=[f"{i}.png" for i in range(frames)],
        transforms=[ImageTransform((size, size), (size, size), (1.0, 1.0), (0.0, 0.0))] * frames,
        paths=[None] * frames,
        read_original=lambda i: pictures[i],
    )


def spoiled(scene: Reconstruction, *, degrees: float = 1.0, share: float = 0.02, seed: int = 0) -> Reconstruction:
    """The scene with every camera rotated by an angle and translated by a fraction of the median depth, at random."""
    generator = torch.Generator().manual_seed(seed)
    world_from_cam = invert_rigid(scene.cam_from_world.double())
    for pose in world_from_cam:
        x, y, z = (_direction(generator) * np.radians(degrees)).tolist()
        cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
        pose[:3, :3] = pose[:3, :3] @ torch.linalg.matrix_exp(cross)
        pose[:3, 3] += _direction(generator) * share * scene.depth[scene.mask].median()
    poses = invert_rigid(world_from_cam).float()
    points = unproject_depth(scene.depth, scene.intrinsics, poses)
    return replace(scene, cam_from_world=poses, points_world=points)


def exact_tracks(scene: Reconstruction, count: int = 150) -> Tracks:
    """Projections of points of the true scene into every image that sees them."""
    cameras = Cameras.of(scene)
    generator = torch.Generator().manual_seed(0)
    frame, row, column = scene.mask.nonzero(as_tuple=True)
    chosen = torch.randperm(len(frame), generator=generator)[:count]
    points = scene.points_world[frame[chosen], row[chosen], column[chosen]].double().numpy()
    height, width = scene.depth.shape[1:]
    seen = []
    for i in range(len(scene)):
        pixels, inside = cameras.project(points, np.full(count, i))
        with np.errstate(invalid="ignore"):
            good = (pixels >= 0).all(1) & (pixels < (width, height)).all(1) & (inside[:, 2] > 0)
        at = np.where(good[:, None], pixels, 0).astype(int)
        depth = scene.depth[i].numpy()[at[:, 1], at[:, 0]]
        good &= np.abs(inside[:, 2] - depth) < 0.02 * depth
        seen += [(n, i, *pixels[n]) for n in np.flatnonzero(good)]
    seen.sort()
    table = np.array(seen)
    tracks = Tracks(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:], "truth")
    return tracks.keep(np.ones(len(table), bool))[0]


def auc_5(poses: Tensor, truth: Tensor) -> float:
    """Scores of one scene."""
    rotation, translation = relative_pose_errors(poses, truth)
    return auc(torch.maximum(rotation, translation), 5)


def _direction(generator: torch.Generator) -> Tensor:  # [3]
    return torch.nn.functional.normalize(torch.randn(3, generator=generator).double(), dim=0)


def measured(scene: Reconstruction, file: Path) -> Tracks:
    """Tracks in the images, from a file of an earlier run if there is one."""
    if not file.exists():
        tracks = measure_tracks(scene)
        np.savez_compressed(file, track=tracks.track, frame=tracks.frame, pixels=tracks.pixels, source=tracks.source)
    kept = np.load(file)
    return Tracks(kept["track"], kept["frame"], kept["pixels"], str(kept["source"]))


def measure(seed: int, work: Path) -> dict[str, Any]:
    """Scores of one scene, stored in the work folder."""
    kept = work / f"{seed}.json"
    if not kept.exists():
        truth = rendered(seed, frames=FRAMES, size=SIZE)
        scene = spoiled(truth, seed=seed)
        tracks = measured(scene, work / f"{seed}.npz")
        row: dict[str, Any] = {"seed": seed, "tracks": len(tracks), "of_3_views": int((tracks.lengths() >= 3).sum())}
        row["before"] = auc_5(scene.cam_from_world, truth.cam_from_world)
        for name, used in (("after", tracks), ("exact", exact_tracks(truth, TRUE_POINTS))):
            adjusted, done = bundle_adjust(replace(scene, tracks=used))
            row[name] = auc_5(adjusted.cam_from_world, truth.cam_from_world)
            row |= {"said": str(done)} if name == "after" else {}
        write_text(kept, json.dumps(row) + "\n")
        print(row, file=sys.stderr, flush=True)
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over scenes with 95 % intervals, and how many scenes became worse."""
    means = rounded({name: interval([row[name] for row in rows]) for name in ("before", "after", "exact")})
    worse = sum(row["after"] < row["before"] for row in rows)
    refused = sum("changed nothing" in row["said"] for row in rows)
    return {"scenes": len(rows), **means, "worse": worse, "refused": refused}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write everything."""
    args = parser(__doc__).parse_args(argv)
    seeds, made = seeds_of(args), provenance()
    work = kept_in(args, made)
    rows = [measure(seed, work) for seed in seeds]
    found = summary(rows)
    print(json.dumps(found))
    write(args, __file__, made, {"auc_5": found, "rows": rows})


if __name__ == "__main__":
    sys.exit(run_program("measure_refinement", main))
