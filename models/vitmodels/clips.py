"""Clips from video files: which frames, and their pixels. Decoded by PyAV, no torch.

A file of n frames is cut into `clips` segments of equal length, and one clip is taken from
each. With a stride, its frames are that many frames apart; without one they are spread over
the segment, each in the middle of an equal share of it::

    frame i of T, segment [a, b):   a + floor((i + 1/2) (b - a) / T)
"""

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

EXTENSIONS = frozenset({".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})
"""File names taken for videos, in lower case."""

MAX_FRAME = 1 << 26
"""Pixels of a frame; larger ones are refused before they are decoded (67 million)."""

MAX_CLIP = 1 << 30
"""Pixels of all frames of a clip (64 frames of 4096 x 2160 are 566 million)."""


@dataclass(frozen=True, kw_only=True)
class ClipSampling:
    """Which frames of a file make its clips."""

    frames: int
    """Frames of a clip: what the model takes (``model.spec.input_shape[0]``)."""
    stride: int | None = None
    """Distance of frames in frames of the file; None spreads them over the segment."""
    clips: int = 1
    """Clips a file."""
    strategy: Literal["center", "start", "random"] = "center"
    """With a stride: where in its segment a clip lies; random is keyed by seed, file and clip."""
    seed: int = 0
    """Key of the random strategy."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.clips < 1 or (self.stride is not None and self.stride < 1):
            raise ValueError(f"frames, stride and clips must be at least 1: {self}")
        if self.strategy not in ("center", "start", "random"):
            raise ValueError(f"strategy is 'center', 'start' or 'random', not {self.strategy!r}")
        if self.strategy != "center" and self.stride is None:
            raise ValueError(
                f"strategy {self.strategy!r} places a clip of a given stride: give stride= too"
            )

    def indices(self, n_frames: int, clip: int = 0, key: str = "") -> NDArray[np.int64]:
        """Return the frame numbers of one clip, ascending.

        Where the file is too short for the stride, its last frame is repeated.

        Parameters
        ----------
        n_frames
            Frames of the file.
        clip
            Which clip.
        key
            Name of the file, for the random strategy.
        """
        if not 0 <= clip < self.clips:
            raise ValueError(f"clip {clip} of a file with {self.clips} clips")
        if n_frames < 1:
            raise ValueError("a video without frames has no clips")
        low, high = n_frames * clip / self.clips, n_frames * (clip + 1) / self.clips
        if self.stride is None:
            share = (np.arange(self.frames) + 0.5) / self.frames
            places = np.floor(low + share * (high - low))
        else:
            span = (self.frames - 1) * self.stride + 1
            room = max(0.0, high - low - span)
            start = {"start": 0.0, "center": room / 2}.get(self.strategy)
            if start is None:
                start = self._random(key, clip) * room
            start = min(np.floor(low + start), max(0, n_frames - span))
            places = start + np.arange(self.frames) * self.stride
        return np.clip(places, 0, n_frames - 1).astype(np.int64)

    def _random(self, key: str, clip: int) -> float:
        digest = hashlib.sha256(f"{self.seed}:{key}:{clip}".encode()).digest()
        return float(
            np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).random()
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """Frames of one clip, ready for the transform of a video model."""

    frames: NDArray[np.uint8]
    """RGB, ``[frame, height, width, 3]``."""
    indices: NDArray[np.int64]
    """Their numbers in the file."""


def read_clip(
    file: str | os.PathLike[str] | IO[bytes],
    sampling: ClipSampling,
    clip: int = 0,
    key: str | None = None,
) -> Clip:
    """Decode one clip of a video file.

    Only the stretches from the nearest keyframes on are decoded.

    Parameters
    ----------
    file
        Path, or an open binary file that can seek.
    sampling
        Which frames.
    clip
        Which of the file's clips.
    key
        Name of the file for the random strategy; its path by default.

    Raises
    ------
    ValueError
        PyAV is not installed; the file holds no video, or frames that cannot be decoded, or they
        have more than `MAX_FRAME` pixels each or `MAX_CLIP` together.
    """
    av = _pyav()
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "file")
    key = str(name) if key is None else key
    try:
        with av.open(name if isinstance(file, str | os.PathLike) else file) as container:
            if not container.streams.video:
                raise ValueError(f"{name} holds no video stream")
            stream = container.streams.video[0]
            _check_pixels(name, stream, sampling.frames)
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME)}  # whatever a frame says
            times, keyframes = _timeline(container, stream)
            indices = sampling.indices(len(times), clip, key)
            wanted = sorted({times[i] for i in indices})
            pixels = {}
            for time, frame in _decode(container, stream, wanted, keyframes):
                _check_pixels(name, frame, sampling.frames)  # a stream may change its size
                pixels[time] = frame.to_ndarray(format="rgb24")
    except (av.error.FFmpegError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be decoded: {reason}") from error
    missing = [i for i in indices if times[i] not in pixels]
    if missing:
        raise ValueError(f"{name}: frame {missing[0]} of {len(times)} cannot be decoded")
    if len({frame.shape for frame in pixels.values()}) > 1:
        raise ValueError(
            f"{name} cannot be decoded: its frames have several sizes; give them one: "
            "ffmpeg -i FILE -vf scale=640:360 OUT"
        )
    frames = np.stack([pixels[times[i]] for i in indices])
    return Clip(frames=frames, indices=indices)


def _check_pixels(name: str, picture: Any, frames: int) -> None:
    """Refuse a clip of so many frames as large as a stream or a frame says it is."""
    pixels = picture.width * picture.height
    size = f"{name} has frames of {picture.width} x {picture.height} pixels"
    remedy = "scale it down: ffmpeg -i FILE -vf scale=-2:1080 OUT"
    if pixels > MAX_FRAME:
        raise ValueError(f"{size}, at most {MAX_FRAME:,} are decoded; {remedy}")
    if pixels * frames > MAX_CLIP:
        raise ValueError(
            f"{size}, a clip of {frames} has {pixels * frames:,}; at most {MAX_CLIP:,} are "
            f"decoded: take fewer frames, or {remedy}"
        )


def _pyav() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ValueError(
            "clips from video files need PyAV, which is not installed: "
            "pip install 'actstore[video]'"
        ) from error
    return av


def _timeline(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Return the presentation times of all frames and of the keyframes, ascending.

    The packets are read, not decoded.
    """
    times, keyframes = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keyframes.append(packet.pts)
    if not times:
        raise ValueError(f"{container.name} holds no video frames")
    times.sort()
    return times, sorted(keyframes) or times[:1]


def _decode(
    container: Any, stream: Any, wanted: Sequence[int], keyframes: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Yield (time, frame of PyAV) of the frames at the times `wanted`, which ascend."""
    groups: dict[int, list[int]] = {}
    for time in wanted:
        groups.setdefault(max(0, bisect.bisect_right(keyframes, time) - 1), []).append(time)
    for group, times in groups.items():
        container.seek(keyframes[group], stream=stream, backward=True)
        left = set(times)
        for frame in container.decode(stream):
            if frame.pts in left:
                left.discard(frame.pts)
                yield frame.pts, frame
            if not left or (frame.pts is not None and frame.pts > times[-1]):
                break
