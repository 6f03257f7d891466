"""How well patches of one frame match another frame: pairs of frames by the ratio test of feature matching.

A match is good if it is better than one that must be wrong (Lowe's ratio test). Elsewhere in its own frame a patch has
no correspondence: its best match there gives the similarity of unrelated patches in this scene and for this encoder.
What all patches have in common (a mean, a position embedding, high cosines throughout) cancels in the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_OTHERS = 32
"""Frames that a frame is compared with, evenly spread over the scene."""
MOST_PATCHES = 64
"""About this many patches of a frame are matched; if there are more, neighbours are averaged, which makes the result
nearly independent of image size."""
NEAR = 4
"""Patches closer than this fraction of the frame, horizontally and vertically, do not count as elsewhere."""
FRAMES_AT_ONCE = 256
"""Frames matched with themselves at a time."""
LEAST = 1e-4
"""Least distance: patches of a black frame are identical."""


@dataclass(frozen=True)
class FrameMatches:
    """Frames against frames.

    Attributes:
        ratios: [S, M], log ratio of the distances (1 - cosine) of patches to their best match in the other frame and
            elsewhere in their own, each averaged over the patches of a frame; mean of both directions. Below zero the
            other frame shows the same thing. Entries of a frame with itself are meaningless.
        others: [M], indices of those frames; all frames if there are at most MOST_OTHERS.
    """

    ratios: Tensor
    others: Tensor


def averaged(
    patches: Tensor,  # [S, h * w, C]
    grid: tuple[int, int],
    most: int,
) -> tuple[Tensor, tuple[int, int]]:  # [S, h' * w', C], and its grid
    """Means over squares of neighbours, so that a frame has at most about `most` patches; in float32."""
    step = max(1, round((grid[0] * grid[1] / most) ** 0.5))
    maps = F.avg_pool2d(patches.float().transpose(1, 2).unflatten(-1, grid), step, ceil_mode=True)
    return maps.flatten(2).transpose(1, 2), (maps.shape[2], maps.shape[3])


def evenly_spread(frames: int) -> Tensor:  # [M]
    """The frames that all others are compared with."""
    return torch.linspace(0, frames - 1, min(frames, MOST_OTHERS)).round().long().unique()


@torch.no_grad()
def frame_matches(
    patches: Tensor,  # [S, h * w, C]
    grid: tuple[int, int],
) -> FrameMatches:
    """Match the patches of all frames, as the encoder sees them; the result is on the CPU."""
    x, (height, width) = averaged(patches, grid, MOST_PATCHES)
    x = F.normalize(x, dim=-1)
    spread = evenly_spread(len(x))
    others = x[spread.to(x.device)]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = ((line.flatten()[:, None] - line.flatten()).abs() for line in (rows, columns))
    near = ((down <= round(height / NEAR)) & (across <= round(width / NEAR))).to(x.device)
    elsewhere = [(part @ part.mT).masked_fill_(near, -1.0).amax(dim=2).mean(dim=1) for part in x.split(FRAMES_AT_ONCE)]
    there, here = [], []
    for frame in x:
        cosines = (others.flatten(0, 1) @ frame.T).unflatten(0, (-1, len(frame)))  # [M, q, p]
        there.append(cosines.amax(dim=1).mean(dim=1))  # patches of this frame in the others
        here.append(cosines.amax(dim=2).mean(dim=1))  # those of the others in this frame
    own, out, back = (_far(found).cpu() for found in (torch.cat(elsewhere), torch.stack(there), torch.stack(here)))
    return FrameMatches(((out - own[:, None]) + (back - own[spread])) / 2, spread)


def _far(cosines: Tensor) -> Tensor:
    """Logarithm of the distance."""
    return (1 - cosines).clamp(min=LEAST).log()
