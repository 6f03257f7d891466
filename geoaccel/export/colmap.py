"""``sparse/0/``: a COLMAP model, binary (``.bin``) or text (``.txt``).

Written from COLMAP's description of its files, without COLMAP. One PINHOLE camera per image, or per group of images
whose cameras are the same (``shared_camera``), in pixels of the original (upright) image.

COLMAP's ``image_path`` is ``images/`` next to ``sparse/``, which has all of them, upright, at the size of the cameras:
the layout that 3DGS, gsplat and nerfstudio's splatfacto read directly. If photographs are used in place,
``image_path`` is their own folder.

``unit.txt`` next to the model names the unit of length; COLMAP's own files have no field for it.

3D points are triangulated from measured tracks (`geoaccel.tracks`) with the cameras of the scene, and suit bundle
adjustment; points behind a camera or with nearly parallel rays are left out. Without tracks (no pycolmap, or no
matches), they are points of the cloud: each has its own observation, exactly on its pixel, and its projections into all
images whose predicted depth agrees with it, for programs that choose image pairs by shared points (multi-view stereo).
Points seen by one image only are left out. There are at most `MAX_POINTS`, fewer for more than a hundred images.
Observations of either kind respect the user's masks.
``tracks.txt`` next to the model says which of the two was done.

``points3D.ply`` next to them is the cloud, of at most `MAX_POINTS` points. 3DGS starts from that file if it exists, and
other programs ignore it: measured points suit bundle adjustment, but are too few to initialise splats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from geoaccel.cameras import project_points, quaternion
from geoaccel.export.colmap_tracks import useful_points
from geoaccel.export.formats import FORMATS, WRITES
from geoaccel.export.frames import image_names
from geoaccel.export.ply import for_splats
from geoaccel.point_cloud import PointCloud
from geoaccel.scene import Scene

logger = logging.getLogger(__name__)

FOLDER = "sparse/0"
MAX_POINTS = 100_000
MAX_PROJECTIONS = 10_000_000
"""Most projections of cloud points into images: many images get fewer points, so that observations fit into memory."""
DEPTH_TOLERANCE = 0.02
PROJECTED = "projected: observations are projections of the points; adjusting a bundle to them moves nothing"

_PINHOLE = 1
_POINT2D = np.dtype([("x", "<f8"), ("y", "<f8"), ("point3d_id", "<i8")])
_POINT3D = np.dtype([("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("track_length", "<u8")])
_TRACK_ELEMENT = np.dtype([("image_id", "<i4"), ("point2d_index", "<i4")])

WRITES["colmap"] = WRITES["colmap-text"] = (f"{FOLDER}/",)


@FORMATS.register("colmap")
def write_binary(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write ``cameras.bin``, ``images.bin`` and ``points3D.bin``, and images without a usable file."""
    model = replace(build(scene, cloud), names=image_names(scene, folder))
    ids = model.camera_ids
    _make_folder(scene, cloud, folder, model.said)
    with open(folder / FOLDER / "cameras.bin", "wb") as file:
        _put(file, "<u8", len(set(ids)))
        for i, (height, width) in model.distinct_cameras():
            _put(file, "<i4", [ids[i], _PINHOLE])
            _put(file, "<u8", [width, height])
            _put(file, "<f8", model.cameras[i])
    with open(folder / FOLDER / "images.bin", "wb") as file:
        _put(file, "<u8", len(model.names))
        for i, name in enumerate(model.names):
            _put(file, "<i4", i + 1)
            _put(file, "<f8", [*model.quaternions[i], *model.translations[i]])
            _put(file, "<i4", ids[i])
            file.write(name.encode() + b"\0")
            _put(file, "<u8", len(model.points2d[i]))
            file.write(model.points2d[i].tobytes())
    with open(folder / FOLDER / "points3D.bin", "wb") as file:
        _put(file, "<u8", len(model.points3d))
        file.write(_interleave(model.points3d, model.tracks))


