"""QVGGT's camera information compensation token: a constant extra token for a camera head.

Rounding errors bias all cameras of a scene in the same way; a token with the mean camera token of the dense model lets
the head's attention across frames counteract that. The paper takes the mean of the dense camera tokens, plus the mean
of their coordinates along the 32 principal directions about that mean. The second is zero by construction, so the token
is the mean; a test checks this against the formula.

Paper: Pan et al., CVPR 2026, arXiv 2605.31124, as far as we know it.
Differs from the paper in: the length is not matched to that of patch tokens, as a LayerNorm follows at once.

The token is a buffer of the camera head, with its own record in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import Backbone, CameraTokens
from geoaccel.errors import UserError
from geoaccel.linears import SHAPERS
from geoaccel.quantization.calibrate.prefix import Batch

BUFFER = "compensation_token"
NAME = "camera-token"


def can_compensate(model: nn.Module) -> bool:
    """Whether the network has a camera head in which frames attend to each other (``Backbone.camera_tokens``)."""
    return _camera_tokens(model) is not None


@torch.no_grad()
def mean_camera_token(model: nn.Module, batches: Sequence[Batch]) -> Tensor:  # [2 * C]
    """The mean over all frames of the input of the camera head.

    Args:
        model: Dense.
        batches: Images.

    Raises:
        ValueError: If this network has no such head, or there are no images.
    """
    head, _ = _require(model)
    tokens: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: tokens.append(args[0][-1][:, :, 0].flatten(0, 1).float()))
    try:
        for load in batches:
            model(load(), heads=["camera"])
    finally:
        handle.remove()
    if not tokens:
        raise UserError("the calibration set is empty; give images")
    return torch.cat(tokens).mean(dim=0)


def add_token(
    model: nn.Module,
    token: Tensor,  # [2 * C]
) -> None:
    """Append a token to those of the frames in the camera head; its outputs are only those of the frames.

    Raises:
        ValueError: If this network has no such head, or has a token already.
    """
    head, _ = _require(model)
    if hasattr(head, BUFFER):
        raise ValueError("the camera head already has a compensation token")
    head.register_buffer(BUFFER, token)
    head.quantization_record = {"name": NAME, "knobs": {}, "linears": []}
    head.register_forward_pre_hook(_append)
    head.register_forward_hook(_trim)


def _append(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    *before, last = args[0]
    token = getattr(head, BUFFER).to(last.dtype).expand(len(last), 1, 1, -1)
    # The head reads the first token of each frame: the others need not come along.
    return ([*before, torch.cat([last[:, :, :1], token], dim=1)], *args[1:])


def _trim(head: nn.Module, args: tuple[Any, ...], poses: list[Tensor]) -> list[Tensor]:
    return [pose[:, :-1] for pose in poses]


def _camera_tokens(model: nn.Module) -> CameraTokens | None:
    backbone = getattr(model, "backbone", None)
    known = backbone.camera_tokens if isinstance(backbone, Backbone) else None
    return known if known is not None and known.head in dict(model.named_modules()) else None


def _require(model: nn.Module) -> tuple[Any, int]:
    """The camera head, and the width of its tokens."""
    known = _camera_tokens(model)
    if known is None:
        raise UserError(
            f"a {type(model).__name__} has no camera head that attends across frames; leave out the camera token"
        )
    return model.get_submodule(known.head), known.width(model.config)


def _shape(model: nn.Module, record: Mapping[str, Any]) -> None:
    _, width = _require(model)
    add_token(model, torch.empty(width, device="meta"))


SHAPERS.register(NAME, _shape)
