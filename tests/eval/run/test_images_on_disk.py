"""Evaluations of images that are files: replaced, gone, without poses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluations import run, source
from PIL import Image
from plans import evaluate

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.eval.data.calibration import _load
from geoaccel.eval.data.scene import EvalScene
from geoaccel.eval.run.job import Job, Predictor
from geoaccel.eval.run.prepare import network_input
from geoaccel.eval.run.runner import score_prediction
from geoaccel.eval.run.scoring import Protocol
from geoaccel.eval.run.store import Store
from geoaccel.eval.tuning.photographs import _clip


def on_disk(folder: Path, scenes: int = 2) -> Iterator[EvalScene]:
    """Scenes whose images are files, written where they are not there yet."""
    folder.mkdir(exist_ok=True)
    for scene in source(scenes)():
        frames = []
        for frame in scene.frames:
            path = folder / f"{scene.name}-{frame.name}.png"
            if not path.exists():
                pixels = (frame.image() * 255).byte().movedim(0, -1).numpy()
                Image.fromarray(np.ascontiguousarray(pixels)).save(path)
            frames.append(replace(frame, image_path=path, read_image=None))
        yield replace(scene, frames=tuple(frames))


def test_bad_images_are_not_offered_an_option_of_other_commands(tmp_path: Path) -> None:
    """`eval`, `tune` and `quantize calibrate` have no --skip-bad."""
    (scene,) = on_disk(tmp_path / "photos", 1)
    (tmp_path / "photos" / f"{scene.name}-{scene.frames[1].name}.png").write_text("hello")
    model = SimpleNamespace(preprocess=Preprocess(size=28))
    for read in (
        lambda: network_input(scene, model.preprocess, resize=True),
        lambda: _clip("photos", scene.image_paths, model).load(),  # type: ignore[arg-type]
        lambda: _load(scene.image_paths, model.preprocess),
    ):
        with pytest.raises(UserError, match=r"is not a readable image; .* remove it$"):
            read()


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("checkpoint", ["vggt"], indirect=True)
def test_images_replaced_under_their_names_are_predicted_anew(checkpoint: Path, tmp_path: Path) -> None:
    read = partial(on_disk, tmp_path / "originals")
    folder = tmp_path / "run"
    before = run(checkpoint, folder, read=read)
    made = stamps(folder / "predictions")
    assert run(checkpoint, folder, read=read).scores == before.scores
    assert stamps(folder / "predictions") == made
    image_file = next((tmp_path / "originals").glob("seed000000001-*"))
    Image.new("RGB", (28, 28), (200, 30, 30)).save(image_file)
    after = run(checkpoint, folder, read=read)
    now = stamps(folder / "predictions")
    assert {name for name in made if now[name] != made[name]} == {"seed000000001.safetensors"}
    assert after.scenes[0].values == before.scenes[0].values
    assert after.scenes[1].values != before.scenes[1].values


@pytest.mark.parametrize("checkpoint", ["vggt"], indirect=True)
def test_images_that_are_gone_do_not_take_their_prediction_along(checkpoint: Path, tmp_path: Path) -> None:
    scenes = list(on_disk(tmp_path / "originals", 1))
    cameras = Protocol(points=None, depth=None)
    before = run(checkpoint, tmp_path / "run", read=lambda: scenes, protocol=cameras)
    scenes[0].image_paths[0].unlink()
    assert run(checkpoint, tmp_path / "run", read=lambda: scenes, protocol=cameras).scores == before.scores


@pytest.mark.parametrize("checkpoint", ["vggt"], indirect=True)
def test_a_reference_of_other_frames_is_predicted_anew(checkpoint: Path, tmp_path: Path) -> None:
    job, folder = Job(str(checkpoint), resize=False), tmp_path / "run"
    evaluate(job, source(1), Protocol(), folder, data={}, with_fidelity=True)
    for path in (folder / "predictions").iterdir():
        path.unlink()
    fewer = replace(source(1), frames=2)
    found = evaluate(job, fewer, Protocol(), folder, data={}, with_fidelity=True)
    assert len(Store.open(folder / "dense").made_from("seed000000000").frames) == 2
    assert found.scores["fidelity_auc_30"] == 1
    (scene,) = source(1)()
    accelerated = Predictor(job)(scene)
    reference = Store.open(folder / "dense").read(scene.name)
    with pytest.raises(ValueError, match=r"for other frames \(2 of them\)"):
        score_prediction(accelerated, scene, Protocol(), reference)


@pytest.mark.parametrize("checkpoint", ["vggt"], indirect=True)
def test_two_evaluations_in_one_folder_are_not_mixed(checkpoint: Path, tmp_path: Path) -> None:
    """The second one comes before the first has predicted anything; the first must not go on with its predictions."""

    def disturbed() -> Iterator[EvalScene]:
        for scene in source(2)():
            Store(tmp_path / "run", {"model": "other"})
            yield scene

    with pytest.raises(ValueError, match="another evaluation writes to"):
        run(checkpoint, tmp_path / "run", read=disturbed)
    assert not list((tmp_path / "run" / "predictions").iterdir())


@pytest.mark.parametrize("checkpoint", ["vggt"], indirect=True)
def test_images_without_poses_are_compared_and_not_scored(checkpoint: Path, tmp_path: Path) -> None:
    def unposed() -> Iterator[EvalScene]:
        for scene in source(2)():
            frames = [replace(frame, cam_from_world=torch.full((4, 4), torch.nan)) for frame in scene.frames]
            yield replace(scene, frames=tuple(frames))

    job = Job(str(checkpoint), resize=False, control="frame-only")
    found = evaluate(job, unposed, Protocol(), tmp_path / "run", data={}, with_fidelity=True)
    posed = evaluate(job, source(2), Protocol(), tmp_path / "posed", data={}, with_fidelity=True)
    assert not found.failed
    assert found.scores["fidelity_depth_abs_rel"] > 0
    assert found.scores == {name: value for name, value in posed.scores.items() if name.startswith("fidelity_")}
    with pytest.raises(ValueError, match=r"without poses have no ground truth; compare"):
        evaluate(job, unposed, Protocol(), tmp_path / "alone", data={})
