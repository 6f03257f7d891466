"""A whole sequence through a model, window by window, in place of one forward over all of its frames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from geoaccel.alignment import Similarity
from geoaccel.atomic import write_text
from geoaccel.claims import resolve
from geoaccel.console import say, shows_progress
from geoaccel.errors import UserError
from geoaccel.eval.data.scene import EvalFrame, EvalScene
from geoaccel.eval.run.token_effects import effective_key_ratio, effective_ratio
from geoaccel.eval.run.trajectory import Trajectory
from geoaccel.images import load_images
from geoaccel.images.read import array_to_image
from geoaccel.images.sources import FilePicture, Picture
from geoaccel.inputs import fitted_to
from geoaccel.manifest import UNFINISHED
from geoaccel.windows import reconstruct_windows
from geoaccel.windows.graph import pieces, require_scipy
from geoaccel.windows.predict import Lengths, check_lengths, lengths_for
from geoaccel.windows.result import LongReconstruction
from geoaccel.windows.store import unfinished_folder


@dataclass(frozen=True)
class Windows:
    """How sequences are cut into windows and joined, as of :func:`geoaccel.windows.run.run_windows`.

    Args:
        frames: Of a window; ``auto``: as many as fit into memory, at most 60.
        overlap: Frames that come again in the next window; a half of the window by default.
        wide: Predict windows over every fourth frame, every sixteenth, ..., too.
        loops: Close loops.
        reference: The anchor of each window: ``auto`` or ``first``.

    Raises:
        ValueError: For windows that cannot be.
    """

    frames: int | str = "auto"
    overlap: int | None = None
    wide: bool = True
    loops: bool = True
    reference: str = "auto"

    def __post_init__(self) -> None:
        check_lengths(self.frames, self.overlap, called=("windows", "joining.overlap"))
        for name in ("wide", "loops"):
            if not isinstance(given := getattr(self, name), bool):
                raise UserError(f"joining.{name}={given}: give true or false")
        if self.reference not in ("auto", "first"):
            raise UserError(f"joining.reference={self.reference!r}: every window has its own; give auto or first")

    @classmethod
    def from_settings(cls, windows: Any, joining: Mapping[str, Any]) -> Windows | None:
        """Of ``configs/eval.yaml``; None where scenes are predicted in one forward.

        Raises:
            ValueError: For windows that cannot be, or a setting that says nothing without them.
            MissingPackage: SciPy is not there.
        """
        if windows is not None:
            require_scipy()
            return cls(windows, **joining)
        usual = cls()
        for name, given in joining.items():
            if given != getattr(usual, name):
                raise UserError(f"joining.{name}={given} is for windows; give windows=auto, too, or leave it out")
        return None

    def words(self, fixed: Lengths | None = None) -> str:
        """For the protocol of a report.

        Args:
            fixed: What `auto` took, where that is known.
        """
        known = "" if fixed is None else f" ({fixed.window})"
        length = f"as many frames as fit{known}" if self.frames == "auto" else f"{self.frames} frames"
        shared = "a half" if self.overlap is None else str(self.overlap)
        left_out = [name for name, used in (("wide windows", self.wide), ("loops", self.loops)) if not used]
        without = [f"without {' and '.join(left_out)}"] if left_out else []
        return ", ".join([f"windows of {length}", f"{shared} shared", *without])

    def why_not(self, scene: EvalScene) -> str | None:
        """Why a sequence cannot be cut like this."""
        count = len(scene.frames)
        if self.frames != "auto" and isinstance(self.frames, int) and self.frames > count:
            return f"windows={self.frames} is longer than the sequence of {count} frames; give at most {count}"
        return None


@dataclass(frozen=True)
class RenderedPicture:
    """A frame that is no file, rendered when it is asked for."""

    frame: EvalFrame
    name: str
    path: None = None

    @property
    def key(self) -> list[Any] | None:
        """What it is rendered from, as plain data; None where the reader does not show that."""
        read = self.frame.read_image
        if not isinstance(read, partial):
            return None
        key = [f"{read.func.__module__}.{read.func.__qualname__}", list(read.args), read.keywords]
        try:
            json.dumps(key)
        except (TypeError, ValueError):
            return None
        return key

    def read(self) -> Image.Image:
        return array_to_image(self.frame.image())


@dataclass(frozen=True)
class AutoLengths:
    """What ``windows=auto`` takes in a run: one length for all of its sequences, and for the dense model beside it.

    By itself `auto` follows the memory that is free at that moment, and trajectories in windows of different lengths
    do not compare. The first sequence decides, and the run has it from then on, also when it goes on another day.

    Attributes:
        path: File in the run's folder.
        of: Fingerprint of the dense configuration; lengths that another one left do not count.
    """

    path: Path
    of: str

    def read(self) -> Lengths | None:
        """What was taken; None where nothing was yet."""
        try:
            found = json.loads(self.path.read_text())
            return Lengths(found["window"], found["overlap"]) if found["of"] == self.of else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, lengths: Lengths) -> None:
        """Take it for the whole run, and say so."""
        write_text(self.path, json.dumps({**asdict(lengths), "of": self.of}) + "\n")
        say(f"windows=auto: {lengths.window} frames, {lengths.overlap} shared, for all sequences of this run")


class Ratios:
    """What merging did in the first forward of a sequence; a run that goes on from windows on disk has it from there.

    Args:
        path: Where it is kept, beside the windows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: tuple[float | None, float | None] = (None, None)
        with suppress(FileNotFoundError, ValueError):  # a damaged one goes, with its windows
            tokens, keys = json.loads(path.read_text())
            self.values = tokens, keys

    def __call__(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        """A hook for after a forward."""
        if not self.path.exists():
            self.values = effective_ratio(model), effective_key_ratio(model)
            write_text(self.path, json.dumps(self.values))


def lengths_of(model: Any, scene: EvalScene, windows: Windows, *, resize: bool) -> Lengths:
    """Window and overlap that fit into the memory that is free now.

    Args:
        model, scene, windows, resize: As of :func:`predict_sequence`.

    Raises:
        ValueError: If the first image cannot be read, or no window fits.
    """
    preprocess = fitted_to(model.preprocess, None if resize else _own_size(scene, model), None)
    height, width = load_images([picture_of(scene.frames[0])], preprocess).images.shape[-2:]
    return lengths_for(model, windows.frames, windows.overlap, (height, width))


def predict_sequence(
    model: Any, scene: EvalScene, windows: Windows, *, resize: bool, out: Path, auto: Lengths | None = None
) -> tuple[Trajectory, tuple[float | None, float | None]]:
    """Predict a sequence.

    Args:
        model: With its methods.
        scene: The sequence.
        windows: How it is cut and joined.
        resize: False: images are as large as the network is to see them.
        out: Where windows are kept beside while they come; a run that was killed goes on from there.
        auto: What ``windows=auto`` takes; None: as many frames as fit.

    Returns:
        What became of it; the effective ratio of its first window, and that of keys.

    Raises:
        ValueError: If an image cannot be read, or the model outputs numbers that are not finite.
    """
    pictures = [picture_of(frame) for frame in scene.frames]
    kept = unfinished_folder(resolve(out))
    if not kept.exists() and any(kept.parent.glob(f"*{UNFINISHED}")):
        say(f"{scene.name}: windows of other code, other versions or another machine are not taken; starting anew")
    ratios = Ratios(kept / "effective_ratios.json")
    handle = model.register_forward_hook(ratios)
    try:
        result = reconstruct_windows(
            pictures,
            model=model,
            out=out,
            formats=None,
            window=windows.frames,
            overlap=windows.overlap,
            auto=auto,
            wide=windows.wide,
            loops=windows.loops,
            reference=windows.reference,
            size=None if resize else _own_size(scene, model),
            progress=shows_progress(),
            tell=lambda line: say(f"{scene.name}: {line}"),
        )
    except torch.linalg.LinAlgError:  # a rotation may come of an SVD, which refuses such numbers
        raise UserError("the model predicted NaN or infinite numbers (cameras)") from None
    finally:
        handle.remove()
    merged, keys = ratios.values
    return trajectory_of(result), (merged, keys)


def picture_of(frame: EvalFrame) -> Picture:
    """A frame as windows read it."""
    if frame.image_path is not None:
        return FilePicture(frame.image_path, frame.name)
    return RenderedPicture(frame, frame.name)


def _own_size(scene: EvalScene, model: Any) -> int:
    """The size at which the network sees the first frame as it is."""
    height, width = scene.frames[0].size()
    size = max(height, width)
    seen = load_images([picture_of(scene.frames[0])], fitted_to(model.preprocess, size, None)).images.shape[-2:]
    if tuple(seen) != (height, width):
        raise UserError(
            f"{scene.name}: the network would see {width} x {height} pixels as {seen[1]} x {seen[0]}; set "
            "data.resize=true"
        )
    return size


def trajectory_of(result: LongReconstruction) -> Trajectory:
    """The tensors of a result."""
    joined = result.joined
    count, frames = len(joined.parts), len(result.names)
    joints = pieces(count, [edge for edge in joined.edges if not edge.loop and not edge.wide])
    owner = torch.zeros(frames, dtype=torch.long)
    for piece in result.pieces:
        owner[piece.frames] = torch.tensor(piece.part)
    poses = []
    for part in joined.parts:
        start, own = result.windows[part.window]
        poses.append(own[part.start - start : part.stop - start])
    wide = [[one.frames[0], one.frames[-1], one.frames.step, int(one.used)] for one in joined.wide]
    tried = [[loop.match.first, loop.match.second, int(loop.closed)] for loop in joined.loops]
    return Trajectory(
        cam_from_world=_of_frames(result.pieces, frames),
        part_piece=_numbers(joined.pieces, count),
        scale=_scales(joined.similarities),
        rotation=_rotations(joined.similarities),
        open_cam_from_world=_of_frames(result.unclosed, frames),
        open_part_piece=_numbers(joints, count),
        open_scale=_scales(joined.unclosed),
        open_rotation=_rotations(joined.unclosed),
        owner=owner,
        parts=torch.tensor([[part.window, part.start, part.stop] for part in joined.parts]),
        part_poses=torch.cat(poses),
        cuts=torch.tensor(joined.cuts, dtype=torch.long),
        wide=torch.tensor(wide, dtype=torch.long).reshape(-1, 4),
        loops=torch.tensor(tried, dtype=torch.long).reshape(-1, 3),
        lengths=torch.tensor([result.lengths.window, result.lengths.overlap]),
    )


def _of_frames(found: Any, frames: int) -> Tensor:  # [S, 4, 4], float64
    poses = torch.full((frames, 4, 4), torch.nan, dtype=torch.float64)
    for piece in found:
        poses[piece.frames] = piece.cam_from_world.double()
    return poses


def _numbers(groups: list[list[int]], count: int) -> Tensor:  # [P]
    numbers = torch.zeros(count, dtype=torch.long)
    for number, group in enumerate(groups):
        numbers[group] = number
    return numbers


def _scales(similarities: list[Similarity]) -> Tensor:  # [P], float64
    return torch.stack([one.scale.double() for one in similarities])


def _rotations(similarities: list[Similarity]) -> Tensor:  # [P, 3, 3], float64
    return torch.stack([one.rotation.double() for one in similarities])
