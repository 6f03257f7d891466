"""Known positions: tables of any kind, GPS, files of cameras, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoaccel.images.positions import match_positions, read_positions

PLACES = {"a.jpg": [0.0, 0.0, 0.0], "b c.jpg": [1.5, 0.0, -2.0], "d.jpg": [3.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("mark", "head"),
    [(",", ""), (",", "name,x,y,z"), ("\t", "# comment"), (";", "z;y;image;x"), (", ", "Name, X, Y, Z")],
)
def test_tables_of_any_kind(tmp_path: Path, mark: str, head: str) -> None:
    turned = head.startswith("z")
    lines = [head] if head else []
    for name, (x, y, z) in PLACES.items():
        lines.append(mark.join(map(str, (z, y, name, x) if turned else (name, x, y, z))))
    (tmp_path / "p.txt").write_text("\n".join(["", *lines, ""]))
    found, unit = read_positions(tmp_path / "p.txt")
    assert {name: place.tolist() for name, place in found.items()} == PLACES
    assert unit == "that of the given positions"


@pytest.mark.parametrize("head", ["", "name x y z\n", "# comment\n"])
def test_the_mark_in_front_of_utf_8_is_no_part_of_a_name(tmp_path: Path, head: str) -> None:
    (tmp_path / "p.txt").write_text(f"{head}a 1 2 3\nb 4 5 6\nc 7 8 9\n", encoding="utf-8-sig")
    assert list(read_positions(tmp_path / "p.txt")[0]) == ["a", "b", "c"]


def test_blanks_between_numbers(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a.jpg 1 2 3\nb.jpg  4 5 6\nsub/c.jpg 7e0 8 9\n")
    places = match_positions(tmp_path / "p.txt", ["c.jpg", "none.jpg", "a.png", "b.jpg"])
    assert places.places[[0, 2, 3]].tolist() == [[7, 8, 9], [1, 2, 3], [4, 5, 6]]
    assert places.places[1].isnan().all()


def test_images_of_two_cameras_have_their_own_positions(tmp_path: Path) -> None:
    names = [f"cam{camera}/{i}.jpg" for camera in (0, 1) for i in range(3)]
    (tmp_path / "p.txt").write_text("".join(f"images/{name} {i} 0 {i * i}\n" for i, name in enumerate(names)))
    assert match_positions(tmp_path / "p.txt", names).places[:, 0].tolist() == list(range(6))
    (tmp_path / "bare.txt").write_text("0.jpg 0 0 0\n1.jpg 1 0 0\n2.jpg 2 0 1\n")
    with pytest.raises(ValueError, match=r"0.jpg of .*bare.txt may be image cam0/0.jpg or cam1/0.jpg"):
        match_positions(tmp_path / "bare.txt", names)


def test_gps_becomes_metres_east_north_and_up(tmp_path: Path) -> None:
    # A thousandth of a degree at 48 degrees, 500 m above WGS 84: its radii of curvature there are 6,370,733 m (north)
    # and 6,389,960 m (east, times the cosine of 48 degrees).
    rows = ["image,longitude,latitude,altitude", "a,11,48,500", "b,11.001,48,500", "c,11,48.001,500", "d,11,48,510"]
    (tmp_path / "gps.csv").write_text("\n".join(rows))
    found, unit = read_positions(tmp_path / "gps.csv")
    assert unit == "metre"
    expected = {"a": [0, 0, 0], "b": [74.631, 0, 0], "c": [0, 111.199, 0], "d": [0, 0, 10]}
    for name, place in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(place).double(), rtol=0, atol=0.002)


def test_files_of_cameras_say_where_they_stand(tmp_path: Path) -> None:
    frames = [{"file": f"{i}.jpg", "extrinsic": [[1, 0, 0, -i], [0, 0, 1, 0], [0, -1, 0, -2 * i]]} for i in range(3)]
    (tmp_path / "cameras.json").write_text(json.dumps({"frames": frames}))
    found, _ = read_positions(tmp_path / "cameras.json")
    assert {name: place.tolist() for name, place in found.items()} == {f"{i}.jpg": [i, -2 * i, 0] for i in range(3)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 0 positions"),
        ("a 1 2 3\nb 1 2 3\n", "has 2 positions"),
        ("a 1 2 3\nb 1 2\nc 1 2 3", "line 2 of .* is 'b,1,2'; expected: name x y z"),
        ("a 1 2 3\nb 1 2 x\nc 1 2 3", "line 2"),
        ("# comment\n\nname,x,y,z\na,0,0,0\n\nb,1,0,0\nc,1,one,0\n", "line 7 of .* is 'c,1,one,0'"),
        ("a 1 2 3\nb 1 nan 3\nc 1 2 3", "gives b a position that is NaN"),
        ("name,lat,lon,alt\na,91,0,0\nb,0,0,0\nc,1,1,1", "latitude 91"),
        ("x,y,z\n1,2,3\n", "line 1"),
    ],
)
def test_what_is_no_table_of_positions(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_positions(tmp_path / "p.txt")


def test_of_too_few_of_the_images(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a 1 2 3\nb 1 2 4\nc 1 2 5")
    with pytest.raises(ValueError, match="positions of 2 of the images"):
        match_positions(tmp_path / "p.txt", ["a.jpg", "b.jpg", "x.jpg"])
    with pytest.raises(ValueError, match="names none of the images"):
        match_positions(tmp_path / "p.txt", ["x.jpg", "y.jpg", "z.jpg"])
    (tmp_path / "utm.txt").write_text("a 5e6 1 1\nb 5000010 2 3\nc 5000003 7 8")
    with pytest.raises(ValueError, match="subtract the same offset from all of them first"):
        match_positions(tmp_path / "utm.txt", ["a", "b", "c"])
    with pytest.raises(FileNotFoundError, match="give a file of positions"):
        match_positions(tmp_path / "none.txt", ["a"])
