"""Calibration images for quantization, and the check that none of them is used in evaluation afterwards.

Three kinds: rendered scenes, from seeds that no evaluation uses; folders of photographs, one scene each; sequences of a
CO3D folder, from the training split. The provenance records seeds and fingerprints of the files, so that copies under
other names are found, too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoaccel.backbone import Geometry
from geoaccel.errors import UserError
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.data.synthetic import FIRST_TRAIN_SEED, checked_seeds, sample_batch
from geoaccel.fingerprint import of_file
from geoaccel.images import check_file, is_photograph, load_images, natural_key
from geoaccel.models.files import read_tensors, resolve
from geoaccel.quantization.calibrate.clip import Clip


@torch.inference_mode()
def predict(model: nn.Module, clip: Clip) -> Geometry:
    """Prediction for one clip, on the CPU.

    Raises:
        ValueError: If the prediction is not finite.
    """
    network: Any = model
    parameter = next(model.parameters())
    images = clip.load().to(parameter.device)
    found: Geometry = network.backbone.geometry(model(images), tuple(images.shape[-2:]))
    for name, tensor in vars(found).items():
        if not tensor.isfinite().all():
            raise UserError(f"the model predicted NaN or infinite numbers in {name} on {clip.name}; leave it out")
    return Geometry(**{name: tensor.cpu() for name, tensor in vars(found).items()})


@dataclass(frozen=True)
class CalibrationScenes:
    """Scenes to calibrate on.

    Args:
        folders: One scene each; longer ones are split into clips. Without these and ``co3d``, scenes are rendered.
        co3d: A CO3Dv2 folder; sequences are drawn from the training split of ``co3d_subset``.
        categories: CO3D categories; empty for all.
        co3d_subset: One of CO3D's set lists.
        scenes: How many to render or to draw.
        frames: Photographs per forward.
        first_seed: First seed of rendered scenes; for CO3D, seed of the draw.
        evaluation: Folders and files with the photographs of the evaluation: none of these may be used.

    Raises:
        ValueError: If nothing is left to calibrate on, or rendered scenes belong to an evaluation.
    """

    folders: tuple[str, ...] = ()
    co3d: str | None = None
    categories: tuple[str, ...] = ()
    co3d_subset: str = "fewview_train"
    scenes: int = 8
    frames: int = 8
    first_seed: int = FIRST_TRAIN_SEED
    evaluation: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for knob in ("scenes", "frames"):
            if getattr(self, knob) < 1:
                raise UserError(f"{knob}={getattr(self, knob)} leaves nothing to calibrate on; give 1 or more")
        if self.folders and self.co3d is not None:
            raise UserError("both folders and CO3D were given for calibration; choose one")
        if self.rendered:
            checked_seeds(self._seeds, "calibrate on", "training")

    @property
    def rendered(self) -> bool:
        return not self.folders and self.co3d is None

    @property
    def _seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.scenes)

    def clips(self, model: nn.Module) -> list[Clip]:
        """The clips for a model; nothing is rendered or decoded yet.

        Raises:
            ValueError: If a folder holds no photographs, or a photograph is one of the evaluation's.
            FileNotFoundError: For a path that does not exist.
        """
        preprocess: Any = model.preprocess
        if self.rendered:
            size = (preprocess.size, preprocess.size)
            return [rendered_clip(seed, self.frames, size) for seed in self._seeds]
        sources = [find_photographs(folder) for folder in self.folders] if self.folders else self._from_co3d()
        clips = []
        for name, files, poses in sources:
            for start in range(0, len(files), self.frames):
                part = slice(start, start + self.frames)
                truth = None if poses is None else partial(_rows, poses, part)
                load = partial(_load, files[part], preprocess)
                clips.append(Clip(f"{name}[{start}]", load, truth, tuple(files[part])))
        self._refuse_overlap(clips)
        return clips

    def describe(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """The scenes used, for the provenance of the result; without their order."""
        if self.rendered:
            return {"rendered_seeds": [self.first_seed, self.first_seed + self.scenes - 1], "frames": self.frames}
        names = [f"{path.parent.name}/{path.name}" for clip in clips for path in clip.files]
        digests = [of_file(path) for clip in clips for path in clip.files]
        return {"photographs": dict(zip(digests, names, strict=True)), "frames": self.frames}

    def _from_co3d(self) -> list[tuple[str, list[Path], Tensor | None]]:
        """Sequences drawn from the whole training split, with evenly spaced frames of each."""
        assert self.co3d is not None
        wanted = list(self.categories) or None
        read = DATASETS["co3d"](self.co3d, scenes=wanted, subset=self.co3d_subset, split="train")
        found = [scene for scene in read if len(scene.frames) >= self.frames]
        if not found:
            raise UserError(
                f"no sequence under {self.co3d} has {self.frames} training photographs in {self.co3d_subset}; use "
                "fewer frames, or another subset"
            )
        draw = random.Random(self.first_seed).sample(found, min(self.scenes, len(found)))
        chosen: list[tuple[str, list[Path], Tensor | None]] = []
        for scene in draw:
            step = len(scene.frames) / self.frames
            part = scene.subset([int(step * i) for i in range(self.frames)])
            chosen.append((scene.name, part.image_paths, part.cam_from_world))
        return chosen

    def _refuse_overlap(self, clips: Sequence[Clip]) -> None:
        judged = {of_file(path): path for place in self.evaluation for path in _files(Path(place).expanduser())}
        for clip in clips:
            for path in clip.files if judged else ():
                if of_file(path) in judged:
                    raise UserError(
                        f"calibration photograph {path} is also in the evaluation set ({judged[of_file(path)]}); "
                        "calibrate on other scenes"
                    )


def refuse_calibration_scenes(model: str, scenes: Sequence[EvalScene] | Iterator[EvalScene]) -> Iterator[EvalScene]:
    """Pass scenes of an evaluation through, unless the checkpoint was calibrated on one of their photographs.

    Args:
        model: Name or path of the checkpoint.
        scenes: Scenes of the evaluation.

    Raises:
        ValueError: At the first such scene.
    """
    used = _calibration_of(json.loads(read_tensors(resolve(model))[1].get("provenance", "{}")))
    digests = used.get("photographs", {})
    first, last = used.get("rendered_seeds", (0, -1))
    for scene in scenes:
        seed = scene.name.removeprefix("seed")
        seen = scene.name != seed and seed.isdigit() and first <= int(seed) <= last
        if seen or any(of_file(path) in digests for path in (scene.image_paths if digests else ())):
            raise UserError(
                f"{model} was calibrated on photographs of scene {scene.name}, so its score there is biased; "
                "evaluate or calibrate on other scenes"
            )
        yield scene


def _calibration_of(provenance: Mapping[str, Any]) -> Mapping[str, Any]:
    """Calibration record of a file, or of the file that it was made from."""
    if "calibration" in provenance:
        return provenance["calibration"]
    before = provenance.get("source_provenance")
    return _calibration_of(before) if isinstance(before, Mapping) else {}


def find_photographs(folder: str) -> tuple[str, list[Path], None]:
    """Name and photographs of a calibration folder, without cameras; no pixels are decoded.

    Raises:
        ValueError: If it has none, or one is not an image.
        FileNotFoundError: If it does not exist.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to calibrate on")
    files = [path for path in place.iterdir() if is_photograph(path)]
    if not files:
        raise UserError(f"the calibration set is empty: folder {folder} holds no photographs; give one that does")
    for path in files:
        check_file(path)
    return place.name, sorted(files, key=natural_key), None


