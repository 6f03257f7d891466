"""Point cloud errors: accuracy, completeness, chamfer, normal consistency, F-score, and the alignments before them.

    accuracy_completeness(pred, gt, thresholds=(0.05,))      # clouds [N, 3] and [M, 3] in the same frame and unit

Accuracy is the distance from each predicted point to the nearest true one, completeness the other way round. Named
protocols, which also align, crop and sample, are in `geoaccel.eval.metrics.point_protocols`.

Trees, normals and ICP are SciPy's and our own by default, and Open3D's, which the papers used, with
``engine="open3d"``. Both give the same numbers (tested). Measured on 1M points a side, CPU seconds: search 1.6 against
2.3, normals 6.3 against 11.1; and SciPy needs no system libraries, so one result comes out on every machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from geoaccel.alignment import as_float64, umeyama
from geoaccel.errors import MissingPackage, UserError
from geoaccel.eval.metrics.geometry import median
from geoaccel.open3d_loader import load_open3d

Engine = Literal["scipy", "open3d"]


def accuracy_completeness(
    pred: Tensor,  # [N, 3]
    gt: Tensor,  # [M, 3], the same frame and unit
    *,
    thresholds: Sequence[float] = (0.05,),
    normals: bool = True,
    clip_distance: float = math.inf,
    pred_normals: Tensor | None = None,  # [N, 3], unit length
    gt_normals: Tensor | None = None,  # [M, 3], unit length
    engine: Engine = "scipy",
) -> dict[str, float]:
    """Compare two point clouds without alignment, which is a separate step.

    Args:
        pred: Predicted points.
        gt: True points.
        thresholds: Distances at which precision, recall and F-score are computed, in the unit of the points.
        normals: Also compare surface normals, which takes most of the time.
        clip_distance: Larger distances count as this (a few protocols clip; it hides outliers).
        pred_normals: Known normals of the prediction; estimated from 30 neighbours by default.
        gt_normals: Known normals of the ground truth; estimated by default.
        engine: Library that finds nearest neighbours and estimates normals.

    Returns:
        ``accuracy_mean``, ``accuracy_median``, ``completeness_mean``, ``completeness_median``; ``chamfer_sum`` and
        ``chamfer_mean``, the sum and the mean of the two means (papers call either "chamfer");
        ``precision_0.05``, ``recall_0.05``, ``fscore_0.05`` for each threshold (distances below it).
        With normals, the absolute cosine at nearest neighbours: ``normal_consistency_accuracy`` at predicted points,
        ``normal_consistency_completeness`` at true points, ``normal_consistency`` the mean of both, each also with
        ``_median``; NaN if a cloud has fewer than 3 points, and so no normals.

    Raises:
        ValueError: If a cloud is empty, is not [N, 3], or has NaN or infinite coordinates.
    """
    pred, gt = as_cloud(pred, "pred"), as_cloud(gt, "gt")
    to_gt, gt_index = nearest_distances(pred, gt, engine=engine)
    to_pred, pred_index = nearest_distances(gt, pred, engine=engine)
    scores = distance_scores(to_gt.clamp(max=clip_distance), to_pred.clamp(max=clip_distance))
    for threshold in thresholds:
        precision, recall = (float((d < threshold).double().mean()) for d in (to_gt, to_pred))
        fscore = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
        scores |= {f"precision_{threshold:g}": precision, f"recall_{threshold:g}": recall}
        scores[f"fscore_{threshold:g}"] = fscore
    if normals:
        pred_normals = _normals_of(pred, pred_normals, "pred_normals", engine)
        gt_normals = _normals_of(gt, gt_normals, "gt_normals", engine)
        both_ways = {
            "accuracy": (pred_normals * gt_normals[gt_index]).sum(dim=-1).abs(),
            "completeness": (gt_normals * pred_normals[pred_index]).sum(dim=-1).abs(),
        }
        for suffix, reduce in (("", torch.mean), ("_median", median)):
            values = {way: float(reduce(cosine)) for way, cosine in both_ways.items()}
            scores |= {f"normal_consistency_{way}{suffix}": value for way, value in values.items()}
            scores[f"normal_consistency{suffix}"] = sum(values.values()) / 2
    return scores


def distance_scores(
    to_gt: Tensor,  # [N], from predicted points
    to_pred: Tensor,  # [M], from true points
) -> dict[str, float]:
    """Means and medians of accuracy and completeness, and chamfer both ways it is defined."""
    accuracy, completeness = float(to_gt.mean()), float(to_pred.mean())
    return {
        "accuracy_mean": accuracy,
        "accuracy_median": float(median(to_gt)),
        "completeness_mean": completeness,
        "completeness_median": float(median(to_pred)),
        "chamfer_sum": accuracy + completeness,
        "chamfer_mean": (accuracy + completeness) / 2,
    }


def as_cloud(
    points: Tensor,  # [N, 3]
    name: str = "points",
) -> Tensor:  # [N, 3], float64
    """Check a point cloud and convert it to float64."""
    points = as_float64(points)
    if points.ndim != 2 or points.shape[-1] != 3:
        raise ValueError(f"{name} must be [N, 3], got {list(points.shape)}")
    if len(points) == 0:
        raise UserError(f"{name} has no points: none passed the mask or the confidence threshold")
    if not points.isfinite().all():
        count = int((~points.isfinite()).any(dim=-1).sum())
        raise UserError(f"{name} has NaN or infinite coordinates in {count} of {len(points)} points: mask them out")
    return points.contiguous()


def nearest_distances(
    query: Tensor,  # [N, 3]
    reference: Tensor,  # [M, 3]
    *,
    engine: Engine = "scipy",
) -> tuple[Tensor, Tensor]:  # [N] float64, [N] int64
    """Exact distance from each query point to its nearest reference point, and that point's index.

    Args:
        query: Query points.
        reference: Points to search.
        engine: Library for the search.
    """
    query, reference = as_cloud(query, "query"), as_cloud(reference, "reference")
    search = _search_open3d if _uses_open3d(engine) else _search_scipy
    index = torch.from_numpy(search(query.numpy(), reference.numpy()))
    return (query - reference[index]).norm(dim=-1), index


def estimate_normals(
    points: Tensor,  # [N, 3]
    *,
    neighbors: int = 30,
    engine: Engine = "scipy",
) -> Tensor:  # [N, 3], unit length, sign arbitrary
    """Surface normals: the direction of least variance among a point and its nearest neighbours.

    The default is Open3D's, which all published normal consistencies use.
    """
    cloud = as_cloud(points).numpy()
    if len(cloud) < 3:
        raise UserError(f"normals need at least 3 points, got {len(cloud)}")
    neighbors = min(neighbors, len(cloud))
    if _uses_open3d(engine):
        geometry = _open3d_cloud(cloud)
        geometry.estimate_normals(load_open3d().geometry.KDTreeSearchParamKNN(neighbors))
        return torch.from_numpy(np.array(geometry.normals))
    tree = _kd_tree(cloud)
    normals = np.empty_like(cloud)

    def work(chosen: np.ndarray) -> None:
        near = cloud[tree.query(cloud[chosen], neighbors)[1]]
        near -= near.mean(axis=1, keepdims=True)
        normals[chosen] = np.linalg.eigh(near.transpose(0, 2, 1) @ near)[1][:, :, 0]

    _in_threads(work, np.asarray(tree.indices))  # in the tree's order neighbours are close in memory: twice as fast
    return torch.from_numpy(normals)


def voxel_downsample(
    points: Tensor,  # [N, 3]
    voxel_size: float,
) -> Tensor:  # [M, 3]
    """Replace the points of each voxel by their mean; the grid starts half a voxel below the minimum, as in Open3D."""
    points = as_cloud(points)
    if voxel_size <= 0:
        raise UserError(f"voxel_size={voxel_size} must be positive")
    cell = ((points - points.amin(dim=0)) / voxel_size + 0.5).floor()
    extent = cell.amax(dim=0) + 1
    if extent.prod() >= 2**63:
        raise UserError(f"voxel_size={voxel_size} is too small for a cloud of {extent.tolist()} voxels")
    cell, extent = cell.long(), extent.long()
    key = (cell[:, 0] * extent[1] + cell[:, 1]) * extent[2] + cell[:, 2]
    _, voxel, counts = torch.unique(key, return_inverse=True, return_counts=True)
    # Sums of offsets from the corner: no loss of precision far from the origin.
    corner = points.amin(dim=0)
    total = torch.zeros(len(counts), 3, dtype=torch.float64).index_add_(0, voxel, points - corner)
    return total / counts[:, None] + corner


def random_subset(
    points: Tensor,  # [N, ...]
    count: int,
    *,
    seed: int = 0,
) -> Tensor:  # [min(N, count), ...]
    """At most ``count`` rows, drawn without replacement by a separate generator; all rows, in order, if few."""
    if len(points) <= count:
        return points
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]]


@dataclass(frozen=True)
class IcpResult:
    """Outcome of `icp`."""

    transform: Tensor  # [4, 4], takes the source to the target
    fitness: float  # fraction of source points with a target point within the distance
    inlier_rmse: float  # root mean square distance of these


def icp(
    source: Tensor,  # [N, 3]
    target: Tensor,  # [M, 3]
    *,
    max_distance: float,
    max_iterations: int = 30,
    tolerance: float = 1e-6,
    engine: Engine = "scipy",
) -> IcpResult:
    """Rigid point-to-point ICP from the identity, with Open3D's defaults and stopping rule.

    Args:
        source: Points to be moved.
        target: Points that stay.
        max_distance: Pairs farther apart are ignored.
        max_iterations: Upper limit of the steps.
        tolerance: Stop when fitness and inlier RMSE both change by less.
        engine: Library for ICP.
    """
    source, target = as_cloud(source, "source"), as_cloud(target, "target")
    if _uses_open3d(engine):
        registration = load_open3d().pipelines.registration
        result = registration.registration_icp(
            _open3d_cloud(source.numpy()),
            _open3d_cloud(target.numpy()),
            max_distance,
            np.eye(4),
            registration.TransformationEstimationPointToPoint(),
            registration.ICPConvergenceCriteria(tolerance, tolerance, max_iterations),
        )
        return IcpResult(torch.from_numpy(np.array(result.transformation)), result.fitness, result.inlier_rmse)
    tree = _kd_tree(target.numpy())
    order = torch.from_numpy(np.asarray(_kd_tree(source.numpy()).indices))
    source = source[order]  # neighbours in order: the search is twice as fast

    def match(moved: Tensor) -> tuple[Tensor, Tensor, float, float]:
        distance, index = tree.query(moved.numpy(), distance_upper_bound=max_distance, workers=-1)
        inlier = torch.from_numpy(np.isfinite(distance))
        rmse = float(np.sqrt(np.mean(distance[inlier.numpy()] ** 2))) if inlier.any() else 0.0
        return inlier, torch.from_numpy(index)[inlier], float(inlier.double().mean()), rmse

    transform, moved = torch.eye(4, dtype=torch.float64), source
    inlier, index, fitness, rmse = match(moved)
    for _ in range(max_iterations):
        if not inlier.any():
            break
        step = umeyama(moved[inlier], target[index], with_scale=False)
        transform, moved = step.matrix() @ transform, step.apply_points(moved)
        before = fitness, rmse
        inlier, index, fitness, rmse = match(moved)
        if abs(fitness - before[0]) < tolerance and abs(rmse - before[1]) < tolerance:
            break
    return IcpResult(transform, fitness, rmse)


def _normals_of(cloud: Tensor, given: Tensor | None, name: str, engine: Engine) -> Tensor:
    if given is None:
        return estimate_normals(cloud, engine=engine) if len(cloud) >= 3 else torch.full_like(cloud, math.nan)
    given = as_float64(given)
    if given.shape != cloud.shape:
        raise ValueError(f"{name} {list(given.shape)} must match its points {list(cloud.shape)}")
    return given


def _uses_open3d(engine: str) -> bool:
    if engine not in ("scipy", "open3d"):
        raise UserError(f"engine={engine!r} is unknown. Known: scipy, open3d")
    return engine == "open3d"


def _open3d_cloud(points: np.ndarray) -> Any:
    open3d = load_open3d()
    return open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))


def _search_open3d(query: np.ndarray, reference: np.ndarray) -> np.ndarray:  # [N] int64
    core = load_open3d().core
    search = core.nns.NearestNeighborSearch(core.Tensor.from_numpy(reference))
    search.knn_index()
    index, _ = search.knn_search(core.Tensor.from_numpy(query), 1)
    return index.numpy()[:, 0].astype(np.int64)


def _search_scipy(query: np.ndarray, reference: np.ndarray) -> np.ndarray:  # [N] int64
    # SciPy's default cells fit the points tightly; searching them takes six times longer if the clouds are apart.
    tree = _kd_tree(reference, compact_nodes=False)
    index = np.empty(len(query), dtype=np.int64)

    def work(chosen: np.ndarray) -> None:
        index[chosen] = tree.query(query[chosen])[1]

    _in_threads(work, np.asarray(_kd_tree(query).indices))
    return index


def _kd_tree(points: np.ndarray, **options: Any) -> Any:
    return load_scipy().cKDTree(points, balanced_tree=False, **options)


def load_scipy() -> ModuleType:
    """SciPy's searches.

    Raises:
        MissingPackage: If they cannot be imported.
    """
    try:
        import scipy.spatial
    except ImportError as error:
        raise MissingPackage(
            f"SciPy, which point metrics need, cannot be imported ({error}): pip install 'geoaccel[eval]'"
        ) from error
    return scipy.spatial


def _in_threads(work: Callable[[np.ndarray], None], order: np.ndarray, chunk: int = 16384) -> None:
    """Run ``work`` on chunks of an index list, on all cores."""
    chunks = [order[start : start + chunk] for start in range(0, len(order), chunk)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, chunks))
