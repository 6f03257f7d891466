"""Does confidence predict errors? Spearman's rank correlation over pixels.

A rank correlation does not depend on how a model scales its confidence: VGGT's 1 + exp(x), pi3's logit and its sigmoid
score the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.alignment import as_float64
from geoaccel.errors import UserError


def spearman(
    a: Tensor,  # [N]
    b: Tensor,  # [N]
) -> float:
    """Spearman's rank correlation in [-1, 1]; equal values share their mean rank.

    Returns:
        The correlation; NaN if one side is constant, because it then has no order to compare.
    """
    a, b = as_float64(a).flatten(), as_float64(b).flatten()
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"two lists of the same length of at least 2 expected, got {len(a)} and {len(b)}")
    if a.isnan().any() or b.isnan().any():
        raise UserError("values to rank contain NaN: mask them out")
    a, b = _centered_ranks(a), _centered_ranks(b)
    norm = torch.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def confidence_rank_correlation(
    conf: Tensor,  # [...]
    error: Tensor,  # the same shape, at least 0
    *,
    mask: Tensor | None = None,  # the same shape, bool
    max_samples: int = 200_000,
    seed: int = 0,
) -> float:
    """Rank correlation between the confidence and the negative error over pixels.

    1 means that errors decrease strictly with confidence, 0 that confidence is uninformative, -1 that it is inverted.
    More than ``max_samples`` pixels are sampled without replacement, with a separate generator: the same input gives
    the same number, and the global random state is unchanged.

    Args:
        conf: Confidence of each pixel, on any increasing scale.
        error: Error of each pixel.
        mask: Pixels to use; all by default.
        max_samples: Upper limit of the number of pixels ranked.
        seed: Seed of the sampling.

    Raises:
        ValueError: If shapes differ, fewer than two pixels remain, or a value in use is NaN.
    """
    conf, error = as_float64(conf), as_float64(error)
    if conf.shape != error.shape:
        raise ValueError(f"conf {list(conf.shape)} and error {list(error.shape)} differ in shape")
    if mask is not None:
        mask = torch.as_tensor(mask).to(device="cpu", dtype=torch.bool)
        if mask.shape != conf.shape:
            raise ValueError(f"mask {list(mask.shape)} and conf {list(conf.shape)} differ in shape")
        conf, error = conf[mask], error[mask]
    conf, error = conf.flatten(), error.flatten()
    if len(conf) > max_samples:
        chosen = torch.randperm(len(conf), generator=torch.Generator().manual_seed(seed))[:max_samples]
        conf, error = conf[chosen], error[chosen]
    return spearman(conf, -error)


def _centered_ranks(values: Tensor) -> Tensor:  # [N], ranks minus their mean
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[group] - (len(values) + 1) / 2
