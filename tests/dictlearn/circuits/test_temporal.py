"""Latents over time, on clips whose latents are planted: every number can be said by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import actstore
from actstore.store import Store
from dictlearn.circuits.temporal import codes, over_time, transitions
from dictlearn.config import Input, ReLU
from dictlearn.dictionary import Dictionary
from dictlearn.viz import temporal as viz

CLIPS, FRAMES, SIDE = 20, 6, 4
GRID = (FRAMES, SIDE, SIDE)
STEADY, FLASH, LATE, MOVING, FOLLOWER, SILENT = range(6)


def planted() -> np.ndarray:
    """Activations [clip, time, row, column, latent]."""
    acts = np.zeros((CLIPS, *GRID, 6), dtype=np.float32)
    acts[:, :, 1, 1, STEADY] = 2.0
    for clip in range(CLIPS):
        acts[clip, clip % FRAMES, 2, 2, FLASH] = 1.0
        if clip % FRAMES + 1 < FRAMES:
            acts[clip, clip % FRAMES + 1, 2, 2, FOLLOWER] = 1.0
    acts[:10, 4:, 0, 3, LATE] = 1.5
    for t in range(SIDE):
        acts[:, t, t, 0, MOVING] = 1.0
    return acts


@pytest.fixture(scope="module")
def identity() -> Dictionary:
    """Latent i is channel i."""
    dictionary = Dictionary(
        {"blocks.0.resid_post": 6}, latents=6, sparsify=ReLU(), input=Input(center="none")
    )
    with torch.no_grad():
        dictionary.W_enc.copy_(torch.eye(6))
        dictionary.W_dec.copy_(torch.eye(6))
    return dictionary


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Store:
    values = planted().reshape(CLIPS, -1, 6)
    folder: Path = tmp_path_factory.mktemp("clips")
    return actstore.write_arrays(
        folder / "a.zarr", {"blocks.0.resid_post": {"patch": values}}, items_per_part=4
    )


def test_codes_come_in_time_and_place(clips: Store, identity: Dictionary) -> None:
    got = torch.cat(list(codes(clips, identity, grid=GRID))).numpy()
    origin = clips.table()["source"].to_pylist()
    assert np.array_equal(got, planted().reshape(CLIPS, FRAMES, SIDE * SIDE, 6)[origin])
    few = torch.cat(list(codes(clips, identity, grid=GRID, limit=3)))
    assert len(few) == 3


def test_onset_persistence_duty(clips: Store, identity: Dictionary) -> None:
    found = over_time(clips, identity, grid=GRID)
    assert found.attrs["tracks"] == CLIPS * SIDE * SIDE
    assert found["active"].values.tolist()[:3] == [CLIPS, CLIPS, 10]
    steady, flash, late = (found.sel(latent=i) for i in (STEADY, FLASH, LATE))
    assert float(steady["persistence"]) == 1
    assert float(steady["duty"]) == 1
    assert float(steady["run"]) == FRAMES
    assert steady["onset"].values.tolist() == [1, 0, 0, 0, 0, 0]
    assert float(steady["rate"][3]) == pytest.approx(1 / 16)
    assert float(flash["persistence"]) == 0
    assert float(flash["duty"]) == pytest.approx(1 / FRAMES)
    assert float(flash["run"]) == 1
    assert float(flash["onset"].sum()) == pytest.approx(1)
    assert late["onset"].values.tolist() == [0, 0, 0, 0, 1, 0]
    assert float(late["duty"]) == pytest.approx(2 / FRAMES)
    assert float(late["persistence"]) == 1
    silent = found.sel(latent=SILENT)
    assert np.isnan(silent["duty"])
    assert np.isnan(silent["onset"]).all()
    assert not silent["rate"].any()


def test_motion_and_whole_frames(clips: Store, identity: Dictionary) -> None:
    """A latent that wanders down stays at no place, and in the frame as a whole."""
    patch = over_time(clips, identity, grid=GRID).sel(latent=MOVING)
    frame = over_time(clips, identity, grid=GRID, level="frame").sel(latent=MOVING)
    assert float(patch["persistence"]) == 0
    assert float(frame["persistence"]) == pytest.approx(3 / 4)
    assert frame["motion"].values.tolist() == [1, 0]
    steady = over_time(clips, identity, grid=GRID).sel(latent=STEADY)
    assert steady["motion"].values.tolist() == [0, 0]
    assert np.isnan(over_time(clips, identity, grid=GRID).sel(latent=FLASH)["motion"]).all()


def test_transitions(clips: Store, identity: Dictionary) -> None:
    found = transitions(clips, identity, [FLASH, FOLLOWER, STEADY], grid=GRID, lags=(0, 1, 2))
    pair = found.sel(source=FLASH, target=FOLLOWER)
    assert pair["probability"].values.tolist() == [0, 1, 0]
    tracks = CLIPS * SIDE * SIDE
    begun = sum(clip % FRAMES + 1 < FRAMES for clip in range(CLIPS))
    assert float(pair["lift"].sel(lag=1)) == pytest.approx(tracks * (FRAMES - 1) / begun)
    back = found.sel(source=FOLLOWER, target=FLASH)
    assert back["probability"].values.tolist() == [0, 0, 0]
    apart = found.sel(source=FLASH, target=STEADY)
    assert not apart["probability"].any()
    together = transitions(clips, identity, [FLASH, STEADY], grid=GRID, level="frame")
    assert float(together["probability"].sel(source=FLASH, target=STEADY, lag=1)) == 1
    alone = over_time(clips, identity, grid=GRID)["persistence"].sel(latent=LATE)
    same = transitions(clips, identity, [LATE], grid=GRID).sel(source=LATE, target=LATE, lag=1)
    assert float(same["probability"]) == float(alone)


def test_small_chunks_give_the_same(
    clips: Store, identity: Dictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dictlearn.circuits import temporal

    whole = over_time(clips, identity, grid=GRID)
    monkeypatch.setattr(temporal, "_CHUNK_BYTES", 1)
    one_by_one = over_time(clips, identity, grid=GRID)
    assert whole.equals(one_by_one)


def test_what_is_refused(clips: Store, identity: Dictionary) -> None:
    with pytest.raises(ValueError, match=r"holds images at blocks\.0\.resid_post .*video:FOLDER"):
        over_time(clips, identity)
    with pytest.raises(ValueError, match=r"holds 96 patches of an item .*\(2, 4, 4\) has 32"):
        over_time(clips, identity, grid=(2, 4, 4))
    with pytest.raises(ValueError, match="level is 'patch' or 'frame', not 'clip'"):
        over_time(clips, identity, grid=GRID, level="clip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no latent 6: 0 to 5"):
        transitions(clips, identity, [6], grid=GRID)
    with pytest.raises(ValueError, match="no lag 6 in clips of 6 frames: 0 to 5"):
        transitions(clips, identity, [0], lags=(6,), grid=GRID)
    other = Dictionary({"blocks.9.resid_post": 6}, latents=6, sparsify=ReLU())
    with pytest.raises(KeyError, match=r"blocks\.9\.resid_post"):
        over_time(clips, other, grid=GRID)


def test_plots(clips: Store, identity: Dictionary) -> None:
    found = over_time(clips, identity, grid=GRID)
    pairs = transitions(clips, identity, [FLASH, FOLLOWER, STEADY], grid=GRID)
    axes = Figure().subplots(2, 2).ravel()
    viz.profile(axes[0], found, [STEADY, LATE], what="onset")
    assert [line.get_label() for line in axes[0].lines] == ["0", "2"]
    assert axes[0].lines[1].get_ydata().tolist() == [0, 0, 0, 0, 1, 0]
    viz.persistence(axes[1], found, most_labels=2)
    assert len(axes[1].collections[0].get_offsets()) == 5
    named = {text.get_text() for text in axes[1].texts}
    assert named == {str(LATE), str(STEADY)}
    acts = next(codes(clips, identity, grid=GRID))[0].amax(1).numpy()
    image = viz.raster(axes[2], acts, [STEADY, FLASH])
    assert image.get_array().shape == (2, FRAMES)
    matrix = viz.transition_matrix(axes[3], pairs).get_array()
    assert matrix.shape == (3, 3)
    assert matrix[0, 1] > 0
