"""Encoder runs recorded by a patch since the last prompt, and the selection of those of the next one.

An encoder may run for other reasons in between: features requested by hand, or a generation that stops before its
language model. The runs of a prompt are the last ones before it; earlier ones are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.mllm.hosts.streams import Method, VisualSlots, frame_numbers, plan_slots
from geoaccel.mllm.saliency import SaliencyProbe
from geoaccel.mllm.token_plan import TokenPlan


class Heard:
    """Runs of the 2D encoder and of the geometry merger.

    Args:
        probe: Records saliency.
        merge: Patches along the side of a token.
        image_id, video_id: Ids of placeholders.
    """

    def __init__(self, probe: SaliencyProbe, merge: int, image_id: int, video_id: int) -> None:
        self._probe, self._merge = probe, merge
        self._image_id, self._video_id = image_id, video_id
        self.forget()

    def listen(self) -> None:
        """Record for one prompt; earlier records are dropped."""
        self.forget()
        self._probe.__enter__()

    def forget(self) -> None:
        """Drop everything, and stop recording."""
        self._grids: list[list[int]] = []  # of the run that has begun
        self._runs: list[tuple[list[list[int]], Tensor]] = []  # grids and tokens of each run that ended
        self._features: list[Tensor] = []
        self._probe.__exit__()

    def begin(self, grids: list[list[int]]) -> None:
        """The encoder starts on these images or videos."""
        self._grids = grids

    def end(self, tokens: Tensor) -> None:
        """The encoder returned these tokens [n, C]."""
        self._runs.append((self._grids, tokens))

    def geometry(self, features: Tensor) -> None:
        """The geometry merger returned these features [n, C]."""
        self._features.append(features)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each run of the encoder."""
        return [len(tokens) for _, tokens in self._runs]

    def visual(self, ids: Tensor) -> Tensor:  # [B, L], bool
        """True for slots of visual tokens."""
        return (ids == self._image_id) | (ids == self._video_id)

    def plan(self, ids: Tensor, method: Method) -> tuple[TokenPlan, list[int]]:
        """A plan for the visual slots of prompts [B, L], and the lengths of the runs that are not theirs.

        Raises:
            ValueError: If no runs fit, saying why; and as :func:`plan_slots`.
        """
        videos = int((ids == self._video_id).sum())
        first = self._first_run(ids, videos)
        runs = self._runs[first:]
        sem = torch.cat([tokens for _, tokens in runs])
        plan = plan_slots(
            # Encoders run on images first, then on videos.
            VisualSlots.of(ids, self._image_id, self._video_id, (len(sem) - videos, videos)),
            method,
            scores=self._probe.scores[-len(sem) :],
            sem=sem,
            frame_of=frame_numbers([grid for grids, _ in runs for grid in grids], self._merge),
            geometry=self._last_features(len(sem)),
        )
        return plan, self.lengths[:first]

    def _first_run(self, ids: Tensor, videos: int) -> int:
        """First run whose tokens belong to these prompts."""
        slots, sums = int(self.visual(ids).sum()), _sums_to_the_end(self.lengths)
        if slots == sums[0]:
            return 0
        # Some of the runs can fit by chance only, and seldom do where images also have to end as a run does.
        if slots in sums and videos in (0, *sums):
            return sums.index(slots)
        for total in sums:
            if slots > total > 0 and slots % total == 0 and _repeats(ids, slots // total):
                raise UserError(
                    f"{slots} visual slots for {total} tokens of the encoder: a patch allows one output per prompt, "
                    f"not {slots // total}; leave out num_beams and num_return_sequences, or remove the patch and use "
                    "reduce_for_generate(...)"
                )
        raise _no_fit(
            f"{slots} visual slots, and neither all nor the last of the {_listed(self.lengths)} tokens that the "
            "encoder made since the last prompt fit"
        )

    def _last_features(self, rows: int) -> Tensor | None:
        if not self._features:
            return None
        sums = _sums_to_the_end([len(features) for features in self._features])
        return torch.cat(self._features[sums.index(rows) if rows in sums else 0 :])


def in_pieces(slots: int, runs: list[int]) -> UserError:
    """The error for visual slots after the cached beginning of their prompt."""
    return _no_fit(
        f"{slots} visual slots after the beginning of a prompt, which had none for {_listed(runs)} tokens of the "
        "encoder"
    )


def _no_fit(what: str) -> UserError:
    return UserError(
        f"{what}: a patch needs an unreduced prompt in one piece, with pixels from the same call of the processor; "
        "leave out prefill_chunk_size, or remove the patch and use reduce_for_generate(...)"
    )


def _listed(runs: list[int]) -> str:
    return " + ".join(map(str, runs))


def _sums_to_the_end(lengths: list[int]) -> list[int]:
    return [sum(lengths[first:]) for first in range(len(lengths))]


def _repeats(ids: Tensor, times: int) -> bool:
    """Whether each prompt is repeated `times` times in a row."""
    return len(ids) % times == 0 and ids.equal(ids[::times].repeat_interleave(times, dim=0))
