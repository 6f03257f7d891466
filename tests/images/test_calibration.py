"""Known intrinsics: numbers, tensors and files, in pixels of the photographs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from geoaccel.images.calibration import read_intrinsics

NAMES, SIZES = ["a.jpg", "b.jpg"], [(480, 640), (480, 640)]
GIVEN = [[500.0, 0.0, 320.0], [0.0, 510.0, 241.0], [0.0, 0.0, 1.0]]


def written(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    "given", ["500,510,320,241", [500, 510, 320, 241], (500.0, 510.0, 320, 241), torch.tensor(GIVEN)]
)
def test_numbers_and_tensors(given: Any) -> None:
    for found in read_intrinsics(given, NAMES, SIZES):
        assert found is not None
        assert found.tolist() == GIVEN


def test_one_focal_length_has_its_centre_in_the_middle() -> None:
    for given in ("500", 500, 500.0):
        found = read_intrinsics(given, NAMES, [(480, 640), (640, 480)])
        assert [matrix[:2, 2].tolist() for matrix in found if matrix is not None] == [[320, 240], [240, 320]]
    every = torch.stack([torch.tensor(GIVEN), 2 * torch.tensor(GIVEN)])
    every[:, 2, 2] = 1
    second = read_intrinsics(every, NAMES, [SIZES[0], (960, 1280)])[1]
    assert second is not None
    assert second[0, 0] == 1000


@pytest.mark.parametrize(
    "document",
    [
        {"fl_x": 500, "fl_y": 510, "cx": 320, "cy": 241},
        {"fx": 500, "fy": 510, "cx": 320, "cy": 241},
        {"fx": 1000, "fy": 1020, "cx": 640, "cy": 482, "w": 1280, "h": 960},
        {"fl_x": 500, "fl_y": 510, "cx": 320, "cy": 241, "frames": [{"file_path": "images/a.jpg"}, {"file_path": "b"}]},
        {"frames": [{"file": n, "intrinsic": [[500, 0, 319.5], [0, 510, 240.5], [0, 0, 1]]} for n in NAMES]},
    ],
)
def test_files(tmp_path: Path, document: Any) -> None:
    for found in read_intrinsics(written(tmp_path / "k.json", document), NAMES, SIZES):
        assert found is not None
        assert found.tolist() == GIVEN


def test_of_some_images(tmp_path: Path) -> None:
    document = {"frames": [{"file_path": "b.jpg", "fl_x": 500, "cx": 320, "cy": 240}, {"file_path": "a.jpg"}]}
    first, second = read_intrinsics(written(tmp_path / "k.json", document), NAMES, SIZES)
    assert first is None
    assert second is not None
    assert second[1, 1] == 500


def test_distortion_is_said_to_be_left_out(tmp_path: Path, caplog: Any) -> None:
    document = {"fl_x": 500, "cx": 320, "cy": 240, "k1": 0.1}
    with caplog.at_level(logging.WARNING):
        read_intrinsics(written(tmp_path / "k.json", document), NAMES, SIZES)
    assert "of all images is ignored; undistort the photographs first" in caplog.text
    caplog.clear()
    frames = [{"file": f"{name}.jpg", "fl_x": 500, "cx": 320, "cy": 240, "k1": name != "a"} for name in "abc"]
    read_intrinsics(written(tmp_path / "k.json", {"frames": frames}), NAMES, SIZES)
    assert [one for one in caplog.messages if "distortion" in one] == [
        "lens distortion in the intrinsics of b.jpg is ignored; undistort the photographs first"
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("1,2,3", "are 3 numbers"),
        ("0.8", r"0.8 cannot be in pixels of a.jpg \(640x480\): allowed is 64 to 64000"),
        ("500,510,0.5,0.5", None),  # a corner is unusual, and no error
        ("500,510,700,241", "principal point 700,241 is outside"),
        ("320,241,500,510", "in this order"),
        (torch.eye(4), r"are \[4, 4\]; give \[3, 3\]"),
        ({"fl_x": "wide", "cx": 1, "cy": 1}, "is not numeric"),
        ({"fl_x": 500, "cx": 320, "cy": 240, "w": 640, "h": 640}, "for 640x640 pixels, but the image is 640x480"),
        ({"frames": [{"file": "a.jpg", "intrinsic": [[1, 2, 3]]}]}, r"are \[1, 3\]; expected \[3, 3\]"),
        ({"frames": [{"file": "c.jpg", "fl_x": 500, "cx": 1, "cy": 1}]}, "names none of the images"),
        ({"camera": 1}, "no list of frames"),
    ],
)
def test_what_cannot_be_intrinsics(tmp_path: Path, given: Any, says: str | None) -> None:
    given = written(tmp_path / "k.json", given) if isinstance(given, dict) else given
    if says is None:
        read_intrinsics(given, NAMES, SIZES)
        return
    with pytest.raises(ValueError, match=says):
        read_intrinsics(given, NAMES, SIZES)
