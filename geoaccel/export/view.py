"""``view.npz``, the file of ``geoaccel view``: every usable point in 12 bytes, cameras, and small photographs.

Positions have 16 bits per axis, within a box around all points except a few far ones, which are left out; the
confidence rank within the scene and the depth jump around the pixel have 8 bits each. So the sliders of a viewer are
immediate, and a million points take 12 MB.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from geoaccel.edges import depth_jumps
from geoaccel.errors import ARRAY_ERRORS, UserError
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.point_cloud import PointCloud, random_rows
from geoaccel.scene import Scene

FILE = "view.npz"
DENSE_FILE = "view-dense.npz"
"""Name of the dense model's result next to an accelerated one."""

MAX_POINTS = 1_000_000
LARGEST_JUMP = 0.5
"""Largest relative depth jump that a slider can select."""

LARGEST_CUT = 99
"""Largest percentage of the least confident points that a slider can leave out."""

PHOTOGRAPH_SIDE = 160
LEVELS = 65535
FAR = 5.0
"""Points farther from the centre than this many times the 99th percentile along an axis are left out."""

WRITES["view"] = (FILE,)


@dataclass(frozen=True, eq=False)
class View:
    """N points and S cameras.

    Attributes:
        points: [N, 3], uint16: world coordinates are ``low + step * points``.
        low: [3], float32.
        step: [3], float32.
        colors: sRGB [N, 3], uint8.
        rank: Fraction of points that are less confident [N], uint8, in 255ths.
        jump: Relative jump of depth around the pixel [N], uint8, in 255ths of `LARGEST_JUMP`, clipped at 255.
        cam_from_world: [S, 4, 4], float32, OpenCV axes.
        lens: Focal lengths and principal point [S, 4], float32, as fractions of the image's width and height.
        size: Height and width [S, 2] of the image area in `photographs`.
        names: Names of the images.
        photographs: Concatenated JPEG files, uint8.
        ends: End of each of them [S].
        unit: Name of the unit.
        cut: Percentage of the least confident points that the result left out, at most `LARGEST_CUT`.
        rated: Whether `rank` and `jump` are known; without them sliders are disabled.
    """

    points: np.ndarray
    low: np.ndarray
    step: np.ndarray
    colors: np.ndarray
    rank: np.ndarray
    jump: np.ndarray
    cam_from_world: np.ndarray
    lens: np.ndarray
    size: np.ndarray
    names: np.ndarray
    photographs: np.ndarray
    ends: np.ndarray
    unit: str
    cut: float
    rated: bool

    def __len__(self) -> int:
        return len(self.points)

    def world(self) -> np.ndarray:  # [N, 3]
        """World coordinates, float32."""
        return (self.low + self.step * self.points.astype(np.float32)).astype(np.float32)

    def photograph(self, frame: int) -> bytes:
        """The JPEG file of one image; empty if there is none."""
        return self.photographs[self.ends[frame - 1] if frame else 0 : self.ends[frame]].tobytes()

    def thin(self, most: int) -> View:
        """At most `most` points, sampled at random."""
        if len(self) <= most:
            return self
        rows = random_rows(len(self), most, 0).numpy()
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return View(**values | {name: values[name][rows] for name in ("points", "colors", "rank", "jump")})

    def write(self, path: Path) -> None:
        """Write it, for `read_view`."""
        arrays: dict[str, Any] = {one.name: np.asarray(getattr(self, one.name)) for one in fields(self)}
        np.savez(path, **arrays)


def read_view(path: Path) -> View:
    """Read a file of `View.write`.

    Raises:
        UserError: If it is not such a file.
    """
    try:
        with path.open("rb") as file, np.load(file) as arrays:  # NumPy leaves a damaged file open
            values: dict[str, Any] = {one.name: arrays[one.name] for one in fields(View)}
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} is not a file for geoaccel view ({error}); write it again: --formats view") from None
    scalars = {"unit": str(values["unit"]), "cut": float(values["cut"]), "rated": bool(values["rated"])}
    return View(**values | scalars)


