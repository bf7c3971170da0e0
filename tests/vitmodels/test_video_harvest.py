"""Video models end to end: files -> clips -> model -> store, every value as the direct pass."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clips import write_video

import actstore
import vitmodels
from actstore.sources.video import VideoFolder
from vitmodels.clips import ClipSampling, read_clip
from vitmodels.hf_backend import small
from vitmodels.model import VisionModel
from vitmodels.spec import TokenGrid

pytest.importorskip("av")
pytest.importorskip("transformers")

FRAMES = 4
SIZES = {"image_size": 32, "patch_size": 8, "num_frames": FRAMES, "intermediate_size": 48}
MAKERS = {
    "vivit": small(
        "VivitForVideoClassification",
        num_labels=7,
        **{**SIZES, "tubelet_size": [2, 8, 8], "patch_size": 8},
    ),
    "videomae": small("VideoMAEModel", use_mean_pooling=False, tubelet_size=2, **SIZES),
    "vjepa2": small(
        "VJEPA2Model",
        crop_size=32,
        patch_size=8,
        frames_per_clip=FRAMES,
        mlp_ratio=2.0,
        pred_hidden_size=24,
        pred_num_hidden_layers=1,
        pred_num_attention_heads=4,
    ),
    "timesformer": small("TimesformerModel", **SIZES),
}


def make(name: str) -> VisionModel:
    return vitmodels.wrap(MAKERS[name](), id=name)


def harvest_equals_direct_pass(
    name: str, folder: Path, out: Path, data: object, sampling: ClipSampling
) -> None:
    model = make(name)
    sites = ["blocks.1.resid_post", "blocks.0.mlp_out"]
    store = actstore.harvest(
        model=model,
        data=data,
        sites=sites,
        out=str(out),
        dtype="float32",
        tokens="cls,patch",
        device="cpu",
        batch_size=3,
        workers=1,
    )
    store = actstore.open(str(out))
    time = FRAMES if name == "timesformer" else FRAMES // 2
    cls = int(name in ("vivit", "timesformer"))
    assert store.grid(sites[0]) == TokenGrid(cls=cls, patch=(time, 4, 4))
    assert store.is_complete
    table = store.table().to_pandas()
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".mp4", ".mkv"))
    assert len(table) == store.n_items == len(files) * sampling.clips
    for row in table.itertuples():
        key, _, clip = row.key.partition("#")
        frames = read_clip(folder / key, sampling, int(clip or 0), key=key)
        x = model.transform(frames)
        assert x.shape == (FRAMES, 3, 32, 32)
        with torch.no_grad():
            direct = model.run(x[None], sites)
        for site in sites:
            for kind in store.kinds(site):
                got = store.items([int(row.position)], site, kind)[0]
                want = direct[site][0, store.grid(site).slice(kind)].numpy()
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_harvest_of_small_videos(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", 12, size=48)
    write_video(folder / "b.mp4", 7, size=64)
    sampling = ClipSampling(frames=FRAMES, stride=2, clips=2)
    harvest_equals_direct_pass(
        name, folder, tmp_path / "acts.zarr", f"video:{folder}?stride=2&clips=2", sampling
    )


@pytest.mark.parametrize("name", MAKERS)
def test_harvest_of_the_shared_videos(name: str, tmp_path: Path, shared: Path) -> None:
    folder = shared / "data" / "video"
    harvest_equals_direct_pass(
        name, folder, tmp_path / "acts.zarr", str(folder), ClipSampling(frames=FRAMES)
    )


def test_a_damaged_video_is_a_row_without_a_position(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in "acde":
        write_video(folder / f"{name}.mp4", 12)
    (folder / "b.mp4").write_bytes(b"nothing" * 99)
    source = VideoFolder(folder, ClipSampling(frames=FRAMES))
    out = str(tmp_path / "acts.zarr")
    store = actstore.harvest(model=make("vivit"), data=source, sites="pooled", out=out, seed=1)
    assert store.n_items == 4
    table = store.index().to_pandas().set_index("key")
    assert "b.mp4 cannot be decoded: Invalid data" in table.loc["b.mp4", "status"]
    assert (table.drop("b.mp4")["status"] == "ok").all()


def test_an_image_model_refuses_clips(tmp_path: Path) -> None:
    maker = small("ViTModel", image_size=32, patch_size=8, intermediate_size=48)
    model = vitmodels.wrap(maker(), id="images")
    write_video(tmp_path / "a.mp4", 12)
    clip = read_clip(tmp_path / "a.mp4", ClipSampling(frames=FRAMES))
    with pytest.raises(ValueError, match=r"takes images, got a array of shape \(4, 32"):
        model.transform(clip)
    with pytest.raises(ValueError, match=r"takes images .* looks like clips"):
        model(torch.zeros(2, FRAMES, 3, 32, 32))
    with pytest.raises(ValueError, match=r"takes images .* holds videos"):
        actstore.harvest(
            model=model, data=str(tmp_path), sites="pooled", out=str(tmp_path / "acts.zarr")
        )


@pytest.mark.parametrize("name", MAKERS)
def test_a_video_model_refuses_images(name: str, tmp_path: Path) -> None:
    model = make(name)
    picture = Image.new("RGB", (40, 40))
    with pytest.raises(ValueError, match="takes clips of 4 frames, got one image"):
        model.transform(picture)
    with pytest.raises(ValueError, match=r"takes clips .* looks like images"):
        model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="takes clips of 4 frames, got 6"):
        model.transform([picture] * 6)
    with pytest.raises(ValueError, match=r"a clip is frames \[T, H, W, 3\]"):
        model.transform(np.zeros((4, 3, 40, 40), np.uint8))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match="takes clips of 4 frames, got one image"):
        actstore.harvest(
            model=model,
            data=str(tmp_path / "images"),
            sites="final",
            out=str(tmp_path / "acts.zarr"),
        )


def test_frames_may_be_pictures_or_an_array() -> None:
    model = make("vivit")
    frames = np.random.default_rng(0).integers(0, 255, (FRAMES, 40, 50, 3), dtype=np.uint8)
    by_array = model.transform(frames)
    by_pictures = model.transform([Image.fromarray(frame) for frame in frames])
    assert torch.equal(by_array, by_pictures)
