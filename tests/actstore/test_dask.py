"""The dask mount: one chunk a part, valid items of committed parts, safe reductions."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import xarray
from readings import build, expected, uncommit

import actstore
from actstore.dask import labelled
from actstore.manifest import FormatError
from actstore.store import Store


def whole(store: Store, tokens: int = 3) -> np.ndarray:
    position = store.table()["position"].to_numpy()
    item = np.repeat(position, tokens)
    token = np.tile(np.arange(1, 1 + tokens), len(position))
    return expected(0, item, token, 4).reshape(len(position), tokens, 4)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("stripe_tokens", [1, 3])
def test_one_chunk_a_part(tmp_path: Path, dtype: str, stripe_tokens: int) -> None:
    build(tmp_path / "a", [5, 3, 5, 2], size=5, dtype=dtype, stripe_tokens=(stripe_tokens,))
    uncommit(tmp_path / "a", 2)
    store = actstore.open(tmp_path / "a")
    mounted = store.dask("s0", "patch")
    assert mounted.chunks == ((5, 3, 2), (3,), (4,))
    assert mounted.dtype == np.float32
    got = mounted.compute(scheduler="sync")
    assert got.dtype == np.float32
    assert np.allclose(got, whole(store), rtol=2**-8 if dtype == "bfloat16" else 0)
    assert len(mounted.__dask_graph__()) == 3


def test_float16_sums_do_not_overflow(tmp_path: Path) -> None:
    values = np.full((40, 8, 2), 20_000, np.float16)
    store = actstore.write_arrays(tmp_path / "a", {"s": {"patch": values}})
    mounted = store.dask("s", "patch")
    assert mounted.sum().compute(scheduler="sync") == 40 * 16 * 20_000
    assert mounted.mean(axis=(0, 1)).compute(scheduler="sync").tolist() == [20_000, 20_000]
    raw = actstore.dask.array(store, "s", "patch", dtype=None)
    assert raw.dtype == np.float16
    assert np.array_equal(raw.compute(scheduler="sync"), values)


def test_names_and_positions_for_xarray(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5, 3, 2], size=5)
    values = labelled(store, "s0", "patch")
    assert values.dims == ("item", "patch_token", "channel")
    assert values["item"].values.tolist() == store.table()["position"].to_pylist()
    assert np.array_equal(values.sel(item=6).values, whole(store)[6])
    plain = xarray.open_zarr(f"{store.url}/acts/s0", consolidated=False)
    assert plain["patch"].dims == ("item", "patch_token", "channel")
    assert np.array_equal(plain["patch"].values[6], whole(store)[6])


def test_chunks_travel(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5, 3], size=5)
    mounted = pickle.loads(pickle.dumps(store.dask("s0", "patch")))
    assert np.array_equal(mounted.compute(scheduler="threads"), whole(store))


def test_an_empty_mount(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5], size=5, commit=set())
    assert store.dask("s0", "patch").compute(scheduler="sync").shape == (0, 3, 4)


def test_damage_is_named(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5, 3], size=5)
    path = Path(store.shard("s0", "patch", 1).uri)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FormatError, match=r"part 1 is truncated"):
        store.dask("s0", "patch").compute(scheduler="sync")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"part 1 is committed"):
        store.dask("s0", "patch").compute(scheduler="sync")
