"""What a complete store has beside its parts: an index, statistics as Zarr arrays, segments.

::

    index.parquet                 rows of all parts
    stats/<site>/<kind>/{count, mean, m2, absmax}        int8 with scales: saturated, error

All can be made again from the parts at any time; making them twice gives the same bytes.
"""

import json
from typing import TYPE_CHECKING

import numpy as np

from actstore import layout
from actstore.index import encode_index_rows
from actstore.segments import seal_all

if TYPE_CHECKING:
    from actstore.store import Store

INDEX = "index.parquet"


def write_compact(store: "Store") -> None:
    """Write `index.parquet`, `stats/` and missing segments from the committed parts."""
    storage = store.storage
    seal_all(store)
    storage.replace(INDEX, [encode_index_rows(store.index())])
    groups = ["stats", *(f"stats/{site}" for site in store.sites)]
    for group in groups:
        storage.replace(f"{group}/zarr.json", [_json(layout.group_metadata())])
    for array in store.manifest.arrays:
        folder = f"stats/{array.site}/{array.kind}"
        storage.replace(f"{folder}/zarr.json", [_json(layout.group_metadata())])
        moments = store.stats(array.site, array.kind)
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
            storage.replace(f"{folder}/{name}/{chunk}", [data])
            storage.replace(f"{folder}/{name}/zarr.json", [_json(meta)])


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
