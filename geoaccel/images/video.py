"""Frames of a video, decoded one at a time.

Opening a video lists the time stamps of its frames from the container, without decoding. Frames are then chosen by time
and decoded in order, skipping from key frame to key frame if nothing in between is needed.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from geoaccel.errors import UserError
from geoaccel.images.read import one_line

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".3gp", ".flv", ".ogv", ".h264", ".h265", ".hevc"),
)


FEWER = 0.98  # a video with less than this fraction of the frames or length in its header was cut off
WIDEST_PIXEL = 4  # times as wide as high, or as high as wide; beyond that the header is wrong


class Video:
    """Random access to the frames of one video file, cheap when they are read in order; thread-safe.

    Attributes:
        path: The file.
        stamps: Presentation time of every frame, ascending, in units of the stream's time base. Frame numbers if
            the container has no time stamps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps: list[int] = []
        self._key_stamps: list[int] = []
        self._has_time = True
        self._time_base = Fraction(1, 25)
        self._pixel_width = Fraction(1)  # over its height
        self._container: Any = None
        self._frames: Iterator[tuple[int, Any]] = iter(())
        self._position: int | None = None
        self._lock = threading.RLock()  # concurrent use of the single decoder would crash the process
        import av

        try:
            self._list_frames()
        except (av.FFmpegError, OSError) as error:
            raise self._undecodable(one_line(error)) from error

    def choose(self, fps: float | None) -> list[int]:
        """Stamps of the frames nearest to evenly spaced times at ``fps`` per second; all frames without it."""
        if fps is None:
            return self.stamps
        stamps = np.asarray(self.stamps, dtype=np.float64)
        step = 1.0 / (fps * float(self._time_base))
        if step <= np.diff(stamps).min(initial=np.inf):  # every frame has a tick, of which there may be billions
            return self.stamps
        ticks = np.arange(stamps[0], stamps[-1] + 1e-6 * step, step)
        after = np.searchsorted(stamps, ticks).clip(1, len(stamps) - 1) if len(stamps) > 1 else np.zeros(1, dtype=int)
        before = np.maximum(after - 1, 0)
        nearest = np.where(ticks - stamps[before] <= stamps[after] - ticks, before, after)
        return [self.stamps[i] for i in np.unique(nearest)]

    def seconds(self, stamp: int) -> float:
        """Time of a stamp since the first frame."""
        return float((stamp - self.stamps[0]) * self._time_base)

    def read(self, stamp: int) -> Image.Image:
        """Decode one frame to upright RGB, with square pixels."""
        import av

        with self._lock:
            try:
                frame = self._decode(stamp)
            except (av.FFmpegError, OSError) as error:
                self.close()
                if not self.path.exists():  # not damaged: the file may be missing on another machine
                    raise FileNotFoundError(f"video {self.path} does not exist; check the path") from None
                raise self._undecodable(one_line(error), stamp) from error
            if frame is None:
                self.close()
                raise self._undecodable("the frames end early", stamp)
            rgb = frame.to_ndarray(format="rgb24")
        quarter_turns = round(frame.rotation / 90) % 4
        height, width = rgb.shape[:2]
        if (shown := round(width * self._pixel_width)) != width:
            rgb = np.asarray(Image.fromarray(rgb).resize((shown, height), Image.Resampling.BICUBIC))
        return Image.fromarray(np.ascontiguousarray(np.rot90(rgb, quarter_turns)))

    def close(self) -> None:
        """Close the decoder; the next read opens the file again."""
        with self._lock:
            if self._container is not None:
                self._container.close()
            self._container, self._frames, self._position = None, iter(()), None

    def __getstate__(self) -> dict[str, Any]:
        """An open decoder can be neither copied nor pickled; the copy opens its own."""
        return {**self.__dict__, "_container": None, "_frames": (), "_position": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _frames=iter(()), _lock=threading.RLock())

    def _list_frames(self) -> None:
        """Read time stamps and key frames from the container."""
        import av

        with av.open(str(self.path)) as container:
            if not container.streams.video:
                raise UserError(f"{self.path} has no video track; pass a video, or a folder of images")
            stream = container.streams.video[0]
            self._time_base = stream.time_base or self._time_base
            pixel_width = stream.sample_aspect_ratio
            if pixel_width and 1 / WIDEST_PIXEL <= pixel_width <= WIDEST_PIXEL:  # else it is not said, or wrong
                self._pixel_width = pixel_width
            found = [packet for packet in container.demux(stream) if packet.size]
            whole = [packet for packet in found if not packet.is_corrupt]
            promised, seconds = stream.frames, (container.duration or 0) / av.time_base
            packets = [(packet.pts, packet.is_keyframe) for packet in whole if not getattr(packet, "is_discard", False)]
            timed = [(pts, is_key) for pts, is_key in packets if pts is not None]
            if len(timed) == len(packets):
                self.stamps = sorted({pts for pts, _ in timed})
                self._key_stamps = sorted({pts for pts, is_key in timed if is_key})
            else:
                self._has_time = False
                self._time_base = 1 / (stream.average_rate or Fraction(25))
                self.stamps = list(range(len(packets)))
        if not self.stamps:
            raise self._undecodable("it has no frames")
        self._warn_if_cut(len(whole), promised, seconds, damaged=len(whole) < len(found))

    def _warn_if_cut(self, count: int, promised: int, seconds: float, *, damaged: bool) -> None:
        """Warn if a video has fewer frames than its header says.

        Args:
            count: Frames that exist.
            promised: Frames according to the header; 0 if it does not say.
            seconds: Length according to the header, of the longest track; audio may last a moment longer.
            damaged: A frame is incomplete.
        """
        there = self.seconds(self.stamps[-1])
        if promised:
            cut = damaged or count < FEWER * promised - 1
            texts = f"{count} of {promised} frames"
        else:
            cut = damaged or there < FEWER * seconds - 1
            texts = f"{count} frames"
        if cut:
            logger.warning(
                "video %s is cut off or damaged: %s can be read, %.1f s of the %.1f s in its header; "
                "copy it again to get the rest",
                self.path,
                texts,
                there,
                max(seconds, there),
            )

    def _decode(self, stamp: int) -> Any:
        """The frame at ``stamp``, or the next one if the stream lacks it; None at the end of the stream."""
        key = self._key_before(stamp)
        if self._position is None or stamp <= self._position or (key is not None and key > self._position):
            self._start(key)
            number, frame = next(self._frames, (None, None))
            if key is not None and (number is None or number > stamp):
                # This container seeks past the requested stamp.
                self._start(None)
            elif number is not None and number >= stamp:
                self._position = number
                return frame
        for number, frame in self._frames:
            if number >= stamp:
                self._position = number
                return frame
        return None

    def _key_before(self, stamp: int) -> int | None:
        """Stamp of the last key frame not after ``stamp``, if decoding can start there."""
        i = bisect_right(self._key_stamps, stamp)
        return self._key_stamps[i - 1] if i > 1 else None

    def _start(self, key: int | None) -> None:
        """Make ``_frames`` yield from a key frame, or from the beginning."""
        import av

        self.close()
        self._container = av.open(str(self.path))
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        if key is not None:
            self._container.seek(key, stream=stream)
        # An incomplete frame would stop the decoding of those before it.
        packets = (packet for packet in self._container.demux(stream) if not packet.is_corrupt)
        frames = (frame for packet in packets for frame in packet.decode())
        if self._has_time:
            self._frames = ((frame.pts, frame) for frame in frames if frame.pts is not None)
        else:
            self._frames = enumerate(frames)

    def _undecodable(self, reason: str, stamp: int | None = None) -> UserError:
        where = "" if stamp is None else f" at {self.seconds(stamp):.2f} s"
        return UserError(
            f"video {self.path} cannot be decoded{where} ({reason}); copy it again if it was cut off, else "
            f"re-encode it (for example to H.264 in .mp4), or pass a folder of its frames"
        )
