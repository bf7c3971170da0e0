"""What a complete store has beside its parts: an index, statistics as Zarr arrays, segments.

::

    index.parquet                 rows of all parts
    stats/<site>/<kind>/{count, mean, m2, absmax}        int8 with scales: saturated, error

All can be made again from the parts at any time; making them twice gives the same bytes. Of a
large store they are read instead of the parts, if their counts are those of the store.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actstore import layout
from actstore.index import OK, decode_index_rows, encode_index_rows
from actstore.manifest import MAX_OBJECT_BYTES, ArraySpec
from actstore.segments import seal_all
from actstore.stats import ChannelStats

if TYPE_CHECKING:
    from actstore.store import Store

INDEX = "index.parquet"

_AT_ONCE = 16
"""Objects written at a time."""


def write_compact(store: "Store") -> None:
    """Write `index.parquet`, `stats/` and missing segments from the committed parts."""
    seal_all(store)
    objects = {INDEX: encode_index_rows(store.merged_index())}
    for group in ["stats", *(f"stats/{site}" for site in store.sites)]:
        objects[f"{group}/zarr.json"] = _json(layout.group_metadata())
    for array in store.manifest.arrays:
        folder = f"stats/{array.site}/{array.kind}"
        objects[f"{folder}/zarr.json"] = _json(layout.group_metadata())
        moments = store.merged_stats(array)
        values = {
            "mean": moments.mean,
            "m2": moments.m2,
            "absmax": moments.absmax,
            "count": np.array(moments.count, dtype=np.int64),
        }
        if moments.saturated is not None and moments.error is not None:
            values |= {"saturated": moments.saturated, "error": moments.error}
        for name, value in values.items():
            names = ["channel"] if value.ndim else []
            meta = layout.plain_metadata(list(value.shape), value.dtype.name, names)
            chunk = "c.0" if value.ndim else "c"
            data = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).tobytes()
            objects[f"{folder}/{name}/{chunk}"] = data
            objects[f"{folder}/{name}/zarr.json"] = _json(meta)
    # Side by side: each waits for the medium, a disk's journal or a server, not for the processor.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda path: store.storage.replace(path, [objects[path]]), objects))


def read_stats(store: "Store", array: ArraySpec) -> ChannelStats | None:
    """Return the statistics of a complete store from `stats/`; None where they do not fit it."""
    folder, shape = f"stats/{array.site}/{array.kind}", (array.channels,)

    def read(name: str, dtype: str = "<f8") -> np.ndarray:
        data = store.storage.read(f"{folder}/{name}/c.0", limit=8 * array.channels)
        return np.frombuffer(data, dtype)

    try:
        count = int.from_bytes(store.storage.read(f"{folder}/count/c", limit=8), "little")
        moments = {name: read(name) for name in ("mean", "m2", "absmax")}
        if store.storage.size(f"{folder}/error/c.0") is not None:
            moments |= {"saturated": read("saturated", "<i8"), "error": read("error")}
    except (FileNotFoundError, ValueError):
        return None
    if count != store.n_items * array.tokens or any(m.shape != shape for m in moments.values()):
        return None
    return ChannelStats(count=count, **moments)


def read_index(store: "Store") -> pa.Table | None:
    """Return the rows of a complete store from `index.parquet`; None where they do not fit it."""
    try:
        data = store.storage.read(INDEX, limit=MAX_OBJECT_BYTES)
        rows = decode_index_rows(data, store.storage.uri(INDEX), store.manifest.items)
    except (FileNotFoundError, ValueError):
        return None
    valid = pc.sum(pc.equal(rows["status"], OK)).as_py()
    return rows if valid == store.n_items else None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
