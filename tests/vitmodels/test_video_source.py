"""A folder of videos as a data set: items, rows, labels, options, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_clips import write_video

from actstore.sources import Undecodable, open_source, reopen_source
from actstore.sources.video import VideoFolder
from vitmodels import clips
from vitmodels.clips import ClipSampling, read_clip
from vitmodels.spec import ModelSpec, TokenGrid

pytest.importorskip("av")


def spec(*shape: int) -> ModelSpec:
    numbers = {"d_model": 8, "n_layers": 1, "n_heads": 1, "d_head": 8, "d_mlp": 8}
    grid = TokenGrid(patch=(2, 4, 4))
    return ModelSpec(id="x/y", family="x", backend="x", grid=grid, input_shape=shape, **numbers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for label in ("jump", "run"):
        (root / label).mkdir(parents=True)
    write_video(root / "jump" / "a.mp4", 20)
    write_video(root / "run" / "b.mkv", 9)
    write_video(root / "top.mp4", 12)
    (root / "notes.txt").write_text("no video")
    return root


def test_items_are_clips_in_path_order(folder: Path) -> None:
    sampling = ClipSampling(frames=4, stride=2, clips=2)
    source = VideoFolder(folder, sampling)
    rows = [source.row(i) for i in range(len(source))]
    assert [r["key"] for r in rows] == [
        *("jump/a.mp4#0", "jump/a.mp4#1", "run/b.mkv#0", "run/b.mkv#1", "top.mp4#0", "top.mp4#1")
    ]
    assert [r["label_name"] for r in rows] == ["jump"] * 2 + ["run"] * 2 + [None] * 2
    assert [r["label"] for r in rows] == [0, 0, 1, 1, None, None]
    assert [r["clip"] for r in rows] == [0, 1] * 3
    for i, name in enumerate(("jump/a.mp4", "run/b.mkv", "top.mp4")):
        for clip in range(2):
            expected = read_clip(folder / name, sampling, clip, key=name)
            got = source.image(2 * i + clip)
            np.testing.assert_array_equal(got.frames, expected.frames)


def test_a_video_of_too_many_pixels_is_an_item_that_cannot_be_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = VideoFolder(folder, ClipSampling(frames=4))
    monkeypatch.setattr(clips, "MAX_CLIP", 3 * 32 * 32)
    with pytest.raises(Undecodable, match=r"a clip of 4 has 4,096; at most 3,072 are decoded"):
        source.image(0)


def test_a_folder_whose_files_are_videos_is_a_source(folder: Path) -> None:
    source = open_source(str(folder))
    assert isinstance(source, VideoFolder)
    assert len(source) == 3
    source = source.for_model(spec(8, 3, 32, 32))
    assert source.image(0).frames.shape == (8, 32, 32, 3)
    one = open_source(folder / "top.mp4")
    assert [one.row(i)["key"] for i in range(len(one))] == ["top.mp4"]


def test_options_come_with_the_name(folder: Path) -> None:
    source = open_source(f"video:{folder}?stride=3&clips=2&strategy=random&seed=7")
    assert len(source) == 6
    source = source.for_model(spec(5, 3, 32, 32))
    assert source.sampling == ClipSampling(frames=5, stride=3, clips=2, strategy="random", seed=7)
    fixed = open_source(f"video:{folder}?frames=6")
    with pytest.raises(ValueError, match="takes clips of 5 frames, the data has 6"):
        fixed.for_model(spec(5, 3, 32, 32))


def test_description_opens_the_same_source_and_sees_changes(folder: Path) -> None:
    source = open_source(f"video:{folder}?stride=2&clips=2").for_model(spec(4, 3, 32, 32))
    told = source.describe()
    assert (told["kind"], told["items"], told["sampling"]["frames"]) == ("video", 6, 4)
    again = reopen_source(told)
    np.testing.assert_array_equal(again.image(3).frames, source.image(3).frames)
    other = open_source(f"video:{folder}?stride=3&clips=2").for_model(spec(4, 3, 32, 32))
    assert other.describe()["fingerprint"] != told["fingerprint"]
    write_video(folder / "top.mp4", 14)
    with pytest.raises(ValueError, match="data set changed"):
        reopen_source(told)


def test_an_image_model_is_refused_before_anything_is_decoded(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"x/y takes images .* holds videos"):
        open_source(str(folder)).for_model(spec(3, 32, 32))


def test_a_damaged_file_is_skipped_with_its_reason(folder: Path) -> None:
    (folder / "run" / "b.mkv").write_bytes(b"nothing" * 50)
    source = VideoFolder(folder, ClipSampling(frames=4))
    assert source.row(1)["key"] == "run/b.mkv"
    with pytest.raises(Undecodable, match="cannot be decoded"):
        source.image(1)
    shutil.rmtree(folder / "jump")
    with pytest.raises(Undecodable, match="missing"):
        source.image(0)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no option 'strid'; options of clips are frames, stride"):
        open_source(f"video:{folder}?strid=2")
    with pytest.raises(ValueError, match="stride must be a number, not 'two'"):
        open_source(f"video:{folder}?stride=two")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(f"video:{tmp_path}/nowhere")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"holds no videos.*found \.txt"):
        open_source(f"video:{tmp_path}/texts")


def test_storage_that_fails_is_no_damaged_video(folder, monkeypatch):
    from fsspec.implementations.local import LocalFileOpener

    from actstore.sources import Unreachable

    source = open_source(f"video:{folder}?frames=4")

    def failing(self, *words):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalFileOpener, "read", failing)
    with pytest.raises(Unreachable, match=r"cannot be fetched: Input/output error"):
        source.image(0)
