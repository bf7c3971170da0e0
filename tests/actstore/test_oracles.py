"""Other Zarr v3 readers see the values that our own reader gives."""

from pathlib import Path

import numpy as np
import pytest
from readings import build

from actstore.reader import batches
from actstore.store import Store

COUNTS, SIZE, TOKENS, WIDTH = [5, 5, 3], 5, 6, 4


@pytest.fixture(params=[("float16", 1), ("float32", 1), ("float16", 3)], ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    dtype, stripe = request.param
    return build(
        tmp_path / "a", COUNTS, size=SIZE, tokens=TOKENS, dtype=dtype, stripe_tokens=(stripe,)
    )


def ours(store: Store) -> np.ndarray:
    """Return the patches [item, token, channel] put together from shuffled batches."""
    out = np.zeros((sum(COUNTS), TOKENS, WIDTH), dtype=store.manifest.dtype)
    for b in batches(store, "s0", 7, tokens="patch"):
        out[b.item, b.token - 1] = b.acts
    return out


def test_zarr_python(store: Store) -> None:
    array = store.array("s0", "patch")
    assert array.dtype == ours(store).dtype
    assert np.array_equal(np.asarray(array[:]), ours(store))


def test_tensorstore(store: Store) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    path = str(Path(store.url) / store.spec("s0", "patch").path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    array = tensorstore.open(spec, open=True, read=True).result()
    assert tuple(array.domain.labels) == ("item", "patch_token", "channel")
    assert np.array_equal(array.read().result(), ours(store))


def test_zarrs(store: Store) -> None:
    pytest.importorskip("zarrs")
    import zarr

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(Path(store.url) / store.spec("s0", "patch").path, mode="r")
        assert np.array_equal(np.asarray(array[:]), ours(store))


def test_xarray(store: Store) -> None:
    import xarray

    site = xarray.open_zarr(f"{store.url}/acts/s0", consolidated=False)
    assert np.array_equal(site["patch"].values, ours(store))
    assert site.sizes == {
        "item": sum(COUNTS),
        "cls_token": 1,
        "patch_token": TOKENS,
        "channel": WIDTH,
    }


def test_items_and_dask(store: Store) -> None:
    assert np.array_equal(store.items(range(sum(COUNTS)), "s0", "patch"), ours(store))
    assert np.array_equal(store.dask("s0", "patch").compute(scheduler="sync"), ours(store))
