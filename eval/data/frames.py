"""Which frames of a scene are evaluated: rules that depend only on the scene, frozen lists, and VGGT's own draws.

Published protocols draw frames from one random generator for a whole run, so one missing scene changes the frames of
all later ones. The rules here depend only on the scene; `write_frame_list` freezes their choice:

    scenes = choose_frames(scenes, FrameChoice("draw", frames=10, seed=0), on_skip=skipped.append)
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geoaccel.atomic import write_text
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import MIN_FRAMES, EvalScene, OnSkip, Skipped, log_skip
from geoaccel.registry import unknown

RULES = ("all", "evenly", "stride", "steps", "draw")


@dataclass(frozen=True)
class FrameChoice:
    """A rule that chooses frames.

    ``all``      every frame
    ``evenly``   `frames` evenly spaced frames, including the first and the last
    ``stride``   every `stride`-th frame, starting at the first; only the first `frames` of them if given
    ``steps``    the first frame, then every ``(count - 1) // (frames - 1)``-th of the others from the second on,
                 `frames` in all; every frame if there are no more than that. FastVGGT samples ScanNet like this: 300
                 of 1,000 are 0, 1, 4, 7, ... 895
    ``draw``     `frames` distinct frames in random order, a function of `seed`, the scene's name and its frame count

    Args:
        rule: One of these.
        frames: How many; scenes with fewer are unusable, except for ``steps``. ``all`` takes no number.
        stride: For ``stride`` only.
        seed: For ``draw`` only.
    """

    rule: str = "all"
    frames: int | None = None
    stride: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(unknown("frame rule", self.rule, list(RULES)))
        if self.stride < 1 or (self.frames is not None and self.frames < MIN_FRAMES):
            raise UserError(
                f"frames={self.frames}, stride={self.stride}: give at least {MIN_FRAMES} frames and stride 1"
            )
        if (self.frames is None) != (self.rule == "all") and self.rule != "stride":
            raise UserError(f"frames={self.frames} with rule {self.rule!r}: 'all' takes no number, the others need one")

    def indices(self, name: str, count: int) -> list[int]:
        """Indices into the `count` frames of scene `name`.

        Raises:
            ValueError: The scene has too few.
        """
        step = self.stride if self.rule == "stride" else 1
        available = len(range(0, count, step))
        needed = MIN_FRAMES if self.frames is None or self.rule == "steps" else self.frames
        if available < needed:
            every = f" ({available} at stride {step})" if step > 1 else ""
            fewer = f"; data.frames={available} uses all" if available >= MIN_FRAMES else ""
            raise UserError(f"{count} frames{every}, {needed} are needed{fewer}")
        frames = self.frames or available
        if self.rule == "evenly":
            # rounded half up in integers
            return [(2 * i * (count - 1) + frames - 1) // (2 * (frames - 1)) for i in range(frames)]
        if self.rule == "steps" and count > frames:
            return [0, *range(1, count, (count - 1) // (frames - 1))][:frames]
        if self.rule == "draw":
            # sorting by hash avoids a generator whose stream could change between versions
            keys = [hashlib.sha256(f"{self.seed}/{name}/{i}".encode()).digest() for i in range(count)]
            return sorted(range(count), key=keys.__getitem__)[:frames]
        return list(range(0, count, step))[:frames]


def choose_frames(
    scenes: Iterable[EvalScene], choice: FrameChoice, *, on_skip: OnSkip | None = None
) -> Iterator[EvalScene]:
    """Yield the scenes with the chosen frames; those with too few are skipped.

    Args:
        scenes: Scenes from a reader.
        choice: The rule.
        on_skip: Called with each scene that is left out.
    """
    for scene in scenes:
        try:
            yield scene.subset(choice.indices(scene.name, len(scene.frames)))
        except UserError as error:
            (on_skip or log_skip)(Skipped(scene.name, str(error)))


def write_frame_list(path: str | Path, scenes: Iterable[EvalScene]) -> None:
    """Freeze scenes and frames as JSON: ``{scene: [names of frames], ...}``."""
    frozen = {scene.name: [frame.name for frame in scene.frames] for scene in scenes}
    write_text(path, json.dumps(frozen, indent=1) + "\n")


def read_frame_list(path: str | Path) -> dict[str, list[str]]:
    """Read the output of `write_frame_list`.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        frozen = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if any(not isinstance(n, str) for names in frozen.values() for n in list(names)):
            raise TypeError("a frame name is not text")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a frame list ({error}); expected {{scene: [frame names], ...}}") from None
    return frozen


def apply_frame_list(
    scenes: Iterable[EvalScene], frozen: Mapping[str, Sequence[str]], *, on_skip: OnSkip | None = None
) -> Iterator[EvalScene]:
    """Yield the scenes of a frozen list with exactly its frames; what is missing is skipped, never replaced.

    Args:
        scenes: Scenes from a reader. Those that are not in the list are ignored.
        frozen: Output of `read_frame_list`.
        on_skip: Called with each scene of the list that lacks a frame, and at the end with the missing scenes.
    """
    report, seen = on_skip or log_skip, set()
    for scene in scenes:
        if scene.name not in frozen:
            continue
        seen.add(scene.name)
        index = {frame.name: i for i, frame in enumerate(scene.frames)}
        missing = [name for name in frozen[scene.name] if name not in index]
        if len(frozen[scene.name]) < MIN_FRAMES:
            few = f"{len(frozen[scene.name])} frame(s) in the list, need at least {MIN_FRAMES}"
            report(Skipped(scene.name, few))
        elif missing:
            report(Skipped(scene.name, f"{len(missing)} frame(s) of the list are missing, the first is {missing[0]!r}"))
        else:
            yield scene.subset([index[name] for name in frozen[scene.name]])
    for name in frozen:
        if name not in seen:
            report(Skipped(name, "in the frame list, but not in the dataset"))


@dataclass(frozen=True)
class VggtReplay:
    """The random draws of VGGT's CO3D evaluation, in its order, with its generators.

    Args:
        frames: Frames per sequence: 10 in VGGT, 8 in LiteVGGT.
        seed: Seed of both generators.
        min_images: Shorter sequences are skipped without drawing; so are those with fewer than `frames`, at which the
            original stops.
        max_sequences: Sequences drawn per category: 10 for ``--fast_eval``, 20 in QuantVGGT, None for all.
    """

    frames: int = 10
    seed: int = 0
    min_images: int = 50
    max_sequences: int | None = None

    def start(self) -> VggtDraws:
        """Start a run. All sequences must be requested, in order."""
        return VggtDraws(self)


class VggtDraws:
    """State of a run of `VggtReplay`."""

    def __init__(self, replay: VggtReplay) -> None:
        self._replay = replay
        self._sequences = random.Random(replay.seed)
        self._frames = np.random.RandomState(replay.seed)  # NumPy keeps this stream frozen, and VGGT used it

    def sequences(self, names: list[str]) -> list[str]:
        """The evaluated sequences of one category, given all of its names in sorted order."""
        count = self._replay.max_sequences
        if count is None or len(names) < count:
            return names
        return sorted(self._sequences.sample(names, count))

    def indices(self, count: int) -> tuple[list[int], str | None]:
        """Frames of the next sequence, which has `count`; or none, and the reason."""
        needed = max(self._replay.min_images, self._replay.frames)
        if count < needed:
            return [], f"{count} frames, {needed} are needed"
        return self._frames.choice(count, self._replay.frames, replace=False).tolist(), None
