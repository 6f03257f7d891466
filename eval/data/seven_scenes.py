"""7-Scenes: seven rooms filmed with a Kinect (Shotton et al., CVPR 2013).

    <root>/<scene>/TrainSplit.txt  TestSplit.txt        lines "sequence1", "sequence2", ...
    <root>/<scene>/seq-01/frame-000000.color.png        640 x 480
                          frame-000000.depth.png        16 bits, millimetres, 65535 = unknown, in the depth camera
                          frame-000000.depth.proj.png   the same in the colour camera; not in the download
                          frame-000000.pose.txt         world_from_cam, 4 x 4

From https://www.microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes/ : one archive per scene (chess, fire,
heads, office, pumpkin, redkitchen, stairs), with one more archive per sequence inside; unpack both. 43,000 frames,
some tens of gigabytes in all. Non-commercial research only.

A scene of the evaluation is one sequence, "redkitchen_seq-01", category "redkitchen". Intrinsics are those of the
published protocols: focal length 525, principal point at the image centre.

The ``depth.proj`` files of the published protocols are hard to find; if they are missing, the raw depth is projected
into the colour camera here, with the calibration published by ACE and "On the Limits of Pseudo Ground Truth". The
poses of the download are those of the *depth* camera, 2.6 cm and 0.6 degrees off the colour camera. Published results
use them for the colour camera, and so does ``poses="published"``; ``poses="color"`` transforms them to the colour
camera.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geoaccel.cameras import invert_rigid
from geoaccel.errors import UserError
from geoaccel.eval.data import files
from geoaccel.eval.data.registry import reader
from geoaccel.eval.data.scene import Candidate, EvalFrame, EvalScene, Names, OnSkip, Root, make_scene, read_candidates

SPLITS = {"train": ("TrainSplit.txt",), "test": ("TestSplit.txt",), "all": ("TrainSplit.txt", "TestSplit.txt")}
POSES = ("published", "color")
FOCAL, DEPTH_FOCAL = 525.0, 585.0
UNITS_PER_METER = 1000.0
UNKNOWN = 65535
MAX_DEPTH_M = 10.0  # larger depths are dropped, as in the published protocols
COLOR_FROM_DEPTH = torch.tensor(
    [
        [0.99996518012567637, 0.0026765126468950343, -0.0079041012313000904, -0.025558943178152542],
        [-0.0027409311281316700, 0.99996302803027592, -0.0081504520778013286, 0.00010109636268061706],
        [0.0078819942130445332, 0.0081718328771890631, 0.99993554558014031, 0.0020318321729487039],
        [0.0, 0.0, 0.0, 1.0],
    ],
    dtype=torch.float64,
)


@reader("seven_scenes", is_sequence=True)
def read(
    root: Root, *, scenes: Names = None, on_skip: OnSkip | None = None, split: str = "test", poses: str = "published"
) -> Iterator[EvalScene]:
    """Yield sequences, ordered by scene and number.

    Args:
        root: Folder with one folder per scene.
        scenes: Only these sequences ("chess_seq-03") or scenes ("chess").
        on_skip: Called with each sequence that is left out.
        split: ``test``, ``train`` or ``all``.
        poses: ``published`` or ``color``, see above.
    """
    if split not in SPLITS or poses not in POSES:
        raise UserError(f"split={split!r}, poses={poses!r}; known: {', '.join(SPLITS)} and {', '.join(POSES)}")
    folder = files.folder_of(root, "the 7-Scenes folder that holds chess, fire, ...")
    candidates = []
    for place in sorted(path for path in folder.iterdir() if (path / "TestSplit.txt").is_file()):
        lines = [line for name in SPLITS[split] for line in files.read_text(place / name).split()]
        numbers = sorted(int("".join(filter(str.isdigit, line)) or 0) for line in lines)
        for sequence in (place / f"seq-{number:02d}" for number in numbers):
            name = f"{place.name}_{sequence.name}"
            candidates.append(Candidate(name, place.name, partial(_read_sequence, sequence, name, poses)))
    if not candidates:
        raise FileNotFoundError(f"no */{SPLITS[split][0]} under {folder}; set data.root to the 7-Scenes folder")
    return read_candidates(candidates, scenes, on_skip)


def project_raw_depth(path: Path, size: tuple[int, int]) -> Tensor:  # [H, W], float32, metres
    """Raw depth projected into the colour camera; if two readings meet, the nearer one counts."""
    raw = files.read_depth_png(path, UNITS_PER_METER, max_depth=MAX_DEPTH_M, invalid=(UNKNOWN,)).double().numpy()
    v, u = np.nonzero(raw)
    z = raw[v, u]
    center = np.array([raw.shape[1], raw.shape[0]]) / 2.0
    rays = (np.stack([u, v], axis=-1) + 0.5 - center) / DEPTH_FOCAL
    points = np.concatenate([rays * z[:, None], z[:, None]], axis=-1)
    matrix = COLOR_FROM_DEPTH.numpy()
    points = points @ matrix[:3, :3].T + matrix[:3, 3]
    height, width = size
    pixels = np.floor(points[:, :2] / points[:, 2:] * FOCAL + np.array([width, height]) / 2.0).astype(int)
    inside = ((pixels >= 0) & (pixels < (width, height))).all(axis=-1) & (points[:, 2] > 0)
    depth = np.full(size, np.inf)
    np.minimum.at(depth, (pixels[inside, 1], pixels[inside, 0]), points[inside, 2])
    return files.clean_depth(depth)


def _read_sequence(folder: Path, name: str, poses: str) -> EvalScene:
    images = sorted(folder.glob("frame-*.color.png"))
    if not images:
        raise FileNotFoundError(f"no frame-*.color.png in {folder}; unpack {folder.name}.zip there")
    size = files.image_size(images[0])
    intrinsics = torch.tensor(
        [[FOCAL, 0.0, size[1] / 2.0], [0.0, FOCAL, size[0] / 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64
    )
    projected = any(folder.glob("frame-*.depth.proj.png"))
    suffix = "depth.proj.png" if projected else "depth.png"
    with_depth = projected or any(folder.glob("frame-*.depth.png"))
    frames = []
    for image in images:
        stem = image.name.removesuffix(".color.png")
        cam_from_world = invert_rigid(files.read_matrix(folder / f"{stem}.pose.txt", (4, 4)))
        depth_path = files.existing(folder / f"{stem}.{suffix}") if with_depth else None
        read_depth = None
        if projected and depth_path is not None:
            read_depth = partial(
                files.read_depth_png, depth_path, UNITS_PER_METER, max_depth=MAX_DEPTH_M, invalid=(UNKNOWN,)
            )
        elif depth_path is not None:
            read_depth = partial(project_raw_depth, depth_path, size)
        if poses == "color":
            cam_from_world = COLOR_FROM_DEPTH @ cam_from_world
        frames.append(EvalFrame(stem, cam_from_world, intrinsics, image, read_depth=read_depth))
    return make_scene(name, frames, category=folder.parent.name)
