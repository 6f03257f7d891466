"""The accelerated model against the dense one, on the same photographs and weights: needs no ground truth.

Zero everywhere means that a method changed nothing: every output value enters one of the errors, directions are not
folded, nothing is aligned. It does not mean that the output is correct: the reference is the dense model, with its
errors.

Outputs are compared by :func:`fidelity`, and frame by frame by :func:`fidelity_per_frame`; intermediate tokens, block
by block, by :func:`capture_layers` and :func:`layer_fidelity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.alignment import as_float64
from geoaccel.attention import AttentionContext
from geoaccel.backbone import Geometry
from geoaccel.cameras import scene_size
from geoaccel.errors import UserError
from geoaccel.eval.metrics.confidence import spearman
from geoaccel.eval.metrics.geometry import median, rotation_angle_deg
from geoaccel.eval.metrics.pose import auc, relative_pose_errors
from geoaccel.layout import AttentionKind

MAX_PIXELS = 200_000
"""Pixels per scene that are ranked for the correlation of confidences."""


def fidelity(accelerated: Geometry, dense: Geometry) -> dict[str, float]:
    """How far an accelerated prediction of one scene (B = 1) is from the dense one.

    Nothing is aligned: both models have the same weights, so a change of scale is a change. pi3 predicts its own world
    frame, and a rotation of that frame moves points, too; relative poses and depth do not depend on it.

    Returns:
        Over pairs of frames, with the dense poses as ground truth: ``fidelity_auc_5``, ``fidelity_auc_30`` of the
        larger angle; ``fidelity_rotation_deg``, ``fidelity_translation_deg``, medians of the angles, 180 for the
        opposite direction, and the same with ``_mean`` and ``_max`` before ``_deg``. Over pixels:
        ``fidelity_depth_abs_rel``; ``fidelity_point_distance``, mean distance of points over the size of the dense
        scene; ``fidelity_conf_rel``, mean difference of the confidences over their mean, and
        ``fidelity_conf_spearman``, their rank correlation. Means over frames: ``fidelity_focal``, relative difference
        of focal lengths; ``fidelity_principal_point``, distance of the principal points over the focal length;
        ``fidelity_camera_turn_deg``, angle of the rotations in the world; ``fidelity_camera_distance``, distance of the
        cameras over the size of the dense scene.

        A scene of one frame has no pairs, and no pose keys. A constant confidence has no rank order, and no key.

    Raises:
        ValueError: If the two differ in frames or pixels, or have NaN or infinite values.
    """
    _check(accelerated, dense)
    values: dict[str, float] = {}
    poses, reference = accelerated.cam_from_world[0].cpu(), dense.cam_from_world[0].cpu()
    if len(poses) > 1:
        rotation, translation = relative_pose_errors(poses, reference, fold_translation=False)
        worse = torch.maximum(rotation, translation)
        values = {f"fidelity_auc_{threshold}": auc(worse, threshold) for threshold in (5, 30)}
        for name, angles in (("rotation", rotation), ("translation", translation)):
            values[f"fidelity_{name}_deg"] = float(median(angles))
            values[f"fidelity_{name}_mean_deg"] = float(angles.mean())
            values[f"fidelity_{name}_max_deg"] = float(angles.max())
    frames = fidelity_per_frame(accelerated, dense)
    values |= {name: sum(frame[name] for frame in frames) / len(frames) for name in frames[0]}
    step = -(-dense.conf.numel() // MAX_PIXELS)
    conf, reference_conf = (as_float64(g.conf).flatten()[::step] for g in (accelerated, dense))
    if conf.min() < conf.max() and reference_conf.min() < reference_conf.max():
        # The sum over equal ranks would have rounding errors.
        same = torch.equal(conf, reference_conf)
        values["fidelity_conf_spearman"] = 1.0 if same else spearman(conf, reference_conf)
    return values


def fidelity_per_frame(accelerated: Geometry, dense: Geometry) -> list[dict[str, float]]:
    """The same for each frame separately.

    Returns:
        Per frame, the values that :func:`fidelity` averages: ``fidelity_depth_abs_rel``, ``fidelity_conf_rel``,
        ``fidelity_point_distance``, ``fidelity_focal``, ``fidelity_principal_point``, ``fidelity_camera_turn_deg``,
        ``fidelity_camera_distance``.

    Raises:
        ValueError: As in :func:`fidelity`.
    """
    _check(accelerated, dense)
    depth, reference = (as_float64(g.depth[0]) for g in (accelerated, dense))
    conf, true_conf = (as_float64(g.conf[0]) for g in (accelerated, dense))
    points, truth = (as_float64(g.points_world[0]) for g in (accelerated, dense))
    focal, true_focal = (as_float64(g.intrinsics[0])[:, [0, 1], [0, 1]] for g in (accelerated, dense))
    centre, true_centre = (as_float64(g.intrinsics[0])[:, :2, 2] for g in (accelerated, dense))
    camera, true_camera = (_centers(g.cam_from_world[0]) for g in (accelerated, dense))
    turn = rotation_angle_deg(accelerated.cam_from_world[0, :, :3, :3], dense.cam_from_world[0, :, :3, :3])
    size = scene_size(truth.flatten(0, -2))
    mean_conf = true_conf.abs().mean().clamp(min=1e-9)  # of the scene: single values may be close to zero
    return [
        {
            "fidelity_depth_abs_rel": float(_relative(depth[i], reference[i])),
            "fidelity_conf_rel": float((conf[i] - true_conf[i]).abs().mean() / mean_conf),
            "fidelity_point_distance": float((points[i] - truth[i]).norm(dim=-1).mean() / size),
            "fidelity_focal": float(_relative(focal[i], true_focal[i])),
            "fidelity_principal_point": float(((centre[i] - true_centre[i]) / true_focal[i]).norm()),
            "fidelity_camera_turn_deg": float(turn[i]),
            "fidelity_camera_distance": float((camera[i] - true_camera[i]).norm() / size),
        }
        for i in range(len(depth))
    ]


def _check(accelerated: Geometry, dense: Geometry) -> None:
    if accelerated.depth.shape != dense.depth.shape or len(dense.depth) != 1:
        raise ValueError(
            f"expected two predictions of the same scene, got depth {list(accelerated.depth.shape)} and "
            f"{list(dense.depth.shape)}"
        )
    for who, geometry in (("accelerated", accelerated), ("dense", dense)):
        for name, tensor in vars(geometry).items():
            if not tensor.isfinite().all():
                raise UserError(f"the {who} model predicted NaN or infinite numbers in {name}: nothing to compare")


def _relative(value: Tensor, reference: Tensor) -> Tensor:
    return ((value - reference).abs() / reference.abs().clamp(min=1e-9)).mean()


def _centers(
    cam_from_world: Tensor,  # [S, 4, 4], rotations as coarse as they may be
) -> Tensor:  # [S, 3]
    poses = as_float64(cam_from_world)
    terms = poses[:, :3, :3] * poses[:, :3, 3:]
    return -(terms[:, 0] + terms[:, 1] + terms[:, 2])  # in a fixed order, so that equal poses have equal centres


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """Tokens after one block.

    Attributes:
        kind: ``encoder``, ``frame`` or ``global``.
        index: Index of the block among those of its kind.
        tokens: [B, S, P, C] on the CPU, unmerged: a merged token is at the positions of all its tokens.
    """

    kind: AttentionKind
    index: int
    tokens: Tensor


@contextmanager
def capture_layers(model: nn.Module) -> Iterator[list[LayerTokens]]:
    """Keep the tokens after every block of encoder and aggregator in the next forward.

    They are on the CPU in the model's dtype: 72 blocks x 1041 tokens x 1024 channels of VGGT-1B are 154 MB per
    photograph of 392 x 518 pixels in bfloat16. The compared forward keeps nothing.

    Example:
        >>> with capture_layers(model) as dense:
        ...     model(images)
        >>> geoaccel.accelerate(model, merging="fastvggt")
        >>> with layer_fidelity(model, dense) as rows:
        ...     model(images)

    Args:
        model: One of ours.
    """
    layers: list[LayerTokens] = []
    with _behind_blocks(model, layers.append):
        yield layers


@contextmanager
def layer_fidelity(model: nn.Module, dense: Sequence[LayerTokens]) -> Iterator[list[dict[str, Any]]]:
    """Compare the tokens of the next forward, block by block, with those of the dense model.

    The model may be the captured one, with methods applied since.

    Args:
        model: The accelerated model.
        dense: Output of :func:`capture_layers` on the same photographs.

    Returns:
        A list that fills while the model runs: ``kind``, ``index``, and the cosines ``fidelity_cosine_mean`` and
        ``fidelity_cosine_min`` over all tokens. 1 is the same direction.

    Raises:
        ValueError: If the forward has other blocks or other photographs than the captured one.
    """
    rows: list[dict[str, Any]] = []

    def compare(layer: LayerTokens) -> None:
        expected = dense[len(rows)] if len(rows) < len(dense) else None
        if expected is None or (expected.kind, expected.index) != (layer.kind, layer.index):
            raise ValueError(
                f"{layer.kind} block {layer.index} is not the block captured at this position; run one forward each, "
                "of the same network"
            )
        if expected.tokens.shape != layer.tokens.shape:
            raise ValueError(
                f"tokens {list(layer.tokens.shape)} after {layer.kind} block {layer.index}, captured were "
                f"{list(expected.tokens.shape)}; run both on the same photographs"
            )
        frames = zip(layer.tokens.flatten(0, 1), expected.tokens.flatten(0, 1), strict=True)
        cosine = torch.stack([token_cosine(a, b) for a, b in frames])
        scores = {"fidelity_cosine_mean": float(cosine.mean()), "fidelity_cosine_min": float(cosine.min())}
        rows.append({"kind": layer.kind, "index": layer.index, **scores})

    with _behind_blocks(model, compare):
        yield rows
    if len(rows) != len(dense):
        raise ValueError(f"{len(rows)} blocks ran where {len(dense)} were captured; run one forward each")


def token_cosine(
    a: Tensor,  # [..., C]
    b: Tensor,  # [..., C]
) -> Tensor:  # [...], float64
    """Cosine of the angle between tokens; exactly 1 for equal ones, 0 if only one of two is zero."""
    a, b = a.double(), b.double()
    # A single root of the product: the square root of a square is exact.
    norm = ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    cosine = ((a * b).sum(-1) / norm).clamp(-1, 1)
    return torch.where(norm == 0, (a == b).all(-1).double(), cosine)


@contextmanager
def _behind_blocks(model: nn.Module, visit: Callable[[LayerTokens], None]) -> Iterator[None]:
    """Call ``visit`` after every block whose attention the backbone lists, in execution order."""
    network: Any = model
    sites = {site for kind in network.backbone.sites(model).values() for site in kind}
    handles = []
    for block in model.modules():
        if getattr(block, "attn", None) in sites:
            handles += _watch(block, visit)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(block: Any, visit: Callable[[LayerTokens], None]) -> list[Any]:
    """Hooks on the summands of a block: merging before every MLP never calls the block as a whole."""
    seen: dict[str, Any] = {}

    def attend(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen["context"] = arguments[1]

    def enter_mlp(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen["x"] = arguments[0]

    def leave_mlp(module: nn.Module, arguments: tuple[Any, ...], update: Tensor) -> None:
        context: AttentionContext = seen.pop("context")
        tokens = _dense(seen.pop("x"), context) + _dense(update, context)
        visit(LayerTokens(context.kind, context.index, tokens.detach().cpu()))

    return [
        block.attn.register_forward_pre_hook(attend),
        block.norm2.register_forward_pre_hook(enter_mlp),
        block.ls2.register_forward_hook(leave_mlp),
    ]


def _dense(rows: Tensor, context: AttentionContext) -> Tensor:  # [B, S, P, C]
    """Rows of a block at their positions: [n, N, C], [B, S, P, C], or [T, C] if packed."""
    if context.packing is not None and rows.ndim == 2:
        return context.packing.unpack(rows)
    layout = context.layout
    assert layout is not None
    return rows.reshape(layout.batch, layout.frames, layout.tokens_per_frame, -1)
