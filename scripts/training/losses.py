"""Training losses: VGGT's regression losses, and a correspondence loss.

VGGT's objective (arXiv 2503.11651 section 3.4 and the released training code) is camera, depth and point regression.
A network of a few million parameters does not learn from those alone: on procedural scenes its median rotation error is
still that of the identity after 16,000 scenes. :class:`CorrespondenceLoss` therefore supervises the attention of one
global block directly, from patches to the patches of other frames that see the same surface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from geoaccel.attention import AttentionContext, Mixer, Restore
from geoaccel.attention_kernels import attend
from geoaccel.cameras import invert_rigid, project_points, to_homogeneous, transform_points


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch in the frame of its first camera, scaled so that points have a mean distance of 1.

    Attributes:
        cam_from_world: [B, S, 4, 4]; the first of each scene is the identity.
        intrinsics: [B, S, 3, 3], pixels.
        depth: [B, S, H, W].
        points: [B, S, H, W, 3].
        valid: [B, S, H, W], pixels that show a surface.
        scale: [B], ground-truth units per unit of these targets.
    """

    cam_from_world: Tensor
    intrinsics: Tensor
    depth: Tensor
    points: Tensor
    valid: Tensor
    scale: Tensor


def first_frames(targets: Targets, frames: int) -> Targets:
    """The ground truth of the first few frames of each scene."""
    per_frame = ("cam_from_world", "intrinsics", "depth", "points", "valid")
    return replace(targets, **{name: getattr(targets, name)[:, :frames] for name in per_frame})


def normalise(
    cam_from_world: Tensor,  # [B, S, 4, 4]
    intrinsics: Tensor,  # [B, S, 3, 3]
    depth: Tensor,  # [B, S, H, W]
    points_world: Tensor,  # [B, S, H, W, 3]
    valid: Tensor,  # [B, S, H, W]
) -> Targets:
    """Convert a scene to VGGT's output format."""
    first = cam_from_world[:, :1]
    points = transform_points(first[:, 0], points_world.flatten(1, 3)).view_as(points_world)
    distance = points.norm(dim=-1) * valid
    scale = distance.sum(dim=(1, 2, 3)) / valid.sum(dim=(1, 2, 3)).clamp(min=1)
    scale = scale.clamp(min=1e-6)
    relative = to_homogeneous((cam_from_world @ invert_rigid(first))[..., :3, :])
    translation = relative[..., :3, 3:] / scale[:, None, None, None]
    relative = to_homogeneous(torch.cat([relative[..., :3, :3], translation], dim=-1))
    return Targets(
        cam_from_world=relative,
        intrinsics=intrinsics,
        depth=depth / scale[:, None, None, None],
        points=points / scale[:, None, None, None, None],
        valid=valid,
        scale=scale,
    )


def camera_loss(
    stages: Sequence[Tensor],  # n x [B, S, 9], one for each refinement
    target: Tensor,  # [B, S, 9]
    *,
    decay: float = 0.6,
) -> Tensor:
    """L1 on the pose encoding: translation (clamped at 100) + rotation + half the field of view, later stages more.

    Quaternions are compared as released, sign included: targets have a non-negative scalar part.
    """
    total = target.new_zeros(())
    for index, stage in enumerate(stages):
        error = (stage - target).abs()
        loss = error[..., :3].clamp(max=100).mean() + error[..., 3:7].mean() + 0.5 * error[..., 7:].mean()
        total = total + decay ** (len(stages) - 1 - index) * loss
    return total / len(stages)


def relative_pose_loss(
    cam_from_world: Tensor,  # [B, S, 4, 4]
    target: Tensor,  # [B, S, 4, 4]
    *,
    least_baseline: float = 0.02,
    knee: float | None = None,
) -> Tensor:
    """Chordal distances of relative rotations and of the directions of relative translations, over all pairs.

    Close to what pose AUC measures. Between nearby frames the direction depends on a small difference of two
    translations, to which a loss on the translations themselves is hardly sensitive.

    Args:
        cam_from_world: Predicted poses.
        target: True poses, in any unit of length in which the scene has a size of about 1.
        least_baseline: For pairs of frames closer than this, the direction is ignored.
        knee: A distance c counts as ``knee log(1 + c / knee)``: linearly while small, and sublinearly beyond, so that
            pairs with large errors do not dominate nearly correct ones. None: linearly.
    """
    frames = target.shape[1]

    def pairs(poses: Tensor) -> Tensor:  # [B, S, S, 4, 4], T_i T_j^-1
        return poses[:, :, None] @ invert_rigid(poses)[:, None]

    predicted, truth = pairs(cam_from_world), pairs(target)
    different = ~torch.eye(frames, dtype=torch.bool, device=target.device).expand(truth.shape[:3])
    rotation = (predicted[..., :3, :3] - truth[..., :3, :3]).square().sum(dim=(-1, -2))
    baseline = truth[..., :3, 3].norm(dim=-1)
    moved = different & (baseline >= least_baseline)
    # The gradient along the direction itself is zero; short predictions must not make it explode.
    own = predicted[..., :3, 3]
    own = own / own.norm(dim=-1, keepdim=True).clamp(min=0.5 * least_baseline)
    apart = (own - truth[..., :3, 3] / baseline.clamp(min=1e-6)[..., None]).square().sum(-1)

    def counted(square: Tensor) -> Tensor:
        distance = (square + 1e-5).sqrt()  # the square root keeps the gradient of small errors large
        return distance if knee is None else knee * torch.log1p(distance / knee)

    return counted(rotation[different]).mean() + (counted(apart) * moved).sum() / moved.sum().clamp(min=1)


