"""Scenes from the ``data`` group of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from geoaccel.errors import UserError
from geoaccel.eval.data.frames import RULES, FrameChoice, VggtReplay, apply_frame_list, choose_frames, read_frame_list
from geoaccel.eval.data.registry import DATASETS, OWN_SETTINGS, RENDERED, SEQUENCES, check_options
from geoaccel.eval.data.scene import MIN_FRAMES, EvalScene, Skipped
from geoaccel.eval.data.synthetic import SEED_SETS, VALIDATION_SEEDS, set_of
from geoaccel.registry import unknown

REPLAY = "replay"
ALL = "all"
# By setting: the smallest sensible value, and what to give.
NUMBERS = {
    "frames": (MIN_FRAMES, "of at least 2, since poses are scored in pairs, null for the rule's default, or all"),
    "scenes": (1, "of at least 1, names, or null for all"),
    "stride": (1, "of at least 1, or null for the preset's own"),
    "usual_stride": (1, "of at least 1"),
    "seed": (None, "such as 0"),
    "min_images": (0, "of at least 0, or null for the data set's own"),
}


@dataclass
class Source:
    """Source of scenes; calling it reads them from the start.

    Args:
        dataset: A name from ``DATASETS``.
        root: Its folder.
        frames: Frames per scene, at least two; None: the rule's default; ``all``: every frame, whatever the rule.
        scenes: The number of first scenes, a name, or several names; None for all.
        rule: Rule of :class:`geoaccel.eval.data.frames.FrameChoice`, or ``replay`` for VGGT's own draws on its lists.
        seed: For ``draw`` and ``replay``.
        stride: For the rule ``stride``, and for ``frames="all"``, which takes every frame by default.
        usual_stride: Default of ``stride`` for the rule ``stride``.
        frame_list: JSON file of frozen scenes and frames, in place of a rule.
        min_images: Scenes with fewer photographs are left out before frames are chosen; None for as many as the rule
            needs, and VGGT's 50 for ``replay``. A frozen list already fixes its scenes.
        split: Split of rendered scenes: ``validation``, ``report``, or ``training`` with ``options.seeds``; None if
            the seeds determine it.
        options: Options of the reader.
        need_poses: If False, also accept a folder of images without poses; their scenes have poses of NaN.

    Attributes:
        skipped: What the last reading left out, and why.

    Raises:
        ValueError: For an unknown data set or rule, or settings that conflict or have no effect.
    """

    dataset: str
    root: str | None = None
    frames: int | str | None = None
    scenes: int | Collection[str] | None = None
    rule: str = "all"
    seed: int = 0
    stride: int | None = None
    usual_stride: int = 1
    frame_list: str | None = None
    min_images: int | None = None
    split: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    need_poses: bool = True
    skipped: list[Skipped] = field(default_factory=list, repr=False, compare=False)
    _is_all: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        DATASETS[self.dataset]
        if self.rule not in (*RULES, REPLAY):
            raise UserError(unknown("frame rule", self.rule, [*RULES, REPLAY]))
        if self.rule == REPLAY and self.dataset != "co3d_lists":
            raise UserError("data.rule=replay repeats VGGT's draws on its own lists; use it with data=co3d_vggt")
        if isinstance(self.scenes, str):
            self.scenes = [self.scenes]
        elif isinstance(self.scenes, list | tuple | set):
            self.scenes = [str(name) for name in self.scenes]
        if self.frames == ALL:
            self._take_all()
        for name, (least, advice) in NUMBERS.items():
            given = getattr(self, name)
            open_ = {"scenes": given is None or isinstance(given, list)}
            open_ |= {name: getattr(self, name) is None for name in ("frames", "min_images", "stride")}
            if open_.get(name):
                continue
            if not isinstance(given, int) or isinstance(given, bool) or (least is not None and given < least):
                raise UserError(f"data.{name}={given}: give a whole number {advice}")
        if not isinstance(self.options, Mapping):
            raise UserError(f"data.options={self.options!r}: give options by name, as data.options.NAME=VALUE")
        for name in self.options:
            if name in OWN_SETTINGS:
                raise UserError(f"data.options.{name} is not an option of the reader; use {OWN_SETTINGS[name]}")
        check_options(DATASETS[self.dataset], self.options)
        self._check_used()
        if not self.is_rendered and self.root is None:
            raise UserError(f"data.root is not set; give the folder of the data set {self.dataset!r}")
        if self.root is not None:
            self.root = str(self.root)  # a folder may be called 2024
        if self._rule_counts:
            self._choice()
        if self.is_rendered:
            self.split = self._checked_split()
        elif self.split is not None:
            raise UserError(
                f"data.split={self.split} is only for rendered scenes; for other data sets use data.options.split"
            )

    def _take_all(self) -> None:
        """Use every frame of each scene, if the data set has a fixed set of frames."""
        others = {
            "rendered in any number": self.is_rendered,
            f"drawn by data.rule={REPLAY}": self.rule == REPLAY,
            "those of data.frame_list": self.frame_list is not None,
        }
        if why := next((words for words, holds in others.items() if holds), None):
            raise UserError(f"data.frames=all: frames of {self.dataset} are {why}; give a number, or null")
        self.frames, self.rule = None, ALL if self.stride in (None, 1) else "stride"
        self.stride = self.stride or 1
        self._is_all = True

    def _check_used(self) -> None:
        """Reject settings that the rule ignores, and determine the stride."""
        if self.stride not in (None, 1):
            if self.is_rendered or self.frame_list is not None or self.rule == REPLAY:
                what = "rendered scenes" if self.is_rendered else "data.frame_list" if self.frame_list else "replay"
                raise UserError(f"data.stride={self.stride} is not for {what}; leave it out")
            if self.rule != "stride":
                way = "use data.rule=stride or data.frames=all, or leave it out"
                raise UserError(f"data.stride={self.stride} is not for data.rule={self.rule}; {way}")
        if self.seed and self.is_rendered:
            raise UserError(f"data.seed={self.seed} does not choose scenes; use data.options.seeds=[1000,1001]")
        if self.stride is None:
            self.stride = self.usual_stride if self.rule == "stride" else 1

    @property
    def is_rendered(self) -> bool:
        """Whether scenes are rendered from seeds."""
        return self.dataset in RENDERED

    @property
    def is_sequence(self) -> bool:
        """Whether frames of a scene are in the order of the video."""
        return self.dataset in SEQUENCES and self.rule not in ("draw", REPLAY)

    @property
    def is_whole(self) -> bool:
        """Whether scenes may be as long as a video, that is, all frames of sequences."""
        return self.is_sequence and (self.rule == ALL or self._is_all) and self.frame_list is None

    def _checked_split(self) -> str:
        """The split of the scenes."""
        if self.split not in (None, *SEED_SETS):
            raise UserError(unknown("split", str(self.split), list(SEED_SETS)))
        seeds = self.options.get("seeds")
        if not isinstance(seeds, Iterable) or not all(isinstance(seed, int) for seed in seeds):
            seeds = []  # none given, or the reader rejects them
        found = list(dict.fromkeys(map(set_of, seeds)))
        split = self.split or (found[0] if found else "validation")
        for other in found:
            if other != split:
                raise UserError(
                    f"data.options.seeds has seeds of the {other} set but data.split={split}; evaluate each set "
                    f"separately, with data.split={other}"
                )
        if split == "training" and not found:
            raise UserError("data.split=training has no default scenes; give some, as data.options.seeds=[1000000]")
        return split

    @property
    def notes(self) -> list[str]:
        """Notes for the report on the origin of scenes and frames."""
        notes = [f"{self.split} scenes"] if self.split is not None else []
        if self.frame_list is not None:
            return [*notes, f"frames of {Path(self.frame_list).name}"]
        if self.rule == REPLAY:
            return [*notes, "frames drawn as VGGT draws them"]
        own = self.dataset != "folder" and not self.is_rendered and self.rule in ("draw", "evenly")
        return [*notes, "frames chosen by us"] if own else notes

    @property
    def _seeds(self) -> Collection[int]:
        assert self.split is not None
        usual = SEED_SETS[self.split][1]
        if self.dataset == "long_paths" and self.split == "validation":
            usual = VALIDATION_SEEDS
        return self.options.get("seeds", usual)

    @property
    def _rule_counts(self) -> bool:
        """Whether the rule chooses frames; those of rendered scenes, frozen lists and VGGT's draws are fixed."""
        return self.frame_list is None and not self.is_rendered and self.rule != REPLAY

    def _choice(self) -> FrameChoice:
        assert not isinstance(self.frames, str)
        assert self.stride is not None
        return FrameChoice(self.rule, frames=self.frames, stride=self.stride, seed=self.seed)

    def __len__(self) -> int:
        """Maximum number of scenes; 0 if only known at the end."""
        if isinstance(self.scenes, int):
            return self.scenes
        if self.scenes is not None:
            return len(self.scenes)
        return len(self._seeds) if self.is_rendered else 0

    def __call__(self) -> Iterator[EvalScene]:
        """Read the scenes."""
        self.skipped.clear()
        names = None if self.scenes is None or isinstance(self.scenes, int) else list(self.scenes)
        options = dict(self.options)
        if self.is_rendered:
            options |= {"seeds": self._seeds} | ({} if self.frames is None else {"num_frames": self.frames})
        if self.rule == REPLAY:
            given = {"frames": self.frames, "min_images": self.min_images}
            numbers: dict[str, Any] = {name: number for name, number in given.items() if number is not None}
            options["replay"] = VggtReplay(**numbers, seed=self.seed)
        if self.dataset == "folder" and not self.need_poses:
            options["need_poses"] = False
        found = DATASETS[self.dataset](self.root, scenes=names, on_skip=self.skipped.append, **options)
        chosen = self._choose(found)
        return islice(chosen, self.scenes) if isinstance(self.scenes, int) else iter(chosen)

    def _choose(self, found: Iterable[EvalScene]) -> Iterable[EvalScene]:
        if self.frame_list is not None:
            return apply_frame_list(found, read_frame_list(self.frame_list), on_skip=self.skipped.append)
        if not self._rule_counts:
            return found
        return choose_frames(self._long_enough(found), self._choice(), on_skip=self.skipped.append)

    def _long_enough(self, found: Iterable[EvalScene]) -> Iterator[EvalScene]:
        needed = self.min_images or 0
        for scene in found:
            if len(scene.frames) >= needed:
                yield scene
            else:
                reason = f"{len(scene.frames)} photographs, {needed} are needed (data.min_images)"
                self.skipped.append(Skipped(scene.name, reason))

    def describe(self) -> dict[str, Any]:
        """Plain data that determines which scenes and frames are predicted; without their number."""
        kept = ("dataset", "root", "frames", "rule", "seed", "stride", "frame_list", "min_images", "split", "options")
        return {name: getattr(self, name) for name in kept}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine which scenes and frames are scored, except the number of scenes."""
        found = self.describe()
        options = found.pop("options")
        names = None if self.scenes is None or isinstance(self.scenes, int) else list(self.scenes)
        found = {"scenes": names, **found, **{f"options.{name}": value for name, value in options.items()}}
        return {f"data.{name}": value for name, value in found.items()}


class Kept:
    """A source that is read once and kept in memory, for several evaluations of the same scenes.

    Rendered pixels are kept, too, from their first access: a rendered scene takes 6 MB with 8 frames of 224 x 224
    pixels, 51 MB with 64. Image files are read again. An interrupted reading starts over.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.scenes: list[EvalScene] | None = None

    def __call__(self) -> Iterator[EvalScene]:
        if self.scenes is not None:
            yield from self.scenes
            return
        read = []
        for scene in self.source():
            read.append(_held(scene))
            yield read[-1]
        self.scenes = read

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


def _held(scene: EvalScene) -> EvalScene:
    """The same scene, with cached readers."""

    def held(thing: Any, names: tuple[str, ...]) -> Any:
        return replace(thing, **{name: _Once(getattr(thing, name)) for name in names if getattr(thing, name)})

    frames = tuple(held(frame, ("read_image", "read_depth", "read_mask")) for frame in scene.frames)
    return held(replace(scene, frames=frames), ("read_points",))


class _Once:
    """A caching reader that returns copies."""

    def __init__(self, read: Callable[[], Tensor]) -> None:
        self.read = read
        self.kept: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.kept is None:
            self.kept = self.read()
        return self.kept.clone()
