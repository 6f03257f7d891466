"""Poses, intrinsics and depth from files: right in the pixels of the network input, and refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geoaccel.cameras import invert_rigid, to_homogeneous
from geoaccel.images import ImageTransform, load_conditions

# 60 x 80 images at half their size, with padding above.
TRANSFORM = ImageTransform((60, 80), (42, 42), (0.5, 0.5), (1.0, 6.0))
BATCH = SimpleNamespace(names=["a.jpg", "b.jpg", "c.jpg"], transforms=[TRANSFORM] * 3)
POSE = to_homogeneous(torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]]))


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".PNG", ".png", ".NPY"])
def test_suffixes_of_depths_may_be_in_capitals(suffix: str, tmp_path: Path) -> None:
    with (tmp_path / f"a{suffix}").open("wb") as file:
        if suffix.lower() == ".npy":
            np.save(file, np.full((60, 80), 2, np.float32))
        else:
            Image.fromarray(np.full((60, 80), 2000, np.uint16)).save(file, format="PNG")
    found = load_conditions(BATCH, depths=tmp_path)
    assert found.has_depth is not None
    assert found.depths is not None
    assert found.has_depth.tolist() == [True, False, False]
    assert found.depths[0].max() == 2


def test_both_kinds_of_file_say_the_same(tmp_path: Path) -> None:
    opengl = (invert_rigid(POSE) @ torch.diag(torch.tensor([1.0, -1, -1, 1]))).tolist()
    matrix = [[50, 0, 39.5], [0, 52, 29.5], [0, 0, 1]]
    ours = {"file": "images/b.jpg", "extrinsic": POSE[:3].tolist(), "intrinsic": matrix}
    theirs = {"fl_x": 50, "fl_y": 52, "cx": 40, "cy": 30, "frames": [{"file_path": "../b", "transform_matrix": opengl}]}
    marked = tmp_path / "marked.json"  # as some programs mark UTF-8
    marked.write_text(json.dumps(theirs), encoding="utf-8-sig")
    for path in (write(tmp_path / "known.json", {"frames": [ours]}), write(tmp_path / "theirs.json", theirs), marked):
        found = load_conditions(BATCH, poses=path, intrinsics=path)
        assert found.has_pose is not None
        assert found.has_intrinsics is not None
        assert found.poses is not None
        assert found.intrinsics is not None
        assert found.has_pose.tolist() == found.has_intrinsics.tolist() == [False, True, False]
        torch.testing.assert_close(found.poses[1], POSE)
        expected = torch.tensor([[25.0, 0, 21], [0, 26, 21], [0, 0, 1]])
        torch.testing.assert_close(found.intrinsics[1], expected)
        found.check(3, (42, 42))


@pytest.mark.parametrize(("text", "focal", "centre"), [("50", 25.0, (21.0, 21.0)), ("50,50,20,10", 25.0, (11.0, 11.0))])
def test_numbers_are_those_of_all_images(text: str, focal: float, centre: tuple[float, float]) -> None:
    found = load_conditions(BATCH, intrinsics=text)
    assert found.intrinsics is not None
    assert found.has_intrinsics is not None
    assert found.has_intrinsics.all()
    assert found.intrinsics[2, 0, 0] == found.intrinsics[2, 1, 1] == focal
    assert tuple(found.intrinsics[0, :2, 2].tolist()) == centre


def test_depths_lie_where_the_network_sees_them(tmp_path: Path) -> None:
    """As numbers at the size of the image, and as a picture of half of it in millimetres."""
    full = np.arange(60 * 80, dtype=np.float32).reshape(60, 80) / 100 + 1
    np.save(tmp_path / "a.npy", full)
    Image.fromarray(np.full((30, 40), 1500, np.uint16)).save(tmp_path / "c.png")
    found = load_conditions(BATCH, depths=tmp_path)
    assert found.depths is not None
    assert found.has_depth is not None
    assert found.has_depth.tolist() == [True, False, True]
    assert (found.depths[1] == 0).all()
    assert torch.equal(found.depths[0] > 0, TRANSFORM.valid_mask())
    expected = torch.from_numpy(full)[1::2, 1::2]  # pixel centres fall on the corners of four
    torch.testing.assert_close(found.depths[0, 6:36, 1:41], expected, atol=0.82, rtol=0)
    assert (found.depths[2, 6:36, 1:41] == 1.5).all()
    found.check(3, (42, 42))


RIG = SimpleNamespace(names=[f"cam{c}/{i}.jpg" for c in (0, 1) for i in (0, 1)], transforms=[TRANSFORM] * 4)


def test_images_of_two_cameras_have_their_own(tmp_path: Path) -> None:
    frames, poses = [], POSE.repeat(4, 1, 1)
    for i, name in enumerate(RIG.names):
        poses[i, 0, 3] = 10 * i
        matrix = [[50 + i, 0, 39.5], [0, 50, 29.5], [0, 0, 1]]
        frames.append({"file": f"images/{name}", "extrinsic": poses[i, :3].tolist(), "intrinsic": matrix})
        np.save(tmp_path / f"{i}.npy", np.full((60, 80), 1 + i, np.float32))
    path = write(tmp_path / "poses.json", {"frames": frames})
    (tmp_path / "depth" / "cam0").mkdir(parents=True)
    (tmp_path / "depth" / "cam1").mkdir()
    for i, name in enumerate(RIG.names[:3]):  # of the last one is none
        (tmp_path / f"{i}.npy").rename(tmp_path / "depth" / Path(name).with_suffix(".npy"))
    found = load_conditions(RIG, poses=path, intrinsics=path, depths=tmp_path / "depth")
    assert found.intrinsics is not None
    assert found.depths is not None
    assert found.has_depth is not None
    assert torch.equal(found.poses, poses)
    assert found.intrinsics[:, 0, 0].tolist() == [25, 25.5, 26, 26.5]
    assert found.depths.flatten(1).max(1).values.tolist() == [1, 2, 3, 0]
    assert found.has_depth.tolist() == [True, True, True, False]


def test_what_may_be_of_several_images_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "1.npy", np.ones((60, 80), np.float32))
    with pytest.raises(ValueError, match=r"1.npy may belong to cam0/1.jpg or cam1/1.jpg; .* such as .*/cam0/1.npy$"):
        load_conditions(RIG, depths=tmp_path)
    found = load_conditions(SimpleNamespace(names=RIG.names[:3], transforms=[TRANSFORM] * 3), depths=tmp_path)
    assert found.has_depth is not None
    assert found.has_depth.tolist() == [False, True, False]
    path = write(tmp_path / "poses.json", {"frames": [{"file": "1", "extrinsic": POSE[:3].tolist()}]})
    with pytest.raises(ValueError, match=r"1 of .*poses.json may be image cam0/1.jpg or cam1/1.jpg"):
        load_conditions(RIG, poses=path)


def test_steps_are_of_pictures_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((60, 80), 3.0, np.float32))
    (tmp_path / "scale.json").write_text('{"scale": 1.5}')  # somebody else's
    found = load_conditions(SimpleNamespace(names=["a.jpg"], transforms=[TRANSFORM]), depths=tmp_path)
    assert found.depths is not None
    assert found.depths.max() == 3


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((60, 60), np.float32))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.npy").write_bytes(b"nothing")
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "a.npy").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "c").mkdir()
    Image.new("L", (80, 60)).save(tmp_path / "c" / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "steps").mkdir()
    Image.fromarray(np.ones((60, 80), np.uint16)).save(tmp_path / "steps" / "a.png")
    (tmp_path / "steps" / "scale.json").write_text("{}")
    (tmp_path / "text.json").write_text("nothing")
    crooked = {"frames": [{"file": "a.jpg", "extrinsic": [[1, 2], [3]]}]}
    twice = {"frames": [{"file": "a.jpg", "fx": 50, "extrinsic": (POSE + shift)[:3].tolist()} for shift in (0, 1)]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"depths": tmp_path}, "give a map of the same aspect"),
        ({"depths": tmp_path / "b"}, "cannot be read as depth"),
        ({"depths": tmp_path / "zip"}, "cannot be read as depth"),
        ({"depths": tmp_path / "c"}, "an 8-bit image"),
        ({"depths": tmp_path / "empty"}, "contains no depth of any image; expected a.npy or a.png"),
        ({"depths": tmp_path / "none"}, "folder of depths .* does not exist"),
        ({"depths": tmp_path / "steps"}, "scale.json has no steps_per_unit; write the depths again"),
        ({"poses": tmp_path / "none.json"}, r".* does not exist"),
        ({"poses": tmp_path / "text.json"}, "is not JSON"),
        ({"poses": write(tmp_path / "list.json", [1])}, "has no list of frames"),
        ({"poses": write(tmp_path / "crooked.json", crooked)}, "camera of a.jpg is not a matrix"),
        ({"poses": write(tmp_path / "other.json", {"frames": [{"file": "z.jpg", "extrinsic": POSE[:3].tolist()}]})},
         "names none of the images .first a.jpg.; it has z.jpg"),
        ({"poses": write(tmp_path / "twice.json", twice)}, "two different frames for a.jpg"),
        ({"intrinsics": tmp_path / "twice.json"}, "two different frames for a.jpg"),
        ({"intrinsics": "50,50"}, "are 2 numbers"),
    ]  # fmt: skip
    for given, message in cases:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            load_conditions(BATCH, **given)
        assert "\n" not in str(caught.value), message