@FORMATS.register("colmap-text")
def write_text(scene: Scene, cloud: PointCloud, folder: Path) -> None:
    """Write ``cameras.txt``, ``images.txt`` and ``points3D.txt``, and images without a usable file."""
    model = replace(build(scene, cloud), names=image_names(scene, folder))
    ids = model.camera_ids
    blank = next((name for name in model.names if len(name.split()) > 1), None)
    if blank is not None:
        logger.warning("COLMAP's text format ends names at a blank, as in %r; use the binary format (colmap)", blank)
    cameras = ["# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY"]
    images = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of X Y POINT3D_ID"]
    points = ["# POINT3D_ID X Y Z R G B ERROR, then pairs IMAGE_ID POINT2D_INDEX"]
    for i, (height, width) in model.distinct_cameras():
        cameras.append(f"{ids[i]} PINHOLE {width} {height} {_join(model.cameras[i])}")
    for i, (name, camera) in enumerate(zip(model.names, ids, strict=True)):
        images.append(f"{i + 1} {_join(model.quaternions[i])} {_join(model.translations[i])} {camera} {name}")
        images.append(" ".join(_join(observation) for observation in model.points2d[i].tolist()))
    ends = np.cumsum(model.points3d["track_length"].astype(np.int64))
    tracks = model.tracks.tolist()
    start = 0
    for (index, xyz, rgb, error, _), end in zip(model.points3d.tolist(), ends.tolist(), strict=True):
        track = " ".join(f"{image} {point}" for image, point in tracks[start:end])
        points.append(f"{index} {_join(xyz)} {_join(rgb)} {error!r} {track}")
        start = end
    _make_folder(scene, cloud, folder, model.said)
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points)):
        (folder / FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_folder(scene: Scene, cloud: PointCloud, folder: Path, said: str) -> None:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / "unit.txt").write_text(f"{scene.unit}\n", encoding="utf-8")
    (folder / FOLDER / "tracks.txt").write_text(f"{said}\n", encoding="utf-8")
    (folder / FOLDER / "points3D.ply").write_bytes(for_splats(cloud.thin(MAX_POINTS), scene.unit))


