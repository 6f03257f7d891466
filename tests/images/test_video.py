"""Videos in: which frames are taken, that they are the right ones, and that they stand upright."""

from __future__ import annotations

import copy
import pickle
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from geoaccel.backbone import Preprocess
from geoaccel.errors import UserError
from geoaccel.images import load_images
from geoaccel.images.sources import list_pictures
from geoaccel.images.video import Video

SMALL = Preprocess(size=112)
NUM_FRAMES = 40


def write_video(
    path: Path,
    *,
    codec: str = "mpeg4",
    stamps: list[int] | None = None,
    key_every: int = 8,
    options: dict[str, str] | None = None,
    noisy: bool = False,
    pixel: Fraction | None = None,
) -> Path:
    """A 64x48 video of 10 frames per second; frame i is a grey of 6 * i, its upper left quarter black."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = key_every
        if pixel is not None:
            stream.codec_context.sample_aspect_ratio = pixel
        stream.codec_context.bit_rate = 2_000_000
        stream.codec_context.time_base = Fraction(1, 10)
        for i in range(NUM_FRAMES):
            array = np.full((48, 64, 3), 6 * i, np.uint8)
            array[:24, :32] = 0
            if noisy:  # every frame takes as many bytes
                array[24:, :32] = np.random.default_rng(i).integers(0, 255, (24, 32, 3))
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = (stamps[i] if stamps else i), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_number(original: torch.Tensor) -> int:
    """Which frame this is, from its lower right grey."""
    return round(original[-12:, -16:].float().mean().item() / 6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def test_all_frames_in_order(clip: Path) -> None:
    batch = load_images(clip, SMALL)
    assert list(batch.images.shape) == [NUM_FRAMES, 3, 84, 112]
    assert batch.names == [f"clip_{i:06d}.png" for i in range(NUM_FRAMES)]
    assert batch.paths == [None] * NUM_FRAMES
    greys = (batch.images[:, :, -10:, -10:].mean(dim=(1, 2, 3)) * 255 / 6).round().int()
    assert greys.tolist() == list(range(NUM_FRAMES))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fps": 2}, [0, 5, 10, 15, 20, 25, 30, 35]),
        ({"fps": 1, "max_frames": 2}, [0, 30]),
        ({"max_frames": 4}, [0, 13, 26, 39]),
        ({"fps": 1000, "max_frames": 2}, [0, 39]),
        ({"fps": 1e15, "max_frames": 2}, [0, 39]),  # of whose ticks no memory could hold a list
        ({"fps": 0.01}, [0]),
    ],
)
def test_which_frames_are_taken(clip: Path, options: dict, expected: list[int]) -> None:
    batch = load_images(clip, SMALL, **options)
    assert batch.names == [f"clip_{i:06d}.png" for i in expected]
    assert [frame_number(batch.original(i)) for i in range(len(batch))] == expected


@pytest.mark.parametrize(("pixel", "width"), [(Fraction(4, 3), 85), (Fraction(8, 9), 57), (Fraction(9), 64)])
def test_frames_of_pixels_that_are_not_square_are_as_players_show_them(
    pixel: Fraction, width: int, tmp_path: Path
) -> None:
    batch = load_images(write_video(tmp_path / "clip.mp4", pixel=pixel), SMALL, max_frames=2)
    assert batch.transforms[1].original_size == (48, width)
    original = batch.original(1)
    assert original.shape == (48, width, 3)
    assert original[:20, : width // 2 - 4].float().mean() < 10 < original[:20, width // 2 + 4 :].float().mean()


def test_uneven_time_stamps_are_sampled_by_time(tmp_path: Path) -> None:
    # Nine tenths of the frames in the first four seconds, then one a second.
    stamps = [*range(36), 46, 56, 66, 76]
    clip = write_video(tmp_path / "uneven.mkv", stamps=stamps)
    batch = load_images([str(clip)], SMALL, fps=1)
    # Second 0, 1, 2, 3, then the nearest to 4 (3.5 s), 5 (4.6 s), 6 (5.6 s) and 7 (6.6 s).
    assert [frame_number(batch.original(i)) for i in range(len(batch))] == [0, 10, 20, 30, 35, 36, 37, 38]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".avi", "mpeg4"), (".webm", "libvpx"), (".ts", "mpeg2video"), (".h264", "libx264")],
)
def test_other_containers(tmp_path: Path, suffix: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = tmp_path / f"clip{suffix}"
    if codec == "mpeg2video":
        write_video_25(path)
    else:
        write_video(path, codec=codec)
    batch = load_images(path, SMALL, max_frames=5)
    assert [frame_number(batch.original(i)) for i in (0, 3, 1, 4, 2)] == [0, 29, 10, 39, 20]


def write_video_25(path: Path) -> None:
    """MPEG-2 knows no 10 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 8
        for i in range(NUM_FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8), "rgb24")))
        container.mux(stream.encode())


