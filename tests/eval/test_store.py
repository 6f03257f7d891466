"""Predictions on disk: complete or absent, of one configuration, of the frames they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoaccel.backbone import Geometry
from geoaccel.eval.store import Prediction, Store
from geoaccel.images import ImageTransform


def prediction(seed: int = 0) -> Prediction:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, 2, *shape, generator=generator)

    geometry = Geometry(draw(4, 4), draw(3, 3), draw(6, 8), draw(6, 8, 3), draw(6, 8))
    transform = ImageTransform((60, 80), (6, 8), (0.1, 0.1), (0.0, -1.5))
    return Prediction(geometry, ("a.jpg", "b.jpg"), [transform, transform], 0.25)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", {"model": "m"})
    assert "scene" not in store
    store.write("scene", prediction())
    back = Store.open(tmp_path / "run").read("scene")
    expected = prediction()
    assert "scene" in store
    assert all(torch.equal(getattr(back.geometry, k), v) for k, v in vars(expected.geometry).items())
    assert (back.frames, back.transforms, back.effective_ratio) == (
        expected.frames,
        expected.transforms,
        expected.effective_ratio,
    )


def test_another_configuration_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    Store(tmp_path / "run", {"model": "m", "ratio": 0.3})
    Store(tmp_path / "run", {"ratio": 0.3, "model": "m"})
    with pytest.raises(ValueError, match=r"ratio was 0\.3, is now 0\.5"):
        Store(tmp_path / "run", {"model": "m", "ratio": 0.5})
    with pytest.raises(ValueError, match=r"extra was None, is now 1"):
        Store(tmp_path / "run", {"model": "m", "ratio": 0.3, "extra": 1})


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"is damaged .* delete it and run again"):
        store.read("scene")


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
