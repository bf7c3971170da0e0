"""Clips from video files: frame numbers by their definition, pixels as decoding in order gives."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitmodels import clips
from vitmodels.clips import ClipSampling, read_clip

av = pytest.importorskip("av")


def write_video(path: Path, frames: int, *, size: int = 32, codec: str = "mpeg4") -> Path:
    """Write a small video; keyframes every five frames, with frames that look back and ahead."""
    rng = np.random.default_rng(frames)
    pictures = rng.integers(0, 255, (frames, 4, 4, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 5
        stream.codec_context.max_b_frames = 2
        for picture in pictures:
            big = picture.repeat(size // 4, 0).repeat(size // 4, 1)
            for packet in stream.encode(av.VideoFrame.from_ndarray(big, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def all_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "noise.mp4", 23)


SAMPLINGS = [
    ClipSampling(frames=4),
    ClipSampling(frames=23),
    ClipSampling(frames=40),
    ClipSampling(frames=4, stride=3, strategy="start"),
    ClipSampling(frames=4, stride=2, clips=3),
    ClipSampling(frames=3, stride=2, clips=2, strategy="random", seed=5),
    ClipSampling(frames=8, stride=9),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_pixels_are_those_of_decoding_in_order(video: Path, sampling: ClipSampling) -> None:
    everything = all_frames(video)
    assert len(everything) == 23
    for clip in range(sampling.clips):
        got = read_clip(video, sampling, clip)
        assert got.frames.shape == (sampling.frames, 32, 32, 3)
        assert got.frames.dtype == np.uint8
        np.testing.assert_array_equal(got.frames, everything[got.indices])


def test_the_videos_of_the_shared_data(shared: Path) -> None:
    for name, count in (("bikes.mp4", 250), ("carphone_pristine.mp4", 120)):
        path = shared / "data" / "video" / name
        everything = all_frames(path)
        assert len(everything) == count
        for clip in range(2):
            sampling = ClipSampling(frames=8, stride=4, clips=2)
            got = read_clip(path, sampling, clip)
            np.testing.assert_array_equal(got.frames, everything[got.indices])


@given(
    n=st.integers(1, 300),
    frames=st.integers(1, 40),
    stride=st.one_of(st.none(), st.integers(1, 9)),
    clips=st.integers(1, 5),
    strategy=st.sampled_from(["center", "start", "random"]),
)
def test_frame_numbers(n: int, frames: int, stride: int | None, clips: int, strategy: str) -> None:
    if stride is None:
        strategy = "center"
    sampling = ClipSampling(frames=frames, stride=stride, clips=clips, strategy=strategy)
    starts = []
    for clip in range(clips):
        got = sampling.indices(n, clip, "a")
        assert got.shape == (frames,)
        assert got.min() >= 0
        assert got.max() < n
        steps = np.diff(got)
        assert (steps >= 0).all()
        if stride is not None and (frames - 1) * stride < n:
            assert (steps == stride).all()
        np.testing.assert_array_equal(got, sampling.indices(n, clip, "a"))
        starts.append(int(got[0]))
    assert starts == sorted(starts)


def test_spread_frames_stand_in_the_middle_of_equal_shares() -> None:
    assert ClipSampling(frames=4).indices(40).tolist() == [5, 15, 25, 35]
    halves = ClipSampling(frames=2, clips=2)
    assert [halves.indices(40, c).tolist() for c in (0, 1)] == [[5, 15], [25, 35]]


def test_strided_clips_lie_where_asked() -> None:
    assert ClipSampling(frames=3, stride=2).indices(11).tolist() == [3, 5, 7]
    assert ClipSampling(frames=3, stride=2, strategy="start").indices(11).tolist() == [0, 2, 4]
    assert ClipSampling(frames=4, stride=2).indices(4).tolist() == [0, 2, 3, 3]
    random = ClipSampling(frames=3, stride=2, strategy="random")
    places = {int(random.indices(100, key=str(k))[0]) for k in range(30)}
    assert len(places) > 10
    assert max(places) <= 95


def test_an_open_file_serves_too(video: Path) -> None:
    sampling = ClipSampling(frames=4)
    got = read_clip(io.BytesIO(video.read_bytes()), sampling)
    np.testing.assert_array_equal(got.frames, read_clip(video, sampling).frames)


def test_what_is_no_video_is_refused(tmp_path: Path, video: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video at all" * 20)
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be decoded"):
        read_clip(broken, ClipSampling(frames=4))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cut.mp4"):
        read_clip(cut, ClipSampling(frames=23))
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match="no video stream"):
        read_clip(sound, ClipSampling(frames=4))


def test_what_unpacks_to_too_many_pixels_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A black film of any size is a small file."""
    path = write_video(tmp_path / "large.mp4", 6, size=64)

    def never(*words: object) -> None:
        raise AssertionError("nothing is decoded")

    with monkeypatch.context() as patch:
        patch.setattr(clips, "_decode", never)
        patch.setattr(clips, "MAX_FRAME", 4000)
        message = r"large.mp4 has frames of 64 x 64 pixels, at most 4,000 are decoded; scale it d"
        with pytest.raises(ValueError, match=message):
            read_clip(path, ClipSampling(frames=4))
    monkeypatch.setattr(clips, "MAX_CLIP", 5 * 64 * 64)
    assert len(read_clip(path, ClipSampling(frames=5)).frames) == 5
    monkeypatch.setattr(clips, "_decode", never)
    message = r"a clip of 6 has 24,576; at most 20,480 are decoded: take fewer frames, or scale it"
    with pytest.raises(ValueError, match=message):
        read_clip(path, ClipSampling(frames=6))


def test_frames_larger_than_the_file_says_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "liar.mp4", 6, size=64)
    monkeypatch.setattr(clips, "MAX_FRAME", 4000)
    real = clips._check_pixels

    def believes(name: str, picture: object, frames: int) -> None:
        if isinstance(picture, av.VideoFrame):
            real(name, picture, frames)

    monkeypatch.setattr(clips, "_check_pixels", believes)
    with pytest.raises(ValueError, match=r"liar.mp4 cannot be decoded"):
        read_clip(path, ClipSampling(frames=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "at least 1"),
        ({"frames": 4, "stride": 0}, "at least 1"),
        ({"frames": 4, "strategy": "middle", "stride": 1}, "'center', 'start' or 'random'"),
        ({"frames": 4, "strategy": "random"}, "give stride= too"),
    ],
)
def test_bad_sampling(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSampling(**options)


def test_a_clip_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="clip 3 of a file with 2 clips"):
        ClipSampling(frames=2, clips=2).indices(10, 3)