def make_view(
    points: np.ndarray,  # [N, 3]
    colors: np.ndarray,  # [N, 3] uint8
    cameras: Mapping[str, np.ndarray],
    *,
    conf: np.ndarray | None = None,  # [N]
    jump: np.ndarray | None = None,  # [N]
    photographs: Sequence[bytes] = (),
    unit: str,
    cut: float = 0.0,
) -> View:
    """Pack points for a viewer.

    Args:
        points: World coordinates.
        colors: sRGB.
        cameras: ``cam_from_world``, ``lens``, ``size`` and ``names``, as in `View`.
        conf: Higher is more confident.
        jump: From `geoaccel.edges.depth_jumps`.
        photographs: JPEG files of the cameras.
        unit: Name of the unit.
        cut: Percentage of the least confident points that the result left out.
    """
    middle = np.median(points, axis=0)
    reach = FAR * np.percentile(np.abs(points - middle), 99, axis=0) + 1e-12
    near = (np.abs(points - middle) <= reach).all(axis=1)
    kept = points[near].astype(np.float64)
    low, high = kept.min(axis=0).astype(np.float32), kept.max(axis=0)
    step = np.maximum((high - low) / LEVELS, 1e-12).astype(np.float32)
    count = len(kept)
    rank = np.full(count, 255, np.uint8) if conf is None else _ranks(conf[near])
    coded = np.zeros(count) if jump is None else np.clip(jump[near] / LARGEST_JUMP, 0, 1)
    files = list(photographs) or [b""] * len(cameras["names"])
    return View(
        points=np.clip(((kept - low) / step).round(), 0, LEVELS).astype(np.uint16),
        low=low,
        step=step,
        colors=np.ascontiguousarray(colors[near], np.uint8),
        rank=rank,
        jump=(255 * coded).round().astype(np.uint8),
        cam_from_world=cameras["cam_from_world"].astype(np.float32),
        lens=cameras["lens"].astype(np.float32),
        size=cameras["size"],
        names=cameras["names"],
        photographs=np.frombuffer(b"".join(files), np.uint8),
        ends=np.cumsum([len(file) for file in files]),
        unit=unit,
        cut=cut,
        rated=conf is not None,
    )


def view_of(scene: Scene, cut: float = 0.0) -> View:
    """The view of a scene: all usable pixels that the masks keep, whatever their confidence."""
    frame, row, column = (index.numpy() for index in scene.kept.nonzero(as_tuple=True))
    if len(frame) > MAX_POINTS:
        rows = random_rows(len(frame), MAX_POINTS, 0).numpy()
        frame, row, column = frame[rows], row[rows], column[rows]
    jumps = depth_jumps(scene.depth, scene.mask, scene.conf).numpy()
    images = scene.images.numpy()
    boxes = np.array([transform.content_box for transform in scene.transforms])  # left, top, right, bottom
    size = boxes[:, [3, 2]] - boxes[:, [1, 0]]
    cameras = {
        "cam_from_world": scene.cam_from_world.numpy(),
        "lens": lens_of(scene.intrinsics.numpy(), size, boxes[:, :2]),
        "size": size,
        "names": np.array(scene.names),
    }
    return make_view(
        scene.points_world.numpy()[frame, row, column],
        (images[frame, :, row, column].clip(0, 1) * 255).round().astype(np.uint8),
        cameras,
        conf=scene.conf.numpy()[frame, row, column],
        jump=jumps[frame, row, column],
        photographs=[small_photograph(scene, i) for i in range(len(scene))],
        unit=scene.unit,
        cut=cut,
    )


@FORMATS.register("view")
def write(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write all usable points; the cloud determines how many are shown initially."""
    view_of(scene, least_sure(scene, cloud)).write(folder / FILE)


def least_sure(scene: Scene, cloud: PointCloud) -> float:
    """Percentage of a view's points that the cloud's confidence filter leaves out; masked pixels are in neither."""
    passed = cloud.kept_share * int(scene.mask.sum())
    return min(max(0.0, 100 * (1 - passed / max(1, int(scene.kept.sum())))), LARGEST_CUT)


def lens_of(
    intrinsics: np.ndarray,  # [S, 3, 3]
    size: np.ndarray,  # [S, 2]
    corner: np.ndarray | float = 0.0,  # [S, 2]
) -> np.ndarray:  # [S, 4]
    """Focal lengths and principal points as fractions of the size of a crop of each image, at a corner (x, y)."""
    across = size[:, ::-1]
    focal = np.stack([intrinsics[:, 0, 0], intrinsics[:, 1, 1]], axis=1) / across
    return np.concatenate([focal, (intrinsics[:, :2, 2] - corner) / across], axis=1)


def small_photograph(scene: Scene, frame: int) -> bytes:
    """Network input of one image, without padding, as a small JPEG."""
    left, top, right, bottom = scene.transforms[frame].content_box
    seen = scene.images[frame, :, top:bottom, left:right].clamp(0, 1).permute(1, 2, 0)
    return small_jpeg((seen * 255).round().byte().numpy())


def small_jpeg(pixels: np.ndarray) -> bytes:
    """An image [H, W, 3], uint8, as a small JPEG."""
    from PIL import Image

    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def _ranks(conf: np.ndarray) -> np.ndarray:
    order = np.sort(conf)
    return np.floor(255.999 * np.searchsorted(order, conf) / max(1, len(conf))).astype(np.uint8)
