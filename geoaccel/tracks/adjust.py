"""Bundle adjustment of cameras and points on measured tracks, by pycolmap (Ceres)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from geoaccel.tracks.features import quiet, require_pycolmap
from geoaccel.tracks.table import Tracks
from geoaccel.tracks.triangulate import Cameras

Lens = Literal["fixed", "shared", "free"]
LOSS_PIXELS = 1.0
ITERATIONS = 100
FAR = 1e4
ENOUGH = 80  # observations from which the rotation of an image is not constrained


@dataclass(frozen=True, eq=False)
class Prior:
    """Prior on the positions and rotations of cameras.

    Rotations of cameras with few observations are constrained by fixed far points that only they see. The robust loss
    discounts these if tracks contradict them. They also constrain the focal lengths of these cameras.

    Attributes:
        cameras: As predicted.
        spread: Standard deviation of each coordinate of a centre, relative to one pixel for an observation.
    """

    cameras: Cameras
    spread: float

    def far_points(self, image: int) -> tuple[np.ndarray, np.ndarray]:  # [2, 2], [2, 3]
        """Pixels of one image, and far points that project to them."""
        height, width = self.cameras.sizes[image]
        pixels = np.array([(0.25 * width, 0.25 * height), (0.75 * width, 0.75 * height)])
        rays = np.c_[(pixels - self.cameras.centre[image]) / self.cameras.focal[image], np.ones(len(pixels))]
        pose = self.cameras.cam_from_world[image]
        return pixels, (FAR * self.spread * rays - pose[:3, 3]) @ pose[:3, :3]


def adjust(
    cameras: Cameras,
    tracks: Tracks,
    points: np.ndarray,  # [N, 3]
    lens: Lens,
    prior: Prior | None = None,
) -> tuple[Cameras, np.ndarray]:  # cameras, [N, 3]
    """Cameras and points that minimise the robust reprojection error. Images without a track are not changed.

    Args:
        cameras: Initial cameras.
        tracks: Measured tracks.
        points: Initial points.
        lens: Focal lengths are ``fixed``, one ``shared`` by all images, or ``free`` in each.
        prior: Constrains cameras with few observations; without it two cameras fix the gauge.

    Raises:
        UserError: pycolmap is not installed.
    """
    pycolmap: Any = require_pycolmap("bundle adjustment")
    with quiet():
        model, far = _model(pycolmap, cameras, tracks, points, lens, prior)
        options = pycolmap.BundleAdjustmentOptions()
        options.refine_focal_length, options.refine_extra_params = lens != "fixed", False
        options.print_summary = False
        options.ceres.loss_function_type = pycolmap.LossFunctionType.CAUCHY
        options.ceres.loss_function_scale = LOSS_PIXELS
        options.ceres.solver_options.max_num_iterations = ITERATIONS
        options.ceres.solver_options.function_tolerance = 1e-7
        config = pycolmap.BundleAdjustmentConfig()
        for image in np.unique(tracks.frame):
            config.add_image(int(image) + 1)
        for point in far:
            config.add_constant_point(point)
        if prior is None:
            config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
            pycolmap.create_default_bundle_adjuster(options, config, model).solve()
        else:
            priors = [_position(pycolmap, model, image, prior) for image in np.unique(tracks.frame).tolist()]
            kind = pycolmap.PosePriorBundleAdjustmentOptions()
            pycolmap.create_pose_prior_bundle_adjuster(options, kind, config, priors, model).solve()
    return _cameras(cameras, np.unique(tracks.frame), model), np.array(
        [model.points3D[n + 1].xyz for n in range(len(tracks))]
    )


def _model(
    pycolmap: Any, cameras: Cameras, tracks: Tracks, points: np.ndarray, lens: Lens, prior: Prior | None
) -> tuple[Any, list[int]]:
    """COLMAP's reconstruction object, and the fixed points; image, camera and point i have the id i + 1."""
    model = pycolmap.Reconstruction()
    place = np.empty(len(tracks.frame), np.int64)
    far: list[tuple[int, int, np.ndarray]] = []
    for i, ((height, width), own) in enumerate(zip(cameras.sizes, tracks.of_each(len(cameras.sizes)), strict=True)):
        camera = 1 if lens == "shared" else i + 1
        if camera == i + 1:
            model.add_camera_with_trivial_rig(
                pycolmap.Camera(**_lens(cameras, i), width=width, height=height, camera_id=camera)
            )
        place[own] = np.arange(len(own))
        pixels = tracks.pixels[own]
        if prior is not None and 0 < len(own) < ENOUGH:
            more, away = prior.far_points(i)
            # COLMAP needs two observations per point; both are in this image.
            far += [(i + 1, len(own) + 2 * n, xyz) for n, xyz in enumerate(away)]
            pixels = np.concatenate([pixels, np.repeat(more, 2, axis=0)])
        image = pycolmap.Image(name=str(i), keypoints=pixels, camera_id=camera, image_id=i + 1)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(cameras.cam_from_world[i, :3]))
    starts = np.searchsorted(tracks.track, np.arange(len(tracks) + 1)).tolist()
    element, frames, indices = pycolmap.TrackElement, (tracks.frame + 1).tolist(), place.tolist()
    black = np.zeros(3, np.uint8)
    for n, xyz in enumerate(points):
        seen = [element(frames[m], indices[m]) for m in range(starts[n], starts[n + 1])]
        model.add_point3D(xyz, pycolmap.Track(seen), black)
    twice = [(pycolmap.Track([element(i, n), element(i, n + 1)]), xyz) for i, n, xyz in far]
    return model, [model.add_point3D(xyz, track, black) for track, xyz in twice]


def _lens(cameras: Cameras, i: int) -> dict[str, Any]:
    """COLMAP's camera model: square pixels stay square."""
    (fx, fy), centre = cameras.focal[i].tolist(), cameras.centre[i].tolist()
    if abs(fx - fy) < 1e-6 * fx:
        return {"model": "SIMPLE_PINHOLE", "params": [fx, *centre]}
    return {"model": "PINHOLE", "params": [fx, fy, *centre]}


def _cameras(before: Cameras, adjusted: np.ndarray, model: Any) -> Cameras:
    poses = before.cam_from_world.copy()
    focal = before.focal.copy()
    for i in adjusted.tolist():
        image = model.images[i + 1]
        poses[i, :3] = image.cam_from_world().matrix()
        camera = model.cameras[image.camera_id]
        focal[i] = camera.focal_length_x, camera.focal_length_y
    return replace(before, cam_from_world=poses, focal=focal)


def _position(pycolmap: Any, model: Any, image: int, prior: Prior) -> Any:
    found = pycolmap.PosePrior()
    found.pose_prior_id = image + 1
    found.corr_data_id = model.images[image + 1].data_id
    found.position, found.position_covariance = prior.cameras.centres()[image], prior.spread**2 * np.eye(3)
    found.coordinate_system = pycolmap.PosePriorCoordinateSystem.CARTESIAN
    return found
