"""Predictions on disk: complete or absent, of one configuration, of the frames they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from geoaccel.backbone import Geometry
from geoaccel.eval.run.store import Origin, Prediction, Store, _change
from geoaccel.images import ImageTransform


def prediction(seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    geometry = Geometry(sample(4, 4), sample(3, 3), sample(6, 8), sample(6, 8, 3), sample(6, 8))
    transform = ImageTransform((60, 80), (6, 8), (0.1, 0.1), (0.0, -1.5))
    stamps = ((1000, 1_700_000_000_123_456_789), (2000, 1_700_000_000_123_456_790))
    made_by = {"code": "abc", "threads": 2}
    return Prediction(geometry, ("a.jpg", "b.jpg"), [transform, transform], 0.25, 0.75, stamps, made_by)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {"model": "m"})
    assert "scene" not in store
    store.write("scene", prediction())
    back = Store.open(tmp_path / "run").read("scene")
    expected = prediction()
    assert "scene" in store
    assert all(torch.equal(getattr(back.geometry, k), v) for k, v in vars(expected.geometry).items())
    assert back.effective_key_ratio == 0.75
    assert (back.frames, back.transforms, back.effective_ratio, back.photographs) == (
        expected.frames,
        expected.transforms,
        expected.effective_ratio,
        expected.photographs,
    )
    assert store.made_from("scene") == (expected.frames, expected.photographs, expected.made_by)
    assert back.made_by == expected.made_by


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    Store(tmp_path / "run", {"model": "m", "ratio": 0.3}).write("scene", prediction())
    Store(tmp_path / "run", {"ratio": 0.3, "model": "m"})
    with pytest.raises(ValueError, match=r"ratio was 0\.3, is now 0\.5"):
        Store(tmp_path / "run", {"model": "m", "ratio": 0.5})
    with pytest.raises(ValueError, match=r"extra was None, is now 1"):
        Store(tmp_path / "run", {"model": "m", "ratio": 0.3, "extra": 1})


def test_a_configuration_under_which_nothing_was_predicted_is_replaced(tmp_path: Path) -> None:
    Store(tmp_path / "run", {"model": "typo"})
    Store(tmp_path / "run", {"model": "m"}).write("scene", prediction())
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"model": "m"}
    assert not list((tmp_path / "run").glob("*.tmp"))
    with pytest.raises(ValueError, match="model was 'm', is now 'typo'"):
        Store(tmp_path / "run", {"model": "typo"})


@pytest.mark.parametrize("there", ["config.json", "scores.json"])
def test_what_made_scores_or_is_not_ours_is_not_replaced(there: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there == "scores.json":  # its predictions were deleted to save space
        Store(folder, {"model": "m"})
        (folder / there).write_text("{}")
    else:  # a checkpoint's own
        folder.mkdir()
        (folder / there).write_text('{"model": "m"}')
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another configuration"):
        Store(folder, {"model": "other"})
    assert (folder / "config.json").read_bytes() == before


def test_who_lost_the_folder_to_another_evaluation_writes_nothing(tmp_path: Path) -> None:
    first = Store(tmp_path / "run", {"model": "first"})
    first.require_own()
    worker = Store.open(tmp_path / "run")
    second = Store(tmp_path / "run", {"model": "second"})
    for loser in (first, worker):
        with pytest.raises(ValueError, match="another evaluation writes to"):
            loser.write("scene", prediction())
    assert second.empty
    second.write("scene", prediction())
    assert not second.empty


def test_windows_are_those_of_one_configuration(tmp_path: Path) -> None:
    first = Store(tmp_path / "run", {"path": "loop"})
    for name in ("scene", "other"):
        first.unfinished(name).mkdir(parents=True)
    second = Store(tmp_path / "run", {"path": "corridor"})
    assert not second.unfinished("scene").exists()
    Store(tmp_path / "run", {"path": "loop"})  # which may come back, as long as nothing was predicted
    assert first.unfinished("scene").exists()
    second = Store(tmp_path / "run", {"path": "corridor"})
    for name in ("scene", "other"):
        second.unfinished(name).mkdir(parents=True)
    second.write("scene", prediction())
    assert [path.name for path in (tmp_path / "run" / "windows").glob("*/*")] == ["other"]
    assert second.unfinished("other").exists()


def test_a_prediction_of_an_earlier_version_does_not_know_what_made_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {})
    store.write("scene", prediction())
    with safe_open(store.path("scene"), "pt") as file:
        notes = json.loads(file.metadata()["notes"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del notes["photographs"], notes["made_by"]
    save_file(tensors, store.path("scene"), {"notes": json.dumps(notes)})
    assert store.made_from("scene") == (("a.jpg", "b.jpg"), (), {})


def test_a_folder_with_other_files_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        Store(tmp_path, {})


def test_a_damaged_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged; choose another out folder"):
        Store(tmp_path, {})


def test_names_that_are_no_file_names_get_files_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {})
    names = ["a/b", "a_b", "a:b", "../up", ".hidden", "x" * 300, "x" * 301]
    paths = {store.path(name) for name in names}
    assert len(paths) == len(names)
    assert {path.parent for path in paths} == {store.predictions}
    assert all(len(path.name) < 200 and not path.name.startswith(".") for path in paths)


def test_a_truncated_prediction_is_one_line(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {})
    store.write("scene", prediction())
    path = store.path("scene")
    path.write_bytes(path.read_bytes()[:-100])
    for read in (store.read, store.made_from):
        with pytest.raises(ValueError, match=r"is damaged .* delete it and run again"):
            read("scene")


def test_what_a_killed_run_left_half_written_does_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {})
    leftover = store.predictions / "scene.safetensors.123.tmp"
    leftover.write_bytes(b"half")
    assert "scene" not in store
    store.sweep()
    assert not leftover.exists()


def test_the_configuration_is_plain_json(tmp_path: Path) -> None:
    Store(tmp_path / "run", {"size": (224, 224)})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"size": [224, 224]}
    Store(tmp_path / "run", {"size": [224, 224]})  # a tuple is the list it becomes


def test_a_prediction_of_other_frames_does_not_count_however_many_they_are() -> None:
    scene: Any = SimpleNamespace(frames=[SimpleNamespace(name="a.jpg"), SimpleNamespace(name="b.jpg")], image_paths=[])
    maker = {"code": "abc"}
    assert _change(Origin(("a.jpg", "b.jpg"), (), maker), scene, [maker]) is None
    for frames in (("a.jpg",), ("a.jpg", "c.jpg"), ("b.jpg", "a.jpg")):
        assert _change(Origin(frames, (), maker), scene, [maker]) == "its frames are others"
