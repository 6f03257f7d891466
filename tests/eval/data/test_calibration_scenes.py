"""What a network is calibrated on: rendered scenes, folders, CO3D; and that it does not judge itself by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from geoaccel.eval.data.calibration import CalibrationScenes, refuse_calibration_scenes
from geoaccel.eval.data.co3d_layout import from_scenes, write_co3d
from geoaccel.eval.data.registry import DATASETS
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.data.synthetic import sample_batch
from geoaccel.models.weights import save_model


def photographs(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for index in range(first, first + count):
        pixels = torch.randint(0, 255, (30, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def co3d(tmp_path: Path) -> Path:
    batch = sample_batch([3, 4, 5], frames=6, size=(28, 28))
    write_co3d(tmp_path / "co3d", from_scenes(batch), subset="fewview_train", split="train")
    return tmp_path / "co3d"


def test_folders_are_split_into_clips(tiny: nn.Module, tmp_path: Path) -> None:
    folders = (str(photographs(tmp_path / "a", 3)), str(photographs(tmp_path / "b", 2, first=9)))
    (tmp_path / "a" / "._0.png").touch()  # macOS puts such files beside pictures
    scenes = CalibrationScenes(folders, frames=2)
    clips = scenes.clips(tiny)
    assert [clip.name for clip in clips] == ["a[0]", "a[2]", "b[0]"]
    assert [clip.load().shape[:2] for clip in clips] == [(1, 2), (1, 1), (1, 2)]
    # In natural order: 9 before 10.
    assert [path.name for clip in clips for path in clip.files] == ["0.png", "1.png", "2.png", "9.png", "10.png"]
    assert all(clip.truth is None for clip in clips)
    assert list(scenes.describe(clips)["photographs"].values()) == [
        "a/0.png",
        "a/1.png",
        "a/2.png",
        "b/9.png",
        "b/10.png",
    ]


def test_rendered_scenes(tiny: nn.Module) -> None:
    scenes = CalibrationScenes(scenes=2, frames=3)
    first, second = scenes.clips(tiny)
    side = tiny.preprocess.size
    assert first.load().shape == (1, 3, 3, side, side)
    assert torch.equal(first.load(), first.load())
    assert not torch.equal(first.load(), second.load())
    assert scenes.describe([first, second])["rendered_seeds"] == [1_000_000, 1_000_001]
    truth = sample_batch([1_000_000], frames=3, size=(side, side)).cam_from_world[0]
    assert first.truth is not None
    assert torch.equal(first.truth().float(), truth)


def test_co3d_draws_training_sequences(tiny: nn.Module, co3d: Path) -> None:
    scenes = CalibrationScenes(co3d=str(co3d), scenes=2, frames=3)
    clips = scenes.clips(tiny)
    assert [clip.name for clip in clips] == [clip.name for clip in scenes.clips(tiny)]
    other = CalibrationScenes(co3d=str(co3d), scenes=3, frames=3, first_seed=1)
    assert len({clip.name for clip in other.clips(tiny)}) == 3
    for clip in clips:
        assert [path.name for path in clip.files] == ["frame000001.jpg", "frame000003.jpg", "frame000005.jpg"]
        assert clip.load().shape[:2] == (1, 3)
        assert clip.truth is not None
        seed = int(clip.name.partition("seed")[2].partition("[")[0])
        expected = sample_batch([seed], frames=6, size=(28, 28)).cam_from_world[0, ::2]
        torch.testing.assert_close(clip.truth().float(), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"no sequence under .* has 7 training photographs"):
        CalibrationScenes(co3d=str(co3d), frames=7).clips(tiny)
    with pytest.raises(FileNotFoundError, match="fewview_dev"):
        CalibrationScenes(co3d=str(co3d), frames=3, co3d_subset="fewview_dev").clips(tiny)


def test_the_test_split_of_co3d_is_never_drawn(tiny: nn.Module, tmp_path: Path) -> None:
    batch = sample_batch([3], frames=6, size=(28, 28))
    write_co3d(tmp_path / "co3d", from_scenes(batch), subset="fewview_train", split="test")
    with pytest.raises(ValueError, match="no sequence"):
        CalibrationScenes(co3d=str(tmp_path / "co3d"), frames=3).clips(tiny)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"scenes": 0}, "scenes=0 leaves nothing to calibrate on"),
        ({"frames": 0}, "frames=0 leaves nothing to calibrate on"),
        (
            {"first_seed": 5},
            r"cannot calibrate on seed 5: it is in the validation set; use training seeds \(from 1000",
        ),
        (
            {"first_seed": 8255},
            "cannot calibrate on seed 8255: it is in the report set, on which nothing may be chosen",
        ),
        ({"folders": ("a",), "co3d": "b"}, "both folders and CO3D were given"),
    ],
)
def test_bad_settings(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CalibrationScenes(**knobs)


def test_empty_and_missing_folders(tiny: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"calibration set is empty: folder .*empty holds no photographs"):
        CalibrationScenes((str(tmp_path / "empty"),)).clips(tiny)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        CalibrationScenes((str(tmp_path / "nowhere"),)).clips(tiny)
    photos = str(photographs(tmp_path / "a", 2))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CalibrationScenes((photos,), evaluation=(str(tmp_path / "nowhere"),)).clips(tiny)


def test_photographs_of_the_evaluation_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    photos = photographs(tmp_path / "a", 3)
    judged = photographs(tmp_path / "eval" / "scene" / "images", 2, first=7)
    scenes = CalibrationScenes((str(photos),), evaluation=(str(tmp_path / "eval"),))
    assert len(scenes.clips(tiny)) == 1
    # The same photograph under another name, in another place.
    shutil.copy(photos / "1.png", judged / "copy.png")
    with pytest.raises(ValueError, match=r"calibration photograph .*1\.png is also in the evaluation set .*copy\.png"):
        scenes.clips(tiny)


@pytest.fixture
def calibrated(tiny: nn.Module, tmp_path: Path) -> Any:
    def write(provenance: dict[str, Any]) -> str:
        save_model(tiny, tmp_path / "a.safetensors", dtype=torch.float32, provenance=provenance)
        return str(tmp_path / "a.safetensors")

    return write


def rendered(*seeds: int) -> list[EvalScene]:
    return list(DATASETS["synthetic"](None, seeds=seeds, num_frames=2, size=(28, 28)))


@pytest.mark.parametrize("nested", [False, True])
def test_an_evaluation_on_calibration_scenes_is_refused(calibrated: Any, nested: bool) -> None:
    said: dict[str, Any] = {"calibration": {"rendered_seeds": [1_000_000, 1_000_003]}}
    model = calibrated({"source_provenance": said} if nested else said)
    assert len(list(refuse_calibration_scenes(model, rendered(3, 1_000_004)))) == 2
    with pytest.raises(ValueError, match="was calibrated on photographs of scene seed001000003"):
        list(refuse_calibration_scenes(model, rendered(3, 1_000_003)))


def test_an_evaluation_on_calibration_photographs_is_refused(tiny: nn.Module, calibrated: Any, co3d: Path) -> None:
    scenes = CalibrationScenes(co3d=str(co3d), scenes=1, frames=3)
    clips = scenes.clips(tiny)
    model = calibrated({"calibration": json.loads(json.dumps(scenes.describe(clips)))})
    used = clips[0].name.partition("[")[0]
    passed = []
    with pytest.raises(ValueError, match=f"photographs of scene {used}"):
        passed.extend(refuse_calibration_scenes(model, DATASETS["co3d"](str(co3d))))
    others = [scene for scene in DATASETS["co3d"](str(co3d)) if scene.name != used]
    assert len(list(refuse_calibration_scenes(model, others))) == 2


def test_models_that_were_not_calibrated_pass(calibrated: Any) -> None:
    assert len(list(refuse_calibration_scenes(calibrated({}), rendered(3)))) == 1
