"""Names in files find their images, and say so where they may be of several."""

from __future__ import annotations

import pytest

from geoaccel.images.names import paired


@pytest.mark.parametrize(
    ("known", "images", "found"),
    [
        (["b.jpg", "a.jpg"], ["a.jpg", "b.jpg", "c.jpg"], [1, 0, None]),
        (["./images/b", "../a", "/home/me/c.png"], ["a.jpg", "b.jpg", "c.jpg"], [1, 0, 2]),
        (["cam1/0.jpg"], ["cam0/0.jpg", "cam1/0.jpg"], [None, 0]),
        (["rig/cam1/0.jpg", "rig/cam0/0.jpg"], ["cam0/0.jpg", "cam1/0.jpg"], [1, 0]),
        (["cam0/0.jpg", "cam2/0.jpg"], ["cam0/0.jpg", "cam1/0.jpg"], [0, None]),
        (["1.jpg"], ["cam0/0.jpg", "cam1/0.jpg", "cam1/1.jpg"], [None, None, 0]),
        (["images/a.jpg", "images/sub/a.jpg"], ["a.jpg", "sub/a.jpg"], [0, 1]),
        (["a.jpg"], ["a.jpg", "sub/a.jpg"], [0, None]),
        (["a", "a.jpg"], ["a.jpg", "a.png"], [1, 0]),
        (["cam0/a", "a.jpg"], ["cam0/a.jpg"], [0]),
        (["v.0001", "v.0002"], ["v.0001.jpg", "v.0002.jpg"], [0, 1]),
        (["", "."], ["a.jpg"], [None]),
        (["images_4/b.jpg", "images_4/a.jpg"], ["images/a.jpg", "images/b.jpg"], [1, 0]),  # folders were renamed
        (["cam1/0.jpg"], ["cam2/0.jpg", "cam3/0.jpg"], [None, None]),
        (["cam1/0.jpg", "cam4/0.jpg"], ["cam2/0.jpg"], [None]),
    ],
)
def test_which_name_is_of_which_image(known: list[str], images: list[str], found: list[int | None]) -> None:
    assert paired(known, images, "f.json") == found


@pytest.mark.parametrize(
    ("known", "images", "says"),
    [
        (["0.jpg"], ["cam0/0.jpg", "cam1/0.jpg"], "0.jpg of f.json may be image cam0/0.jpg or cam1/0.jpg"),
        (["a"], ["a.jpg", "a.png"], "a of f.json may be image a.jpg or a.png"),
        (["train/0", "val/0"], ["0.png"], "image 0.png may be train/0 or val/0 of f.json"),
    ],
)
def test_a_name_that_may_be_of_several_is_refused(known: list[str], images: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        paired(known, images, "f.json")
