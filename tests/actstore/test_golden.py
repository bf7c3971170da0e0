"""Stores that were written once and are kept: a change that cannot read them any more fails.

Never regenerate the files of a format to make this pass; `golden/make.py` is for a new format.
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from fake_model import objects
from golden import make

import actstore
from actstore import layout
from actstore.convert import convert
from actstore.reader import batches
from actstore.store import Store
from actstore.verify import verify

FORMAT1 = {
    "raw": "15415b7deb41f65e284cf4f24e6432d46c6b4924a91ee8108c80770711428d88",
    "archive": "99adbc475f885e68440f94abd2da50b5323e9fd71d019b05243df789b67a55b0",
    "int8": "0a7b8ae6627220058d7eb40f310937705c83ff78d05850f6bcda1ac297fac64c",
    "subsampled": "12cb47cd1c9de5760687ceec69822d2037b791c9fd6eb87494385c7ec5b4fa97",
}
"""Kept store -> its fingerprint."""

POSITIONS = [[3, 4], [1, 5], [0, 2], [1, 2], [2, 4], [1, 5], [0, 3], [0, 5], [0, 3]]
"""Which patches the items of `subsampled` keep."""


@pytest.fixture(params=FORMAT1)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Store]:
    kind = request.param
    folder = Path(__file__).parent / "golden" / "format1"
    with zipfile.ZipFile(folder / f"{kind}.zip") as archive:
        archive.extractall(tmp_path / kind)
    return kind, actstore.open(tmp_path / kind)


def truth(kind: str, store: Store) -> dict[str, np.ndarray]:
    """Return what the store was made of, by token kind, in the order of its items."""
    source = store.table()["source"].to_numpy()
    given = {k: v[source] for k, v in make.values().items()}
    if kind == "archive":
        given = {k: layout.from_stored(layout.to_bfloat16(v), "bfloat16") for k, v in given.items()}
    if kind == "subsampled":
        assert source.tolist() == list(range(9))
        chosen = np.array(POSITIONS)
        given["patch"] = np.take_along_axis(given["patch"], chosen[:, :, None], axis=1)
    return given


def test_the_description(kept: tuple[str, Store]) -> None:
    kind, store = kept
    assert store.fingerprint == FORMAT1[kind]
    assert store.manifest.format == 1
    assert store.is_complete
    assert store.part_items.tolist() == [4, 4, 1]
    assert store.sites == (make.SITE,)
    assert store.kinds(make.SITE) == ("cls", "patch")
    assert verify(store) == []
    assert store.manifest.dtype == {"int8": "int8", "archive": "bfloat16"}.get(kind, "float16")


def test_the_index(kept: tuple[str, Store]) -> None:
    kind, store = kept
    rows = store.table().to_pylist()
    assert [row["position"] for row in rows] == list(range(9))
    if kind != "subsampled":
        assert [row["source"] for row in rows] == [0, 3, 8, 1, 6, 5, 7, 2, 4]
        assert [row["key"] for row in rows] == [f"item {row['source']}" for row in rows]
        assert [row["label"] for row in rows] == [row["source"] % 3 for row in rows]


def test_the_values(kept: tuple[str, Store]) -> None:
    kind, store = kept
    for name, value in truth(kind, store).items():
        found = store.items(range(9), make.SITE, name).astype(np.float32)
        if kind == "int8":
            step = store.manifest.scale(store.spec(make.SITE, name))
            assert step is not None
            assert (np.abs(found - value) <= 0.5001 * step).all()
        else:
            assert (found == value).all()
        assert (store.dask(make.SITE, name).compute() == found).all()
        shown = np.asarray(store.array(make.SITE, name)[:])
        if kind == "int8":
            shown = shown * np.asarray(zarr.open_array(store.storage.zarr(), mode="r",
                path=store.array(make.SITE, name).attrs["scale"])[:])  # fmt: skip
        assert (layout.from_stored(shown, store.manifest.dtype) == found).all()
        token = store.tokens(range(9), make.SITE, name)
        rows = 0
        for batch in batches(store, make.SITE, 5, tokens=name, check=True):
            slot = (token[batch.item] == batch.token[:, None]).argmax(axis=1)
            assert (batch.acts == found[batch.item, slot]).all()
            rows += len(batch)
        assert rows == found.shape[0] * found.shape[1]


def test_the_statistics(kept: tuple[str, Store]) -> None:
    kind, store = kept
    for name in ("cls", "patch"):
        stats = store.stats(make.SITE, name)
        value = store.items(range(9), make.SITE, name).astype(np.float64).reshape(-1, 4)
        assert stats.count == len(value)
        np.testing.assert_allclose(stats.mean, value.mean(axis=0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(stats.var, value.var(axis=0), rtol=1e-5)
        np.testing.assert_allclose(stats.absmax, np.abs(value).max(axis=0), rtol=1e-6)
        group = zarr.open_group(store.storage.zarr(), path=f"stats/{make.SITE}/{name}", mode="r")
        np.testing.assert_array_equal(np.asarray(group["mean"][:]), stats.mean)
        assert (stats.fvu is None) == (kind != "int8")
        if kind == "int8":
            assert stats.fvu is not None
            assert stats.saturated is not None
            assert 0 < stats.fvu < 2e-4
            assert not stats.saturated.any()


def test_written_again_the_bytes_are_the_same(kept: tuple[str, Store], tmp_path: Path) -> None:
    """Manifest, metadata, shards, scales and positions; compressed bytes belong to a library."""
    kind, store = kept
    if kind == "archive":
        again = convert(store, tmp_path / "again", codec="raw")
        assert again.manifest.dtype == "bfloat16"
        return
    writers = {
        "raw": lambda folder: make.write(folder, "float16"),
        "int8": lambda folder: make.write(folder, "int8"),
        "subsampled": make.subsampled,
    }
    again = writers[kind](tmp_path / "again")
    assert again.fingerprint == store.fingerprint
    for folder in ("acts", "position"):
        assert objects(again.url, folder) == objects(store.url, folder)
    for path in ("zarr.json", f"acts/{make.SITE}/patch/zarr.json"):
        assert Path(again.url, path).read_bytes() == Path(store.url, path).read_bytes()
