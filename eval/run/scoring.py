"""Score one scene, and combine the scores of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from geoaccel.alignment import umeyama
from geoaccel.backbone import Geometry
from geoaccel.cameras import invert_rigid, scene_size, transform_points, unproject_depth
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.metrics import pose_protocols, trajectories
from geoaccel.eval.metrics.confidence import confidence_rank_correlation
from geoaccel.eval.metrics.depth import Alignment, depth_errors
from geoaccel.eval.metrics.geometry import camera_centers, median
from geoaccel.eval.metrics.point_protocols import PROTOCOLS as POINT_PROTOCOLS
from geoaccel.eval.metrics.point_protocols import Cut3rCrop, DtuMvs, FastVggtScannet, MapProtocol, PointProtocol, surest
from geoaccel.eval.metrics.points import accuracy_completeness
from geoaccel.eval.run.prepare import Truth, resampled_depth
from geoaccel.images import ImageTransform
from geoaccel.registry import unknown

CLOUD_POINTS = 20_000
RELATIVE = "relative"
MAPS = "depth and intrinsics; set data.protocol.points=null"
SCAN = "the scanned points; fetch them, or set data.protocol.points=null"
REGION = "the scan's ObsMask and Plane files (ObsMask of DTU's SampleSet); fetch them, or use pi3-points-dtu"
PointSource = Literal["depth", "head"]


@dataclass(frozen=True)
class Protocol:
    """Protocols by which a scene is scored.

    Args:
        pose: A name from ``geoaccel.eval.metrics.pose_protocols.PROTOCOLS``.
        points: A name from ``geoaccel.eval.metrics.point_protocols.PROTOCOLS``; ``relative``
            (:func:`relative_chamfer`); None scores no points.
        depth: Alignment of depth, one for the scene; None scores neither depth nor confidence.
        points_from: ``depth`` unprojects depth with the predicted cameras, ``head`` uses the backbone's own points.

    Attributes:
        width: Width of the point protocol's point maps; None if it scores none. Follows from ``points``; it is a field
            because reports list these fields.
    """

    pose: str = "vggt-co3d"
    points: str | None = RELATIVE
    depth: Alignment | None = "median"
    points_from: PointSource = "depth"
    width: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        choices = {
            "pose protocol": (self.pose, list(pose_protocols.PROTOCOLS)),
            "point protocol": (self.points, [RELATIVE, *POINT_PROTOCOLS]),
            "depth alignment": (self.depth, ["median", "least_squares", "scale_shift", "none"]),
            "source of points": (self.points_from, ["depth", "head"]),
        }
        for what, (given, known) in choices.items():
            if given is not None and given not in known:
                raise UserError(unknown(what, given, known))
        scorer = POINT_PROTOCOLS[self.points] if self.points not in (None, RELATIVE) else None
        if isinstance(scorer, MapProtocol):
            object.__setattr__(self, "width", scorer.width)
        elif self.points_from == "head" and self.points != RELATIVE:
            what = "no points are scored" if scorer is None else f"{scorer.name} scores depth"
            raise UserError(f"points=head: {what}; use points=depth, or data.protocol.points={RELATIVE}")

    @property
    def cameras_only(self) -> bool:
        """Whether only poses are scored."""
        return self.points is None and self.depth is None

    def why_not(self, scene: EvalScene) -> str | None:
        """Data that a scene lacks for scoring points, known before anything is predicted; None if it lacks nothing.

        Images without poses are compared with the dense model, and need none.
        """
        scorer = POINT_PROTOCOLS.get(self.points or "")
        if scorer is None or not scene.cam_from_world.isfinite().all():
            return None
        if isinstance(scorer, MapProtocol):
            has_depth = any(frame.read_depth is not None for frame in scene.frames)
            return None if has_depth and scene.intrinsics is not None else _needs(scorer, MAPS)
        if scene.read_points is None:
            return _needs(scorer, SCAN)
        return _needs(scorer, REGION) if isinstance(scorer, DtuMvs) and scene.read_region is None else None


def _needs(scorer: PointProtocol, what: str) -> str:
    return f"point protocol {scorer.name!r} needs {what}"


@dataclass(frozen=True, eq=False)
class SequenceDetails:
    """Details of a sequence in windows besides its scores.

    Attributes:
        about: Pieces, cuts, loops and windows, as plain data.
        truth: True poses [S, 4, 4].
        paths: Predicted camera centres of each aligned piece, in ground-truth coordinates [n, 3].
    """

    about: Mapping[str, Any]
    truth: Tensor
    paths: list[Tensor]


@dataclass(frozen=True)
class SceneScores:
    """Scores of one scene.

    Attributes:
        name, category, frames: Name, category and frames of the scene.
        pairs: Pose errors of all its pairs; None for a sequence in windows.
        values: Scores of this scene by name.
        details: For a sequence in windows.
    """

    name: str
    category: str | None
    frames: int
    pairs: pose_protocols.PairErrors
    values: dict[str, float]
    details: SequenceDetails | None = field(default=None, repr=False, compare=False)


def score_scene(
    geometry: Geometry,
    truth: Truth,
    protocol: Protocol = Protocol(),
    *,
    scene: EvalScene | None = None,
    transforms: Sequence[ImageTransform] = (),
    name: str = "",
    points: bool = True,
) -> SceneScores:
    """Compare the prediction of one scene (B = 1) with its ground truth.

    Args:
        geometry: The prediction.
        truth: The ground truth on the network's pixels.
        protocol: What to score.
        scene: The scene itself, for point protocols with their own resolution or a scanned cloud.
        transforms: With ``scene``: from its images to the network input.
        name: Name of the scene, if ``scene`` is not given.
        points: If False, omit points and confidence, which need SciPy.

    Returns:
        Values ``auc_3 ... auc_30``, ``rra_*``, ``rta_*`` of the scene's own pairs; ``rotation_median_deg``; with at
        least three frames ``ate_rmse`` and related scores (camera centres after a similarity), of which only
        ``rpe_rotation_deg`` exists if the true cameras are static, and with the points of ``fastvggt-scannet`` the
        same as in its script, as ``fastvggt_ate_rmse``; ``depth_abs_rel``, ``depth_delta_1_25``;
        ``conf_spearman`` (confidence against the negative relative depth error; NaN where the confidence is constant);
        and the scores of the point protocol, its mean chamfer distance as ``chamfer``.

    Raises:
        ValueError: If something that the protocol needs is missing, not finite, or empty.
    """
    poses = geometry.cam_from_world[0].cpu()
    chosen = pose_protocols.PROTOCOLS[protocol.pose]
    category = None if scene is None else scene.category
    pairs = chosen.errors(poses, truth.cam_from_world, category or "")
    values = {key: value for key, value in chosen.scores([pairs]).items() if not key.endswith(("_mean", "_pooled"))}
    values["rotation_median_deg"] = float(median(pairs.rotation_deg))
    if len(poses) > 2:
        values |= _trajectory_scores(poses, truth.cam_from_world, protocol.points)
    if truth.depth is not None and protocol.depth is not None:
        values |= _depth_scores(geometry, truth, protocol.depth, conf=points)
    if points and protocol.points is not None:
        values |= _point_scores(geometry, truth, protocol, scene, transforms)
    label = name if scene is None else scene.name
    return SceneScores(label, category, len(poses), pairs, values)


def _trajectory_scores(predicted: Tensor, true: Tensor, points: str | None) -> dict[str, float]:
    # Without any motion there is no scale to fit: everything measured after alignment is undefined.
    if trajectories.stands_still(true):
        return {"rpe_rotation_deg": trajectories.relative_pose_error(predicted, true)["rpe_rotation_deg"]}
    values = trajectories.trajectory_errors(predicted, true)
    if points == FastVggtScannet.name and not trajectories.stands_still(invert_rigid(true)):
        published = trajectories.trajectory_errors(predicted, true, fastvggt_compat=True)
        values |= {f"fastvggt_{name}": value for name, value in published.items()}
    return values


def _depth_scores(geometry: Geometry, truth: Truth, align: Alignment, *, conf: bool) -> dict[str, float]:
    assert truth.depth is not None
    depth = geometry.depth[0].cpu()
    errors = depth_errors(depth, truth.depth, mask=truth.valid, align=align)
    values = {"depth_abs_rel": errors["abs_rel"], "depth_delta_1_25": errors["delta_1_25"]}
    if conf:
        aligned = errors["scale"] * depth + errors["shift"]
        relative = (aligned - truth.depth).abs() / truth.depth.clamp(min=1e-6)
        values["conf_spearman"] = confidence_rank_correlation(geometry.conf[0].cpu(), relative, mask=truth.valid)
    return values


def _point_scores(
    geometry: Geometry,
    truth: Truth,
    protocol: Protocol,
    scene: EvalScene | None,
    transforms: Sequence[ImageTransform],
) -> dict[str, float]:
    if protocol.points == RELATIVE:
        # Scenes without depth or intrinsics have no points: nothing to score, but not an error.
        known = truth.points_world is not None
        return {"chamfer": relative_chamfer(geometry, truth, protocol.points_from)} if known else {}
    assert protocol.points is not None
    scorer = POINT_PROTOCOLS[protocol.points]
    if scene is None:
        raise ValueError(f"point protocol {scorer.name!r} needs the scene and its transforms")
    if isinstance(scorer, MapProtocol):
        scores = _score_maps(scorer, geometry, scene, transforms, protocol.points_from)
    else:
        scores = _score_clouds(scorer, geometry, truth, scene)
    return {"chamfer": scores["chamfer_mean"], **scores}


def _score_maps(
    scorer: MapProtocol,
    geometry: Geometry,
    scene: EvalScene,
    transforms: Sequence[ImageTransform],
    points_from: PointSource,
) -> dict[str, float]:
    """Point maps at the resolution of the protocol."""
    shrinks = [_shrink(t.original_size, scorer.size_of(t.original_size)) for t in transforms]
    depth, intrinsics = resampled_depth(scene, shrinks), scene.intrinsics
    if depth is None or intrinsics is None:
        raise UserError(_needs(scorer, MAPS))
    k_true = torch.stack([shrink.intrinsics_to_network(k) for shrink, k in zip(shrinks, intrinsics, strict=True)])
    truth = unproject_depth(depth.double(), k_true, scene.cam_from_world)
    to_network = [_from_shrunk(*pair) for pair in zip(transforms, shrinks, strict=True)]
    maps = []
    for i, transform in enumerate(to_network):
        if points_from == "head":
            channels = geometry.points_world[0, i].movedim(-1, 0).contiguous()
            maps.append(transform.depth_to_original(channels).movedim(0, -1))
        else:
            original = transform.depth_to_original(geometry.depth[0, i])
            k = transform.intrinsics_to_original(geometry.intrinsics[0, i])
            maps.append(unproject_depth(original, k, geometry.cam_from_world[0, i]))
    seen = torch.stack([transform.seen_mask() for transform in to_network])
    predicted, valid = torch.stack(maps), (depth > 0) & seen
    if isinstance(scorer, Cut3rCrop):
        first = {
            "pred_first_cam_from_world": geometry.cam_from_world[0, 0],
            "gt_first_cam_from_world": scene.cam_from_world[0],
        }
        return scorer.score(predicted, truth, valid, **first)
    return scorer.score(predicted, truth, valid)


def _shrink(before: tuple[int, int], after: tuple[int, int]) -> ImageTransform:
    """From an image to the size at which it is scored."""
    return ImageTransform(before, after, (after[1] / before[1], after[0] / before[0]), (0.0, 0.0))


def _from_shrunk(transform: ImageTransform, shrink: ImageTransform) -> ImageTransform:
    """From the size at which an image is scored to the network input."""
    (x, y), (shrink_x, shrink_y) = transform.scale, shrink.scale
    return ImageTransform(shrink.network_size, transform.network_size, (x / shrink_x, y / shrink_y), transform.offset)


def _score_clouds(scorer: PointProtocol, geometry: Geometry, truth: Truth, scene: EvalScene) -> dict[str, float]:
    """Fused points against a scanned cloud."""
    scan = scene.points()
    if scan is None:
        raise UserError(_needs(scorer, SCAN))
    depth, conf = geometry.depth[0], geometry.conf[0]
    points = unproject_depth(depth, geometry.intrinsics[0], geometry.cam_from_world[0])
    if isinstance(scorer, FastVggtScannet):
        keep = scorer.keep(conf)
        in_first = transform_points(geometry.cam_from_world[0, 0], points[keep])
        scores = scorer.score(in_first, scan, first_cam_from_world=truth.cam_from_world[0])
    else:
        assert isinstance(scorer, DtuMvs)
        region = scene.region()
        if region is None:
            raise UserError(_needs(scorer, REGION))
        # The cameras give the transform to the scan's frame; the 30 % least confident pixels are left out.
        keep = surest(conf, 0.3)
        fit = umeyama(camera_centers(geometry.cam_from_world[0]), camera_centers(truth.cam_from_world))
        scores = scorer.score(
            fit.apply_points(points[keep]),
            scan,
            obs_mask=region.mask,
            box=region.box,
            resolution=region.cell,
            ground_plane=region.ground_plane,
        )
    return scores | {"kept_share": float(keep.double().mean())}


def relative_chamfer(geometry: Geometry, truth: Truth, points_from: PointSource = "depth") -> float:
    """Chamfer distance of the fused cloud over the size of the scene.

    The cloud has every valid pixel, at most 20,000 sampled at random. It is aligned by the similarity that best fits
    corresponding pixels; the scene's size is twice the root mean square distance of its points from their centre.
    """
    assert truth.valid is not None
    assert truth.points_world is not None
    predicted = _world_points(geometry, points_from)
    source, target = predicted[truth.valid].double(), truth.points_world[truth.valid].double()
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:CLOUD_POINTS]
    source, target = source[chosen], target[chosen]
    fit = umeyama(source, target)
    distance = accuracy_completeness(fit.apply_points(source), target, normals=False)["chamfer_mean"]
    return distance / float(scene_size(target))


def _world_points(geometry: Geometry, points_from: PointSource) -> Tensor:  # [S, H, W, 3]
    if points_from == "head":
        return geometry.points_world[0].cpu()
    return unproject_depth(*(t[0].cpu() for t in (geometry.depth, geometry.intrinsics, geometry.cam_from_world)))


def aggregate(scenes: Iterable[SceneScores], protocol: Protocol) -> dict[str, float]:
    """Scores of a data set: poses as the pose protocol aggregates them, everything else as the mean over scenes.

    A score that some scenes lack (a scene without depth), or that is not finite there (the rank correlation of a
    constant confidence), is averaged over the others; NaN if there is none.
    """
    rows = list(scenes)
    if not rows:
        return {}
    result = pose_protocols.PROTOCOLS[protocol.pose].scores([row.pairs for row in rows])
    return result | {name: value for name, value in means(rows).items() if name not in result}


def means(scenes: Iterable[SceneScores]) -> dict[str, float]:
    """Mean of every score over the scenes where it is finite; NaN if it is finite nowhere."""
    rows = list(scenes)
    found = {
        name: [row.values[name] for row in rows if math.isfinite(row.values.get(name, math.nan))]
        for name in dict.fromkeys(name for row in rows for name in row.values)
    }
    return {name: sum(values) / len(values) if values else math.nan for name, values in found.items()}