def test_random_access_reads_the_same_frames(clip: Path) -> None:
    video = Video(clip)
    in_order = {stamp: np.asarray(video.read(stamp)) for stamp in video.stamps}
    for i in (39, 3, 3, 4, 17, 16, 38, 0, 20):
        assert np.array_equal(np.asarray(video.read(video.stamps[i])), in_order[video.stamps[i]])
    assert video.seconds(video.stamps[-1]) == pytest.approx(3.9)


def test_threads_share_a_video(clip: Path) -> None:
    """Originals are read again in threads; two of them in one decoder end the process."""
    video = Video(clip)
    expected = [np.asarray(video.read(stamp)) for stamp in video.stamps]
    wanted = [*range(len(expected)), *reversed(range(len(expected)))] * 4
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda i: np.asarray(video.read(video.stamps[i])), wanted))
    for i, picture in zip(wanted, found, strict=True):
        assert np.array_equal(picture, expected[i])


def test_few_frames_of_a_long_video_decode_little(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(clip)
    decoded = []
    start = Video._start

    def counting(self: Video, key: int | None) -> None:
        start(self, key)
        frames = self._frames
        self._frames = ((number, decoded.append(number) or frame) for number, frame in frames)

    monkeypatch.setattr(Video, "_start", counting)
    for i in (0, 25, 39):
        video.read(video.stamps[i])
    # The first frame, and at most one group of pictures for each of the others; 40 without skipping.
    assert len(decoded) <= 1 + 9 + 9


def test_a_batch_with_an_open_video_can_be_copied(clip: Path) -> None:
    batch = load_images(clip, SMALL, max_frames=3)
    for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert torch.equal(copied.original(1), batch.original(1))


@pytest.mark.parametrize(
    ("matrix", "size", "black"),
    [
        # Rows (a b u), (c d v) of the track header, as an upright phone writes them: turn 90 degrees clockwise.
        ((0, 1, -1, 0), (64, 48), (0, 1)),
        ((0, -1, 1, 0), (64, 48), (1, 0)),
        ((-1, 0, 0, -1), (48, 64), (1, 1)),
    ],
)
def test_rotation_metadata(clip: Path, tmp_path: Path, matrix: tuple, size: tuple, black: tuple) -> None:
    data = bytearray(clip.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">i", data, at)[0] == 0x10000
    a, b, c, d = (value * 0x10000 for value in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    batch = load_images(path, SMALL, max_frames=2)
    assert batch.transforms[1].original_size == size
    original = batch.original(1).float()
    quarters = {
        (row, column): part.mean().item()
        for row, half in enumerate(original.chunk(2, dim=0))
        for column, part in enumerate(half.chunk(2, dim=1))
    }
    assert min(quarters, key=lambda key: quarters[key]) == black


def test_videos_that_do_not_decode(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    for name, content in {"text.mp4": b"hello", "empty.mkv": b"", "cut.mp4": data[: len(data) // 2]}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match="re-encode it") as error:
            load_images(path, SMALL)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "says"),
    [
        (".mp4", "libx264", {"movflags": "faststart"}, r"\d\d of 40 frames can be read, [12]\.\d s of the 4\.0 s"),
        (
            ".mp4",
            "libx264",
            {"movflags": "frag_keyframe+empty_moov"},
            r"\d\d frames can be read, [12]\.\d s",
        ),
        (".mkv", "mpeg4", {}, r"\d\d frames can be read, [12]\.\d s of the 4\.0 s in its header"),
    ],
)
def test_what_is_left_of_a_video_that_was_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, suffix: str, codec: str, options: dict, says: str
) -> None:
    """All of it, with one line that says how much that is of what the container promises."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write_video(tmp_path / f"clip{suffix}", codec=codec, options=options, noisy=True)
    assert len(load_images(path, SMALL)) == NUM_FRAMES
    assert caplog.messages == []
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    batch = load_images(path, SMALL)
    (line,) = caplog.messages
    assert re.search(rf"clip\{suffix} is cut off or damaged: {says}", line), line
    assert 16 <= len(batch) < 32
    assert f" {len(batch)} " in line
    assert [frame_number(batch.original(i)) for i in range(len(batch))] == list(range(len(batch)))


def test_a_sound_file_has_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="no video track"):
        load_images(path, SMALL)


def test_a_video_that_is_gone_is_not_a_damaged_one(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "gone.mp4"
    path.write_bytes(clip.read_bytes())
    pictures = list_pictures(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"video .*gone.mp4 does not exist"):
        load_images(pictures, SMALL, skip_bad=True)


def test_a_video_whose_data_are_gone(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    assert end > start
    data[start:end] = bytes(end - start)
    path = tmp_path / "blank.mp4"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be decoded at 0\.00 s") as error:
        load_images(path, SMALL)
    assert "\n" not in str(error.value)