@dataclass(frozen=True)
class ColmapModel:
    """The tables of both kinds of file. Image i has the id i + 1, as has 3D point i.

    Attributes:
        names: File name of each image, relative to their common folder.
        sizes: (H, W) of each image.
        cameras: fx, fy, cx, cy [S, 4].
        quaternions: w, x, y, z of ``cam_from_world`` [S, 4].
        translations: Those of ``cam_from_world`` [S, 3].
        points2d: Observations of each image, `_POINT2D`.
        points3d: `_POINT3D` [N].
        tracks: `_TRACK_ELEMENT`, point after point.
        said: Description of the source of the observations.
    """

    names: list[str]
    sizes: list[tuple[int, int]]
    cameras: np.ndarray
    quaternions: np.ndarray
    translations: np.ndarray
    points2d: list[np.ndarray]
    points3d: np.ndarray
    tracks: np.ndarray
    said: str = PROJECTED

    @property
    def camera_ids(self) -> list[int]:
        """For each image, the id of the first image with the same camera."""
        keys = [(*size, *camera) for size, camera in zip(self.sizes, self.cameras.tolist(), strict=True)]
        first: dict[tuple[float, ...], int] = {}
        return [first.setdefault(key, i + 1) for i, key in enumerate(keys)]

    def distinct_cameras(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Image and size of each camera, once."""
        for i, camera in enumerate(self.camera_ids):
            if camera == i + 1:
                yield i, self.sizes[i]


def build(scene: Scene, cloud: PointCloud) -> ColmapModel:
    """Build the tables from measured tracks, or else from at most `MAX_POINTS` points of the cloud."""
    measured = useful_points(scene)
    if measured is not None:
        tracks = measured.tracks
        order = np.lexsort((tracks.track, tracks.frame))
        at = (tracks.frame[order], tracks.track[order], tracks.pixels[order])
        of_tracks = (measured.points, measured.colors(scene), measured.errors)
        return replace(_tables(scene, of_tracks, at, np.full(len(tracks), -1)), said=f"measured: {tracks}")
    cloud = cloud.thin(min(MAX_POINTS, max(1000, MAX_PROJECTIONS // len(scene))))
    frame, point, pixels = _observations(scene, cloud)
    several = np.bincount(point, minlength=len(cloud)) >= 2
    number = np.cumsum(several) - 1
    kept = several[point]
    error = _reprojection_error(scene, cloud, scene.original_intrinsics().double())[several]
    source = cloud.frame.numpy()[several]
    of_cloud = (cloud.points.numpy()[several], cloud.colors.numpy()[several], error)
    return _tables(scene, of_cloud, (frame[kept], number[point[kept]], pixels[kept]), source)


def _tables(
    scene: Scene,
    points: tuple[np.ndarray, np.ndarray, np.ndarray],  # [N, 3], colours [N, 3], error [N]
    observations: tuple[np.ndarray, np.ndarray, np.ndarray],  # frame [M], point [M], pixels [M, 2]; by frame
    source: np.ndarray,  # [N], the frame whose observation comes first; -1 for none
) -> ColmapModel:
    xyz, colors, error = points
    frame, point, pixels = observations
    first_of_frame = np.searchsorted(frame, np.arange(len(scene) + 1))
    points2d = np.empty(len(frame), _POINT2D)
    points2d["x"], points2d["y"], points2d["point3d_id"] = pixels[:, 0], pixels[:, 1], point + 1

    tracks = np.empty(len(frame), _TRACK_ELEMENT)
    tracks["image_id"], tracks["point2d_index"] = frame + 1, np.arange(len(frame)) - first_of_frame[frame]
    is_source = frame == source[point]
    tracks = tracks[np.lexsort((~is_source, point))]

    intrinsics = scene.original_intrinsics().double()
    points3d = np.empty(len(xyz), _POINT3D)
    points3d["id"] = np.arange(len(xyz)) + 1
    points3d["xyz"], points3d["rgb"], points3d["error"] = xyz, colors, error
    points3d["track_length"] = np.bincount(point, minlength=len(xyz))
    poses = scene.cam_from_world.double().numpy()
    return ColmapModel(
        names=scene.names,
        sizes=[transform.original_size for transform in scene.transforms],
        cameras=intrinsics.numpy()[:, [0, 1, 0, 1], [0, 1, 2, 2]],
        quaternions=np.stack([quaternion(pose[:3, :3]) for pose in poses]),
        translations=poses[:, :3, 3],
        points2d=np.split(points2d, first_of_frame[1:-1]),
        points3d=points3d,
        tracks=tracks,
    )


def _observations(scene: Scene, cloud: PointCloud) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [M], [M], [M, 2]
    """Observations of points in frames, in image pixels, sorted by frame and then by point."""
    height, width = scene.depth.shape[1:]
    kept, frames, points, pixels = scene.kept, [], [], []
    for i, transform in enumerate(scene.transforms):
        projected, z = project_points(cloud.points, scene.intrinsics[i], scene.cam_from_world[i])
        u, v = projected.unbind(-1)
        inside = (z > 0) & (u >= 0) & (v >= 0) & (u < width) & (v < height)
        column, row = u.where(inside, 0.0).long(), v.where(inside, 0.0).long()
        depth = scene.depth[i, row, column]
        agrees = inside & kept[i, row, column] & ((z - depth).abs() < DEPTH_TOLERANCE * depth)
        own = cloud.frame == i
        seen = (agrees | own).nonzero()[:, 0]
        at = torch.where(own[:, None], cloud.pixels, transform.pixels_to_original(projected))
        frames.append(np.full(len(seen), i))
        points.append(seen.numpy())
        pixels.append(at[seen].double().numpy())
    return np.concatenate(frames), np.concatenate(points), np.concatenate(pixels)


def _reprojection_error(
    scene: Scene,
    cloud: PointCloud,
    intrinsics: torch.Tensor,  # [S, 3, 3], original pixels
) -> np.ndarray:  # [N]
    """Distance of every point's projection from the pixel that it came from, in pixels of the image."""
    error = torch.zeros(len(cloud), dtype=torch.float64)
    for i, pose in enumerate(scene.cam_from_world.double()):
        own = cloud.frame == i
        projected, _ = project_points(cloud.points[own].double(), intrinsics[i], pose)
        error[own] = (projected - cloud.pixels[own]).norm(dim=-1)
    return error.numpy()


def _interleave(points: np.ndarray, tracks: np.ndarray) -> bytes:
    """Append each point's track to its record, for all points at once."""
    lengths = points["track_length"].astype(np.int64)
    track_bytes, head = tracks.dtype.itemsize, points.dtype.itemsize
    before = np.cumsum(lengths) - lengths
    starts = np.arange(len(points)) * head + before * track_bytes
    out = np.empty(len(points) * head + len(tracks) * track_bytes, np.uint8)
    is_head = np.zeros(len(out), bool)
    is_head[(starts[:, None] + np.arange(head)).ravel()] = True
    out[is_head] = points.view(np.uint8).ravel()
    out[~is_head] = tracks.view(np.uint8).ravel()
    return out.tobytes()


def _put(file, dtype: str, values) -> None:
    file.write(np.asarray(values, dtype).tobytes())


def _join(values) -> str:
    return " ".join(map(repr, values.tolist() if isinstance(values, np.ndarray) else values))
