"""Score one scene with exact ground truth: poses, depth, fused points, confidence."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.cameras import unproject_depth
from geoaccel.eval.confidence import confidence_rank_correlation
from geoaccel.eval.data.synthetic import SceneBatch
from geoaccel.eval.depth import depth_errors
from geoaccel.eval.geometry import median, umeyama
from geoaccel.eval.points import accuracy_completeness
from geoaccel.eval.pose import auc, relative_pose_errors

CLOUD_POINTS = 20_000


def score_scene(geometry: Geometry, scene: SceneBatch, *, points: bool = True) -> dict[str, float]:
    """Compare the prediction of one scene (B = 1) with its ground truth.

    Args:
        geometry: What the model predicted.
        scene: The scene that it saw.
        points: Also score the fused cloud and the confidence, which needs SciPy.

    Returns:
        ``auc_3``, ``auc_5``, ``auc_15``, ``auc_30`` of the larger angle error over all pairs (VGGT's CO3D protocol);
        ``rotation_median_deg``; ``depth_abs_rel`` and ``depth_delta_1_25`` after one scale for the scene; with
        ``points``, ``chamfer`` (mean of both directions after a similarity fitted to corresponding pixels, relative
        to the scene's size) and ``conf_spearman`` (confidence against the negative relative depth error).
    """
    valid = scene.valid[0].cpu()
    rotation, translation = relative_pose_errors(geometry.cam_from_world[0].cpu(), scene.cam_from_world[0].cpu())
    worse = torch.maximum(rotation, translation)
    scores = {f"auc_{threshold}": auc(worse, threshold) for threshold in (3, 5, 15, 30)}
    scores["rotation_median_deg"] = float(median(rotation))
    depth, true_depth = geometry.depth[0].cpu(), scene.depth[0].cpu()
    errors = depth_errors(depth, true_depth, mask=valid)
    scores["depth_abs_rel"], scores["depth_delta_1_25"] = errors["abs_rel"], errors["delta_1_25"]
    if points:
        relative = (errors["scale"] * depth - true_depth).abs() / true_depth.clamp(min=1e-6)
        scores["conf_spearman"] = confidence_rank_correlation(geometry.conf[0].cpu(), relative, mask=valid)
        scores["chamfer"] = relative_chamfer(geometry, scene)
    return scores


def relative_chamfer(geometry: Geometry, scene: SceneBatch) -> float:
    """Chamfer distance of the fused cloud over the size of the scene.

    The cloud is the unprojected depth of all valid pixels. It is aligned by the similarity that fits corresponding
    pixels best; the scene's size is twice the root mean square distance of its points from their centre.
    """
    valid = scene.valid[0].cpu()
    predicted = unproject_depth(*(t[0].cpu() for t in (geometry.depth, geometry.intrinsics, geometry.cam_from_world)))
    source, target = predicted[valid].double(), scene.points_world[0].cpu()[valid].double()
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:CLOUD_POINTS]
    source, target = source[chosen], target[chosen]
    fit = umeyama(source, target)
    size = 2 * (target - target.mean(dim=0)).square().sum(-1).mean().sqrt()
    return accuracy_completeness(fit.apply_points(source), target, normals=False)["chamfer_mean"] / float(size)


@torch.inference_mode()
def predict_scene(model: nn.Module, images: Tensor) -> Geometry:  # images [1, S, 3, H, W]
    """Run a model on one scene and bring the answer into house conventions."""
    return model.backbone.geometry(model(images), (images.shape[-2], images.shape[-1]))  # type: ignore[union-attr,operator]


def mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """Mean of every score over scenes."""
    rows = list(scores)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