def _files(place: Path) -> list[Path]:
    if not place.exists():
        raise FileNotFoundError(f"no folder or file {place} with evaluation photographs; give one that exists")
    found = place.rglob("*") if place.is_dir() else [place]
    return [path for path in found if is_photograph(path)]


def _load(files: list[Path], preprocess: Any) -> Tensor:
    return load_images(files, preprocess).images[None]


def _rows(poses: Tensor, part: slice) -> Tensor:
    return poses[part]


def rendered_clip(seed: int, frames: int, size: tuple[int, int]) -> Clip:
    """A scene rendered from its seed, for calibration or model selection.

    Raises:
        ValueError: If it is in the report set.
    """
    checked_seeds([seed], "calibrate or choose on", "training", "validation")
    return Clip(f"seed{seed}", partial(_render, seed, frames, size), partial(_cameras, seed, frames, size))


def _render(seed: int, frames: int, size: tuple[int, int]) -> Tensor:
    return sample_batch([seed], frames=frames, size=size).images


def _cameras(seed: int, frames: int, size: tuple[int, int]) -> Tensor:
    # Cameras do not depend on the image size, only on the aspect ratio.
    small = (2, 2 * size[1] // size[0])
    return sample_batch([seed], frames=frames, size=small).cam_from_world[0].double()
