"""How papers compare point clouds: alignment, cropping and sampling around `accuracy_completeness`, by name.

Protocols with ``inputs = "maps"`` score predicted against true point maps of the same pixels, ``"clouds"`` point sets.
All report the keys of `accuracy_completeness` that the protocol defines, the applied alignment, and the number of
points scored. Means over scenes are always unweighted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from geoaccel.alignment import as_float64, umeyama
from geoaccel.cameras import invert_rigid, transform_points
from geoaccel.errors import UserError
from geoaccel.eval.metrics.geometry import as_poses, median
from geoaccel.eval.metrics.points import (
    Engine,
    accuracy_completeness,
    as_cloud,
    distance_scores,
    icp,
    nearest_distances,
    random_subset,
    voxel_downsample,
)


@dataclass(frozen=True)
class PointProtocol:
    """A named way of scoring points; ``score`` has the arguments that the protocol needs."""

    name: str
    inputs: ClassVar[Literal["maps", "clouds"]]
    thresholds: tuple[float, ...] = (0.05,)
    engine: Engine = "scipy"


@dataclass(frozen=True)
class MapProtocol(PointProtocol):
    """A protocol that scores point maps, all of one size.

    Nearest distances depend on how densely a surface is sampled, so a protocol fixes the size: depth, intrinsics and
    predictions are resized to ``width`` pixels, the height to the nearest multiple of ``patch_size``, before
    unprojection. Narrower ground truth keeps its size.
    """

    inputs: ClassVar[Literal["maps", "clouds"]] = "maps"
    score: ClassVar[Callable[..., dict[str, float]]]
    width: int = 518
    patch_size: int = 14

    def size_of(
        self,
        size: tuple[int, int],  # height, width
    ) -> tuple[int, int]:
        """Height and width at which ground truth of this size is scored."""
        height, width = size
        if width <= self.width:
            return size
        patches = round(height * self.width / width / self.patch_size)
        return max(1, patches) * self.patch_size, self.width


@dataclass(frozen=True)
class Pi3Points(MapProtocol):
    """pi3's multi-view point maps (7-Scenes, Neural RGB-D, DTU, ETH3D).

    Similarity from corresponding valid pixels, then ICP, then accuracy, completeness and normal consistency without
    any cropping, sampling or clipping. ICP pairs points up to 0.1 (metres); DTU is in millimetres and uses 100
    (``pi3-points-dtu``). Both sides are 518 pixels wide: 640 x 480 becomes 518 x 392, ETH3D's 6200 x 4130 becomes
    518 x 350, and the prediction must be resampled to that beforehand.
    Differs from pi3's script: nearest-neighbour depth at the new pixel's centre, and a separate scale for each axis of
    the intrinsics, where the script uses the larger one (1 % more at 640 x 480) for both.
    """

    name: str = "pi3-points"
    icp_distance: float = 0.1

    def score(
        self,
        pred: Tensor,  # [S, H, W, 3], any world frame and scale
        gt: Tensor,  # [S, H, W, 3]
        valid: Tensor,  # [S, H, W], bool
    ) -> dict[str, float]:
        """Score one scene, in the unit of the ground truth."""
        pred, gt, valid = _maps(pred, gt, valid)
        source, target = as_cloud(pred[valid], "pred"), as_cloud(gt[valid], "gt")
        similarity = umeyama(source, target)
        scores = _score_after_icp(similarity.apply_points(source), target, self, self.icp_distance)
        return scores | {"alignment_scale": float(similarity.scale)}


@dataclass(frozen=True)
class Cut3rCrop(MapProtocol):
    """The CUT3R line's point maps (CUT3R, StreamVGGT, FastVGGT, LiteVGGT on 7-Scenes and Neural RGB-D).

    Maps are 518 pixels wide, 518 x 392 on both data sets, as in FastVGGT and LiteVGGT.
    Differs from `pi3-points`: no similarity. Both sides are in the frame of their first camera, are shifted along z
    by their median depth, and the prediction is scaled by the ratio of the median distances to the median point
    (predicted scale clamped to 1e-3 ... 1e3). Then the centre 224 x 224 of every view, at most 999,999 random points
    of each side, and ICP with 0.1. A wrong first camera or a wrong depth offset costs more here than after Umeyama.
    Scale and shift come from whole views; a view smaller than the crop is used whole.
    """

    name: str = "cut3r-crop"
    icp_distance: float = 0.1
    crop: int = 224
    max_points: int = 999_999
    seed: int = 0

    def score(
        self,
        pred: Tensor,  # [S, H, W, 3]
        gt: Tensor,  # [S, H, W, 3]
        valid: Tensor,  # [S, H, W], bool
        *,
        pred_first_cam_from_world: Tensor | None = None,  # [3|4, 4]
        gt_first_cam_from_world: Tensor | None = None,  # [3|4, 4]
    ) -> dict[str, float]:
        """Score one scene, in the unit of the ground truth.

        Args:
            pred: Predicted points, in the frame of the predicted first camera or with its pose given.
            gt: True points, in the frame of the true first camera or with its pose given.
            valid: Pixels with a true point.
            pred_first_cam_from_world: Pose of the predicted first camera.
            gt_first_cam_from_world: Pose of the true first camera.
        """
        pred, gt, valid = _maps(pred, gt, valid)
        pred, gt = _into_camera(pred, pred_first_cam_from_world), _into_camera(gt, gt_first_cam_from_world)
        as_cloud(pred[valid], "pred")
        pred_shift, pred_size = _depth_and_size(pred[valid])
        gt_shift, gt_size = _depth_and_size(gt[valid])
        scale = gt_size / pred_size.clamp(1e-3, 1e3)
        pred, gt = (pred - pred_shift) * scale, gt - gt_shift
        rows, columns = (_center(size, self.crop) for size in valid.shape[1:])
        valid = valid[:, rows, columns]
        source, target = (
            random_subset(points[:, rows, columns][valid], self.max_points, seed=self.seed) for points in (pred, gt)
        )
        return _score_after_icp(source, target, self, self.icp_distance) | {"alignment_scale": float(scale)}


@dataclass(frozen=True)
class FastVggtScannet(PointProtocol):
    """FastVGGT's ScanNet-50 chamfer distance (also LiteVGGT, TurboVGGT). Only for comparison with those tables.

    Points with depth confidence of at least 3 are in the frame of the first predicted camera and are moved by the first
    true pose; the clouds' bounding boxes are then matched in diagonal and centre. No rotation, no ICP. Up to 100,000
    random points each, 5 cm voxels, distances clipped at 0.5 m; ``chamfer_sum`` is the published CD, at most 1.
    One outlier changes the scale, so removing points can "improve" the number, and beyond 0.5 m all errors are equal.
    The threshold is for VGGT's confidence, 1 + exp(x), which is at least 1. On another scale, such as pi3's sigmoid, 3
    is meaningless: there the 20 % least confident pixels are dropped, the alternative that VGGT's authors suggest, and
    such a row is only roughly comparable with published ones. ``kept_share`` is the fraction of pixels kept.
    Its trajectory error is `geoaccel.eval.metrics.trajectories.trajectory_errors` with ``fastvggt_compat``.
    """

    name: str = "fastvggt-scannet"
    inputs: ClassVar[Literal["maps", "clouds"]] = "clouds"
    conf_threshold: float = 3.0
    drop_share: float = 0.2
    max_points: int = 100_000
    voxel_size: float = 0.05
    clip_distance: float = 0.5
    seed: int = 33

    def keep(
        self,
        conf: Tensor,  # [...]
    ) -> Tensor:  # [...], bool
        """Pixels that are confident enough.

        Raises:
            ValueError: If there are none.
        """
        if not (conf >= 1).all():
            return surest(conf, self.drop_share)
        kept = conf >= self.conf_threshold
        if not kept.any():
            raise UserError(
                f"{self.name} keeps confidences of at least {self.conf_threshold:g}, the highest here is "
                f"{float(conf.max()):.3g}; turn off point scores for this model with data.protocol.points=null"
            )
        return kept

    def score(
        self,
        pred: Tensor,  # [N, 3], already filtered by confidence
        gt: Tensor,  # [M, 3], world frame
        *,
        first_cam_from_world: Tensor | None = None,  # [3|4, 4], the true pose of frame 0
    ) -> dict[str, float]:
        """Score one scene, in metres.

        Args:
            pred: Predicted points in the frame of the first camera, or in the world if no pose is given.
            gt: Vertices of the scanned mesh.
            first_cam_from_world: True pose of the first frame.
        """
        pred, gt = as_cloud(pred, "pred"), as_cloud(gt, "gt")
        if first_cam_from_world is not None:
            pred = transform_points(invert_rigid(as_poses(first_cam_from_world[None])[0]), pred)
        (pred_low, pred_high), (gt_low, gt_high) = ((c.amin(dim=0), c.amax(dim=0)) for c in (pred, gt))
        size = (pred_high - pred_low).norm()
        scale = (gt_high - gt_low).norm() / size if size >= 1e-8 else torch.ones(())
        pred = (pred - (pred_low + pred_high) / 2) * scale + (gt_low + gt_high) / 2
        pred, gt = (voxel_downsample(self._subset(cloud), self.voxel_size) for cloud in (pred, gt))
        scores = accuracy_completeness(
            pred, gt, thresholds=self.thresholds, normals=False, clip_distance=self.clip_distance, engine=self.engine
        )
        return scores | {"alignment_scale": float(scale), "num_pred": len(pred), "num_gt": len(gt)}

    def _subset(self, cloud: Tensor) -> Tensor:
        if len(cloud) <= self.max_points:
            return cloud
        draw = np.random.RandomState(self.seed)  # as in the script, without the global state
        return cloud[torch.from_numpy(draw.choice(len(cloud), self.max_points, replace=False))]


@dataclass(frozen=True)
class DtuMvs(PointProtocol):
    """The DTU multi-view stereo benchmark, in millimetres: accuracy, completeness, and their mean, "Overall".

    The prediction is thinned to 0.2 mm. Accuracy is from predicted points inside the observation mask to the whole
    scan, completeness from scanned points above the ground plane to all predicted ones in the box and its margin;
    distances of 20 mm and more are left out of both means. ``chamfer_mean`` is Overall.
    Differs from the official script: thinning takes the mean of each 0.2 mm voxel, which needs no random order.
    The filtering and fusion of the depth maps beforehand affect the score more than the model does.
    """

    name: str = "dtu-mvs"
    inputs: ClassVar[Literal["maps", "clouds"]] = "clouds"
    thresholds: tuple[float, ...] = ()
    voxel_size: float = 0.2
    drop_beyond: float = 20.0
    margin: float = 60.0

    def score(
        self,
        pred: Tensor,  # [N, 3], the frame of the scans
        gt: Tensor,  # [M, 3]
        *,
        obs_mask: Tensor | None = None,  # [X, Y, Z], bool: ObsMask of ObsMaskN_10.mat
        box: Tensor | None = None,  # [2, 3]: BB of that file, lower and upper corner of the mask
        resolution: float = 1.0,
        ground_plane: Tensor | None = None,  # [4]: P of PlaneN.mat
    ) -> dict[str, float]:
        """Score one scan.

        Args:
            pred: Fused points.
            gt: Points of the structured-light scan.
            obs_mask: Region observed by the scanner, within ``box``. Without both, all predicted points count.
            resolution: Size of a mask cell: Res of that file.
            ground_plane: Only scanned points on its positive side count for completeness. Without it, all count.

        Raises:
            ValueError: If nothing is left within the mask or within 20 mm.
        """
        pred, gt = voxel_downsample(as_cloud(pred, "pred"), self.voxel_size), as_cloud(gt, "gt")
        seen = pred
        if (obs_mask is None) != (box is None):
            raise ValueError("only one of obs_mask and box was given; give both or neither")
        if obs_mask is not None and box is not None:
            low, high = as_float64(box)
            pred = pred[((pred >= low - self.margin) & (pred < high + 2 * self.margin)).all(dim=-1)]
            cell = ((pred - low) / resolution).round().long()
            inside = ((cell >= 0) & (cell < torch.tensor(obs_mask.shape))).all(dim=-1)
            x, y, z = cell[inside].unbind(-1)
            seen = pred[inside][torch.as_tensor(obs_mask)[x, y, z].bool()]
        to_gt, _ = nearest_distances(as_cloud(seen, "pred inside the mask"), gt, engine=self.engine)
        if ground_plane is not None:
            plane = as_float64(ground_plane).flatten()
            gt = as_cloud(gt[gt @ plane[:3] + plane[3] > 0], "gt above the ground plane")
        to_pred, _ = nearest_distances(gt, pred, engine=self.engine)
        to_gt, to_pred = (distance[distance < self.drop_beyond] for distance in (to_gt, to_pred))
        if len(to_gt) == 0 or len(to_pred) == 0:
            raise UserError(f"no predicted point is within {self.drop_beyond} mm of the scan: check frame and unit")
        return distance_scores(to_gt, to_pred) | {"num_pred": len(to_gt), "num_gt": len(to_pred)}


PROTOCOLS: dict[str, PointProtocol] = {
    protocol.name: protocol
    for protocol in (
        Pi3Points(),
        Pi3Points(name="pi3-points-dtu", icp_distance=100.0, thresholds=()),
        Cut3rCrop(),
        FastVggtScannet(),
        DtuMvs(),
    )
}


def surest(
    conf: Tensor,  # [...]
    drop_share: float,
) -> Tensor:  # [...], bool
    """All but the least confident pixels, on any scale of confidence; a share of 0.2 drops a fifth."""
    some = conf.flatten()[:: max(1, conf.numel() // 1_000_000)]  # torch.quantile is limited to 16 million values
    return conf >= torch.quantile(some, drop_share)


def _score_after_icp(source: Tensor, target: Tensor, protocol: PointProtocol, distance: float) -> dict[str, float]:
    registration = icp(source, target, max_distance=distance, engine=protocol.engine)
    source = transform_points(registration.transform, source)
    scores = accuracy_completeness(source, target, thresholds=protocol.thresholds, engine=protocol.engine)
    return scores | {"icp_fitness": registration.fitness, "num_pred": len(source), "num_gt": len(target)}


def _maps(pred: Tensor, gt: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pred, gt = as_float64(pred), as_float64(gt)
    valid = torch.as_tensor(valid).to(device="cpu", dtype=torch.bool)
    if pred.shape != gt.shape or pred.ndim != 4 or pred.shape[-1] != 3 or valid.shape != gt.shape[:-1]:
        raise ValueError(
            "expected point maps [S, H, W, 3] of equal size and a mask [S, H, W], got "
            f"{list(pred.shape)}, {list(gt.shape)}, {list(valid.shape)}: resample the prediction"
        )
    valid = valid & gt.isfinite().all(dim=-1)
    if not valid.any():
        raise UserError("no pixel has a valid true point")
    return pred, gt, valid


def _into_camera(points: Tensor, cam_from_world: Tensor | None) -> Tensor:  # [S, H, W, 3]
    if cam_from_world is None:
        return points
    pose = as_poses(torch.as_tensor(cam_from_world)[None])[0]
    return transform_points(pose, points.flatten(0, -2)).reshape(points.shape)


def _depth_and_size(points: Tensor) -> tuple[Tensor, Tensor]:  # [3], []
    shift = torch.zeros(3, dtype=torch.float64)
    shift[2] = median(points[:, 2])
    center = median(points.T)
    return shift, median((points - center).norm(dim=-1))


def _center(size: int, crop: int) -> slice:
    start = max(size // 2 - crop // 2, 0)
    return slice(start, start + crop)