def confident_regression_loss(
    prediction: Tensor,  # [..., H, W, K]
    conf: Tensor,  # [..., H, W], at least 1
    target: Tensor,  # [..., H, W, K]
    valid: Tensor,  # [..., H, W]
    *,
    gamma: float = 1.0,
    alpha: float = 0.2,
    valid_range: float = 0.98,
) -> Tensor:
    """``gamma |e| c - alpha log c`` plus plain ``|e|``, the largest 2 % of the errors left out."""
    error = (prediction - target).norm(dim=-1)[valid]
    if error.numel() == 0:
        return prediction.sum() * 0
    certainty = conf[valid]
    if error.numel() > 1000:
        kept = error.detach() <= torch.quantile(_thin(error.detach()), valid_range)
        error, certainty = error[kept], certainty[kept]
    return (gamma * error * certainty - alpha * certainty.log()).mean() + error.mean()


def gradient_loss(
    prediction: Tensor,  # [n, H, W, K]
    target: Tensor,  # [n, H, W, K]
    valid: Tensor,  # [n, H, W]
    *,
    scales: int = 4,
) -> Tensor:
    """L1 between the gradients of prediction and target, at every pixel, every 2nd, 4th and 8th."""
    total = prediction.new_zeros(())
    for level in range(scales):
        step = 2**level
        error = (prediction - target)[:, ::step, ::step]
        mask = valid[:, ::step, ::step]
        for dim in (1, 2):
            both = mask.narrow(dim, 1, mask.shape[dim] - 1) & mask.narrow(dim, 0, mask.shape[dim] - 1)
            jump = error.diff(dim=dim).abs().sum(-1)
            total = total + (jump * both).sum() / both.sum().clamp(min=1)
    return total / scales


def _thin(values: Tensor, limit: int = 100_000) -> Tensor:
    """Every n-th value, so that a quantile stays cheap."""
    return values[:: max(1, values.numel() // limit)]


def correspondences(
    targets: Targets,
    patch_size: int,
    *,
    tolerance: float = 0.06,
) -> Tensor:  # [B, S * h * w, S], index of a patch within the other frame, or -1
    """For the centre of every patch, the patch of every other frame onto which its surface point projects.

    Args:
        targets: Ground truth.
        patch_size: Patch side in pixels.
        tolerance: Relative depth error up to which the point counts as visible there.
    """
    batch, frames, height, width = targets.depth.shape
    h, w = height // patch_size, width // patch_size
    centre = slice(patch_size // 2, None, patch_size)
    points = targets.points[:, :, centre, centre].reshape(batch, 1, frames * h * w, 3)
    seen = targets.valid[:, :, centre, centre].reshape(batch, 1, frames * h * w)
    pixels, depth = project_points(points.expand(-1, frames, -1, -1), targets.intrinsics, targets.cam_from_world)
    column, row = pixels.unbind(-1)
    inside = (depth > 1e-6) & (column >= 0) & (column < width) & (row >= 0) & (row < height) & seen
    column = column.nan_to_num().clamp(0, width - 1).long()
    row = row.nan_to_num().clamp(0, height - 1).long()
    surface = targets.depth.flatten(2).gather(2, row * width + column)
    visible = inside & ((surface - depth).abs() <= tolerance * depth)
    patch = (row // patch_size) * w + column // patch_size
    own = torch.arange(frames, device=patch.device).repeat_interleave(h * w)
    other = own[None, :] != torch.arange(frames, device=patch.device)[:, None]
    return torch.where(visible & other, patch, -1).transpose(1, 2)


class CorrespondenceLoss(Mixer):
    """Dense mixer that, while ``targets`` is set, computes a loss on the attention of its first heads.

    Cross-entropy of the attention logits from every patch to the patches of one other frame, the target being the
    patch where its surface point is seen. Put one into a global attention's ``mixer`` for training.

    Attributes:
        targets: [B, S * h * w, S] from :func:`correspondences`, or None to only mix.
        loss, accuracy: Of the last forward.
    """

    def __init__(self, heads: int = 2, kernel: str = "sdpa") -> None:
        self.heads = heads
        self.kernel = kernel
        self.targets: Tensor | None = None
        self.loss: Tensor | None = None
        self.accuracy: Tensor | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: AttentionContext
    ) -> tuple[Tensor, Restore | None]:
        if self.targets is not None and context.layout is not None:
            self.loss, self.accuracy = self.score(q, k, self.targets, context)
        return attend(q, k, v, kernel=self.kernel), None

    def score(self, q: Tensor, k: Tensor, targets: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and fraction of patches whose best match is right."""
        layout = context.layout
        assert layout is not None
        shape = (layout.frames, layout.tokens_per_frame)
        q_patch = q[:, : self.heads].unflatten(2, shape)[:, :, :, layout.num_special :].flatten(2, 3)
        k_patch = k[:, : self.heads].unflatten(2, shape)[:, :, :, layout.num_special :].flatten(2, 3)
        logits = (q_patch @ k_patch.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        logits = logits.unflatten(-1, (layout.frames, layout.num_patches))  # [B, heads, S * hw, S, hw]
        target = targets[:, None].expand(*logits.shape[:-1])
        known = target >= 0
        log_probability = F.log_softmax(logits, dim=-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        count = known.sum().clamp(min=1)
        loss = -(log_probability * known).sum() / count
        accuracy = ((logits.argmax(-1) == target) & known).sum() / count
        return loss, accuracy.detach()
