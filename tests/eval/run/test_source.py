"""The data part of a configuration: what it takes, and what it says to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from geoaccel.eval.run.source import Source


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 0}, r"data\.frames=0: give a whole number of at least 2, since poses are scored in pairs, or null"),
        ({"frames": 1}, r"data\.frames=1: give a whole number of at least 2"),
        ({"frames": -3}, r"data\.frames=-3: give"),
        ({"frames": "many"}, r"data\.frames=many: give a whole number"),
        ({"frames": 3.5}, r"data\.frames=3\.5: give a whole number"),
        ({"frames": True}, r"data\.frames=True: give a whole number"),
        ({"scenes": -1}, r"data\.scenes=-1: give a whole number of at least 1, names, or null"),
        ({"scenes": 2.5}, r"data\.scenes=2\.5: give"),
        ({"scenes": {"seed000000001": 1}}, r"data\.scenes=.*: give"),
        ({"stride": "two"}, r"data\.stride=two: give a whole number of at least 1"),
        ({"stride": None}, r"data\.stride=None: give"),
        ({"seed": "x"}, r"data\.seed=x: give a whole number"),
    ],
)
def test_what_is_no_number_is_one_clear_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Source("synthetic", **settings)
    assert "\n" not in str(caught.value)


def test_a_rule_without_its_number_shows_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="frames=None with rule 'evenly'"):
        Source("folder", root="nowhere", rule="evenly")


def test_a_lone_name_is_a_name_and_so_is_a_number_in_a_list() -> None:
    small = {"size": [28, 28]}
    alone = Source("synthetic", frames=2, scenes="seed000000005", options=small)
    assert [scene.name for scene in alone()] == ["seed000000005"]
    assert len(alone) == 1
    with pytest.raises(ValueError, match="unknown scene '24'"):
        Source("synthetic", frames=2, scenes=[24], options=small)()


def test_images_without_poses_are_read_only_where_poses_are_not_needed(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "11.png", ".hidden.png"):
        Image.new("RGB", (28, 28)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"cannot be scored: compare with the dense model \(fidelity=true\)"):
        Source("folder", root=str(tmp_path))()
    found = Source("folder", root=str(tmp_path), need_poses=False)
    (scene,) = found()
    assert [frame.name for frame in scene.frames] == ["9.png", "10.png", "11.png"]
    assert scene.cam_from_world.isnan().all()
    (scene,) = Source("folder", root=str(tmp_path.parent), scenes=tmp_path.name, need_poses=False)()
    assert scene.name == tmp_path.name
    # Whether poses are needed changes no prediction.
    assert found.describe() == Source("folder", root=str(tmp_path)).describe()


def test_a_folder_with_poses_is_read_with_them(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "0.png")
    (tmp_path / "poses.json").write_text("{}")
    source = Source("folder", root=str(tmp_path), need_poses=False)
    assert list(source()) == []
    assert "has no list of frames" in str(source.skipped[0])
