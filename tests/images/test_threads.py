"""Files are read in threads: the same pixels, order, progress and errors as one after another, in bounded memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from pictures import SMALL, noise, one_line_of, save, smooth, to_uint8
from PIL import Image

from geoaccel.backbone import Preprocess
from geoaccel.images import load_images
from geoaccel.images.read import read_image
from geoaccel.images.resize import fit
from geoaccel.images.sources import FilePicture
from geoaccel.images.threads import Room, in_order

MANY = 24


class Watched:
    """Work that is seen at work."""

    def __init__(self) -> None:
        self.lock, self.now, self.most, self.begun = threading.Lock(), 0, 0, 0

    def __enter__(self) -> None:
        with self.lock:
            self.now += 1
            self.begun += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.now -= 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """JPEGs of several megapixels among small ones: later ones are often ready before earlier ones."""
    for i in range(MANY):
        height, width = (600, 800) if i % 4 == 0 else (150, 200)
        save(tmp_path / f"{i}.jpg", np.roll(smooth(height, width), i, axis=1), quality=90)
    return tmp_path


@pytest.mark.parametrize("preprocess", [SMALL, Preprocess("budget", max_pixels=112 * 84), Preprocess("pad", 112)])
def test_pixels_and_order_are_those_of_one_after_another(folder: Path, preprocess: Preprocess) -> None:
    batch = load_images(folder, preprocess)
    assert batch.names == [f"{i}.jpg" for i in range(MANY)]
    budget = (batch.images.shape[2], batch.images.shape[3])
    for i, name in enumerate(batch.names):
        alone = fit(read_image(folder / name), preprocess, budget)
        assert torch.equal(to_uint8(batch.images[i]), alone.pixels)
        assert batch.transforms[i] == alone.transform


def test_a_large_jpeg_is_decoded_at_its_full_size(tmp_path: Path) -> None:
    """Fine lines: a smaller decoding of the file would show."""
    path = save(tmp_path / "large.jpg", noise(1500, 2000), quality=90)
    with Image.open(path) as image:
        expected = image.resize((112, 84), Image.Resampling.BICUBIC)
    images = load_images([path] * 3, SMALL).images
    for got in to_uint8(images):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.parametrize("bad", [0, 1, 7])
def test_the_first_bad_file_in_order_is_reported(folder: Path, bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, the later one fails at once and the earlier one late."""
    (folder / f"{bad}.jpg").write_bytes((folder / "0.jpg").read_bytes()[:500])
    for later in range(bad + 1, MANY):
        (folder / f"{later}.jpg").write_text("no image")
    read = FilePicture.read

    def slow(self: FilePicture, *rest: object) -> Image.Image:
        if self.name == f"{bad}.jpg":
            time.sleep(0.2)
        return read(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(FilePicture, "read", slow)
    with pytest.raises(ValueError, match=rf"/{bad}\.jpg .*cannot be decoded") as error:
        load_images(folder, SMALL)
    one_line_of(error)


def test_a_picture_that_does_not_fit_the_others_comes_before_a_later_bad_one(folder: Path) -> None:
    save(folder / "5.jpg", noise(10, 10))
    (folder / "6.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"5\.jpg is 10x10"):
        load_images(folder, SMALL)
    save(folder / "5.jpg", noise(150, 20))
    with pytest.raises(ValueError, match=r"differ too much in shape.*5\.jpg"):
        load_images(folder, SMALL)


def test_bad_pictures_are_left_out_in_order_and_the_first_good_one_counts(folder: Path) -> None:
    for bad in (0, 5):
        (folder / f"{bad}.jpg").write_text("no image")
    save(folder / "7.jpg", noise(10, 10))
    seen: list[int] = []
    preprocess = Preprocess("budget", max_pixels=112 * 84)
    batch = load_images(folder, preprocess, skip_bad=True, fits=lambda frames, size: seen.append(frames))
    assert list(batch.left_out) == ["0.jpg", "5.jpg", "7.jpg"]
    assert batch.names == [f"{i}.jpg" for i in range(MANY) if i not in (0, 5, 7)]
    assert seen == [MANY]
    alone = fit(read_image(folder / "9.jpg"), preprocess, (batch.images.shape[2], batch.images.shape[3]))
    assert torch.equal(to_uint8(batch.images[batch.names.index("9.jpg")]), alone.pixels)


def test_nothing_but_the_first_is_read_before_it_is_known_to_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, asked = FilePicture.read, []
    monkeypatch.setattr(FilePicture, "read", lambda self, *rest: asked.append(self.name) or read(self, *rest))

    def too_many(frames: int, size: tuple[int, int]) -> None:
        raise ValueError(f"{frames} of {size}")

    with pytest.raises(ValueError, match=r"24 of \(84, 112\)"):
        load_images(folder, SMALL, fits=too_many)
    assert asked == ["0.jpg"]


def test_progress_counts_every_picture(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_images(folder, SMALL, progress=True)
    assert f"{MANY}/{MANY}" in capfd.readouterr().err


def test_pictures_at_full_size_are_not_all_there_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of the large ones, however many threads there are."""
    held = Watched()
    room_held = Room.held

    class Seen(Room):
        taken: ClassVar[list[int]] = []

        def held(self, count: int):  # type: ignore[no-untyped-def]
            self.taken.append(count)
            return room_held(self, count)

    monkeypatch.setattr("geoaccel.images.load.Room", Seen)
    monkeypatch.setattr("geoaccel.images.load.PIXELS_AT_ONCE", 2 * 600 * 800)
    whole = fit

    def watched(*given: object) -> object:
        with held:
            time.sleep(0.005)
            return whole(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("geoaccel.images.load.fit", watched)
    monkeypatch.setattr("geoaccel.images.threads.usable_cores", lambda: 8)
    for path in folder.iterdir():
        save(path, noise(600, 800))
    load_images(folder, SMALL)
    assert Seen.taken == [600 * 800] * MANY
    assert 1 <= held.most <= 2


def test_results_are_made_a_few_ahead_and_no_more() -> None:
    watch, asked = Watched(), []

    def items():  # type: ignore[no-untyped-def]
        for i in range(100):
            asked.append(i)
            yield i

    def work(i: int) -> int:
        with watch:
            return i * i

    results = in_order(items(), work, threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(asked) <= 5 + 3 * 2
    results.close()
    assert watch.begun <= 5 + 3 * 2
    assert watch.most <= 3
    assert watch.now == 0


def test_an_item_that_takes_no_company_is_worked_on_in_its_turn() -> None:
    main = threading.get_ident()
    where = list(in_order(range(6), lambda i: threading.get_ident(), in_threads=lambda i: i % 2 == 0, threads=2))
    assert [found == main for found in where] == [False, True] * 3


def test_room_lets_a_large_one_in_alone() -> None:
    room, order = Room(10), []

    def large() -> None:
        with room.held(50):
            order.append("large")

    with room.held(3):
        thread = threading.Thread(target=large)
        thread.start()
        time.sleep(0.05)
        order.append("small")
    thread.join(5)
    assert order == ["small", "large"]
