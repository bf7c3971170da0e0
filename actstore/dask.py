"""Mount an array of a store in dask: one chunk a part, valid items of committed parts only.

Rows follow `store.table()`. The plain Zarr array has a row for every planned item, skipped ones
included; ``xarray.open_zarr(f"{url}/acts/{site}", consolidated=False)`` opens that one, all kinds
of a site as one Dataset with dimensions item, <kind>_token and channel.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from actstore import codec, layout
from actstore.manifest import ArraySpec
from actstore.quantise import to_float
from actstore.ranges import Request, missing, truncated

if TYPE_CHECKING:
    import dask.array
    import xarray

    from actstore.storage import Storage
    from actstore.store import Store


def array(store: "Store", site: str, kind: str, *, dtype: Any = "float32") -> "dask.array.Array":
    """Return a lazy array [readable item, token, channel], one chunk a part.

    Values are float32 by default, so that reductions accumulate in float32 or wider: sums of
    float16 overflow at 65,504. A chunk holds S x T x d values; a reduction needs about one a
    thread.

    Parameters
    ----------
    store
        The store; parts committed when it was opened.
    site, kind
        Which array.
    dtype
        Of the values; None keeps the stored one (bits, for bfloat16).
    """
    import dask.array as da
    from dask.base import tokenize

    spec = store.spec(site, kind)
    parts = np.flatnonzero(store.part_items > 0).tolist()
    counts = [int(store.part_items[p]) for p in parts]
    stored = layout.storage_dtype(store.manifest.dtype)
    out = stored if dtype is None else np.dtype(dtype)
    meta = np.empty((0, 0, 0), dtype=out)
    if not parts:
        empty: da.Array = da.zeros((0, spec.tokens, spec.channels), dtype=out)
        return empty
    token = tokenize(store.fingerprint, store.url, spec.path, parts, counts, str(out))
    name = f"acts-{site}-{kind}-{token}"
    loader = _Loader(store, spec, None if dtype is None else out)
    graph = {
        (name, i, 0, 0): (
            loader,
            part,
            count,
            store.commit(part).objects[layout.shard_path(spec, part)]["bytes"],
        )
        for i, (part, count) in enumerate(zip(parts, counts, strict=True))
    }
    chunks = (tuple(counts), (spec.tokens,), (spec.channels,))
    mounted: da.Array = da.Array(graph, name, chunks=chunks, meta=meta)  # type: ignore[no-untyped-call]
    return mounted


def labelled(store: "Store", site: str, kind: str, *, dtype: Any = "float32") -> "xarray.DataArray":
    """Return `array` with dimension names, and store positions as the coordinate of the items."""
    import xarray

    size = store.manifest.items_per_part
    counts = store.part_items.clip(min=0)
    position = np.concatenate(
        [np.arange(p * size, p * size + n) for p, n in enumerate(counts.tolist())] or [np.arange(0)]
    )
    return xarray.DataArray(
        array(store, site, kind, dtype=dtype),
        dims=("item", f"{kind}_token", "channel"),
        coords={"item": position},
        name=site,
    )


class _Loader:
    """Reads one part; small enough to travel with every task."""

    def __init__(self, store: "Store", spec: ArraySpec, dtype: np.dtype[Any] | None) -> None:
        self._storage: Storage = store.storage
        self._spec, self._dtype = spec, dtype
        self._size = store.manifest.items_per_part
        self._stored = store.manifest.dtype
        self._manifest = store.manifest

    def __call__(
        self, part: int, items: int, size: int
    ) -> Shaped[np.ndarray, "item token channel"]:
        """Return the valid items of a part, whose shard has `size` bytes."""
        spec, stored = self._spec, layout.storage_dtype(self._stored)
        path = layout.shard_path(spec, part)
        shape = (spec.n_stripes, self._size, spec.stripe_tokens, spec.channels)
        raw = self._manifest.codec == "raw"
        length = int(np.prod(shape)) * stored.itemsize if raw else size
        request = Request(path=path, part=part, offset=0, length=length, tag=None)
        try:
            data = self._storage.read_range(path, 0, length)
        except FileNotFoundError as error:
            raise missing(self._storage, request) from error
        if len(data) != length:
            raise truncated(self._storage, request, len(data))
        if raw:
            values = np.frombuffer(data, dtype=stored).reshape(shape)[:, :items]
        else:
            spans = layout.decode_index(bytes(data[-layout.index_bytes(spec) :]), spec, length)
            values = np.stack(
                [
                    codec.decode(data[a : a + n], self._manifest, spec, stored)[:items]
                    for a, n in spans.tolist()
                ]
            )
        out_shape = (items, spec.tokens, spec.channels)
        rows = values.swapaxes(0, 1).reshape(out_shape)
        if self._dtype is None:
            return rows
        return to_float(rows, self._manifest, spec).astype(self._dtype, copy=False)
