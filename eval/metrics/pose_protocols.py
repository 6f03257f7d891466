"""How published evaluations turn poses into one number: choice of frames, pair errors, aggregation.

Published numbers disagree because protocols do. `PROTOCOLS` has them by name; each docstring says what differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geoaccel.alignment import as_float64
from geoaccel.errors import UserError
from geoaccel.eval.metrics.pose import THRESHOLDS_DEG, fold, pair_scores, relative_pose_errors


@dataclass(frozen=True)
class PairErrors:
    """Errors of all pairs of one sequence; translation not folded, so that every variant can be derived."""

    rotation_deg: Tensor  # [P], 0 to 180
    translation_deg: Tensor  # [P], 0 to 180
    category: str = ""


@dataclass(frozen=True)
class PoseProtocol:
    """How a paper turns poses into one number: choice of frames, pair errors, aggregation.

    Frames are drawn by the data sets; the fields say how (``seed``, ``num_frames``, ``min_images``).
    """

    name: str
    num_frames: int = 10
    seed: int = 0
    min_images: int = 0
    fold_translation: bool = True
    direction: Literal["i_from_j", "j_from_i", "both"] = "i_from_j"
    aggregate: Literal["category_mean", "pooled"] = "pooled"
    thresholds_deg: tuple[int, ...] = THRESHOLDS_DEG

    def errors(
        self,
        pred: Tensor,  # [S, 3|4, 4], cam_from_world
        gt: Tensor,  # [S, 3|4, 4], cam_from_world
        category: str = "",
    ) -> PairErrors:
        """Errors of one sequence, in this protocol's pair direction and not folded yet."""
        rotation, translation = relative_pose_errors(pred, gt, fold_translation=False, direction=self.direction)
        return PairErrors(rotation, translation, category)

    def scores(self, sequences: Iterable[PairErrors]) -> dict[str, float]:
        """Scores of a data set, or of one sequence.

        Returns:
            ``auc_30``, ``rra_30``, ``rta_30`` and so on under this protocol's aggregation; the same with the suffixes
            ``_category_mean`` and ``_pooled``; and, as a separate column, ``auc_30_unfolded`` (and so on) if this
            protocol folds translations.
        """
        sequences = list(sequences)
        if not sequences:
            raise UserError(f"protocol {self.name}: there is no sequence to score")
        both = self._aggregates(sequences, folded=self.fold_translation)
        result = dict(both[self.aggregate])
        if self.fold_translation:
            unfolded = self._aggregates(sequences, folded=False)[self.aggregate]
            result |= {f"{key}_unfolded": value for key, value in unfolded.items() if key.startswith("auc")}
        for kind, values in both.items():
            result |= {f"{key}_{kind}": value for key, value in values.items()}
        return result

    def _aggregates(self, sequences: list[PairErrors], folded: bool) -> dict[str, dict[str, float]]:
        def score(chosen: list[PairErrors]) -> dict[str, float]:
            rotation = torch.cat([as_float64(s.rotation_deg) for s in chosen])
            translation = torch.cat([as_float64(s.translation_deg) for s in chosen])
            return pair_scores(rotation, fold(translation) if folded else translation, self.thresholds_deg)

        categories = sorted({s.category for s in sequences})
        each = [score([s for s in sequences if s.category == category]) for category in categories]
        mean = {key: sum(scores[key] for scores in each) / len(each) for key in each[0]}
        return {"category_mean": mean, "pooled": score(sequences)}


@dataclass(frozen=True)
class VggtCo3d(PoseProtocol):
    """VGGT's CO3Dv2 evaluation, "AUC@30 of 10 random frames".

    Ten frames of each test sequence with at least 50 images, drawn with NumPy seed 0, sequences in sorted order, so
    that a skipped sequence changes all later draws. 45 pairs, relative pose T_i T_j^-1, translation folded to 0-90.
    The AUC of a category is over the pairs of all its sequences; the mean over categories is unweighted. Depends on the
    order of the frames: the translation of a pair is compared in the frame of camera i.
    """

    name: str = "vggt-co3d"
    min_images: int = 50
    aggregate: Literal["category_mean", "pooled"] = "category_mean"


@dataclass(frozen=True)
class Pi3Co3d(PoseProtocol):
    """pi3's angular evaluation on CO3Dv2 and RealEstate10K.

    Differs from `vggt-co3d`: frames from frozen lists (made with seed 42), relative pose T_j T_i^-1, and all pairs of
    all sequences pooled, so that large categories weigh more. pi3's tables report 5, 15 and 30 degrees.
    """

    name: str = "pi3-co3d"
    seed: int = 42
    direction: Literal["i_from_j", "j_from_i", "both"] = "j_from_i"


@dataclass(frozen=True)
class Strict(PoseProtocol):
    """Ours: no folding, independent of frame order. Not comparable with published tables.

    Differs from `vggt-co3d`: translation is not folded (moving backwards is wrong, not right), and a pair's
    translation error is the larger one of both directions, so that the order of frames does not matter. Frames and
    the mean over categories are those of `vggt-co3d`.
    """

    name: str = "strict"
    min_images: int = 50
    fold_translation: bool = False
    direction: Literal["i_from_j", "j_from_i", "both"] = "both"
    aggregate: Literal["category_mean", "pooled"] = "category_mean"


PROTOCOLS: dict[str, PoseProtocol] = {protocol.name: protocol for protocol in (VggtCo3d(), Pi3Co3d(), Strict())}
