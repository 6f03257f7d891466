"""GPTQ: rounding column by column, compensating each column's error in the columns not yet rounded.

It minimises the error of the layer's outputs, not of its weights. With the second moments G of its inputs, the output
error of a weight change D is ``trace(D G D^T)``. Once a column is rounded, the optimal change of all later columns is
known in closed form: the column's error times a row of the Cholesky factor of G's inverse.

Paper: Frantar et al., ICLR 2023, arXiv 2210.17323.
Differs from the paper in: columns in natural order, as groups of consecutive ones share a scale in the file; columns of
inputs that were always zero in calibration are rounded to nearest, not dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.quantization.formats.reference import group_codes, group_grid

DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean: they were measured on a few images."""


@torch.no_grad()
def compensated_groups(
    weight: Tensor,  # [N, K]
    gram: Tensor,  # [K, K], sum of x^T x over inputs x
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, K] uint8 in 0..15, [N, G], [N, G]
    """Codes in the format of :func:`.formats.reference.quantize_groups`, chosen for the output of the layer.

    Scale and zero of a group are computed from its weights when their turn comes.

    Raises:
        ValueError: If the second moments are not finite.
    """
    if not gram.isfinite().all():
        raise UserError("the inputs of a layer overflowed during calibration; check the images for such values")
    left = weight.float().clone()
    factor = inverse_factor(gram).to(left)
    codes, scales, zeros = [], [], []
    for start in range(0, left.shape[1], group_size):
        group = slice(start, start + group_size)
        rows = factor[group]
        found = _round_group(left[:, group], rows[:, group])
        codes.append(found[0])
        scales.append(found[1])
        zeros.append(found[2])
        left[:, start + group_size :] -= found[3] @ rows[:, start + group_size :]
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


def inverse_factor(
    gram: Tensor,  # [K, K]
) -> Tensor:  # [K, K] float64, upper triangular
    """U with ``U^T U`` the inverse of the damped second moments."""
    damped = gram.double()
    mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = damped + DAMPING * mean * torch.eye(len(damped), dtype=torch.float64, device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _round_group(
    weight: Tensor,  # [N, g]
    factor: Tensor,  # [g, g], upper triangular
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # codes [N, g], scale [N, 1], zero [N, 1], errors [N, g]
    """Round columns one after the other; errors are divided by the factor's diagonal."""
    scale, zero = group_grid(weight[:, None])
    left = weight.T.contiguous()
    codes, errors = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    steps, first = scale.float()[:, 0], zero.float()[:, 0]
    for column in range(len(left)):
        codes[column] = group_codes(left[column], steps, first)
        rounded = torch.addcmul(first, codes[column].float(), steps)
        errors[column] = (left[column] - rounded) / factor[column, column]
        left[column + 1 :] -= torch.outer(factor[column, column + 1 :], errors[column])
    return codes.T, scale, zero, errors.T
