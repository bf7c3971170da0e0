"""Write a store from arrays in memory: for tests, benchmarks and activations made elsewhere."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from actstore.index import OK
from actstore.manifest import DTYPES, ITEM_SIZE, ArraySpec, Manifest, encode_scale
from actstore.moments import channel_moments
from actstore.order import keyed_permutation
from actstore.pipeline import PartPipeline
from actstore.plan import LOCAL_STRIPE, part_items
from actstore.quantise import CALIBRATION, calibrated
from actstore.segments import seal_all
from actstore.storage import open_storage
from actstore.store import Store, create_store
from actstore.writer import PartBuffer, check_range

_FILL_BYTES = 128 << 10
"""Bytes moved into a buffer at a time; they stay in the cache."""

_DIGEST_ITEMS = 256
"""Items read at a time to sum them."""


def write_arrays(
    url: str | os.PathLike[str],
    arrays: Mapping[str, Mapping[str, Shaped[np.ndarray, "item token channel"]]],
    *,
    dtype: str | None = None,
    items_per_part: int | None = None,
    table: pa.Table | Mapping[str, Any] | None = None,
    seed: int | None = 0,
    storage_options: Mapping[str, Any] | None = None,
) -> Store:
    """Write a complete store from arrays ``{site: {kind: values [item, token, channel]}}``.

    Items are permuted by `seed`, as a harvest does; column `source` of the index holds their
    row in the arrays. With ``seed=None`` they keep their order.

    Parameters
    ----------
    url
        Where the store goes; nothing but an equal, unfinished store may be there.
    arrays
        Values by site and token kind, kinds in the order of the tokens.
    dtype
        Activation dtype on disk; that of the arrays by default (float64 becomes float32).
        Floating point values become int8 by scales from the first items; integers stay.
    items_per_part
        S; by default stripes of about 400 kB and at least 16 parts.
    table
        Columns of the index by item: key, label, label_name and any others.
    seed
        Key of the permutation of the items.
    storage_options
        Options of the medium.

    Raises
    ------
    ValueError
        When the arrays do not fit together, or a value does not fit the dtype.
    """
    values = {(s, k): np.asarray(v) for s, kinds in arrays.items() for k, v in kinds.items()}
    if not values:
        raise ValueError("write_arrays needs at least one array {site: {kind: values}}")
    for (site, kind), value in values.items():
        if value.ndim != 3 or not value.size:
            raise ValueError(
                f"{site}/{kind}: expected [item, token, channel], got {list(value.shape)}"
            )
    counts = {f"{s}/{k}": len(v) for (s, k), v in values.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"every array needs the same number of items; got {counts}")
    items = next(iter(counts.values()))
    dtype = dtype or _common_dtype(list(values.values()))
    widest = max(v.shape[2] for v in values.values())
    size = items_per_part
    if size is None:
        row = widest * ITEM_SIZE.get(dtype, 4)
        size = part_items(items, max(1, round(LOCAL_STRIPE / row)))
    specs: dict[ArraySpec, np.ndarray] = {}
    sites: dict[str, Any] = {}
    for site, kinds in arrays.items():
        first = 0
        for kind in kinds:
            value = values[site, kind]
            spec = ArraySpec(
                site=site, kind=kind, tokens=value.shape[1], channels=value.shape[2], first=first
            )
            specs[spec] = value
            first += value.shape[1]
        sites[site] = {"grid": _grid({kind: values[site, kind].shape[1] for kind in kinds})}
    order: dict[str, Any] = {"kind": "source"}
    source = np.arange(items)
    if seed is not None:
        order = {"kind": "keyed", "seed": seed, "source_items": items}
        source = keyed_permutation(source, items, seed)
    manifest = Manifest(
        items=items,
        items_per_part=size,
        arrays=tuple(specs),
        dtype=dtype,
        sites=sites,
        order=order,
        data={"kind": "arrays", "items": items, "fingerprint": _digest(specs)},
    )
    columns = _columns(table, items)
    if dtype == "int8" and any(value.dtype.kind == "f" for value in specs.values()):
        if any(value.dtype.kind != "f" for value in specs.values()):
            raise ValueError("int8 takes floating point arrays or int8 ones, not both in a store")
        begin = source[:CALIBRATION]
        scales = {a.path: encode_scale(_scale(a, value[begin])) for a, value in specs.items()}
        manifest = dataclasses.replace(manifest, scales=scales)
    storage = open_storage(url, storage_options)
    create_store(storage, manifest)
    done = Store(storage, manifest)
    with PartPipeline(storage, manifest) as pipeline:
        for part in done.missing_parts:
            start = part * size
            chosen = source[start : start + manifest.planned(part)]
            buffer = pipeline.next_buffer()
            _fill(buffer, specs, chosen)
            rows = columns.take(chosen)
            fixed = {
                "position": np.arange(start, start + len(chosen)),
                "source": chosen,
                "status": [OK] * len(chosen),
            }
            for name, column in fixed.items():
                rows = rows.append_column(name, pa.array(column))
            pipeline.submit(part, buffer, rows)
    done.refresh()
    seal_all(done)
    return done


def _scale(array: ArraySpec, values: np.ndarray) -> np.ndarray:
    """Return the scales of an array from its first items."""
    rows = values.astype(np.float32).reshape(-1, array.channels)
    check_range(array, rows, "float32")
    return calibrated(channel_moments(rows[None], "float32"))


def _fill(buffer: PartBuffer, specs: Mapping[ArraySpec, np.ndarray], chosen: np.ndarray) -> None:
    """Move items into a buffer: large ones straight from the array, small ones gathered first."""
    item_bytes = sum(value[0].nbytes for value in specs.values())
    step = max(1, _FILL_BYTES // item_bytes)
    for start in range(0, len(chosen), step):
        some: np.ndarray | slice = chosen[start : start + step]
        if step == 1:
            first = int(chosen[start])
            some = slice(first, first + 1)
        buffer.append({spec: value[some] for spec, value in specs.items()})


def _digest(specs: Mapping[ArraySpec, np.ndarray]) -> str:
    """Return the CRC-32C of the values of every array, so that others are told apart."""
    sums = []
    for value in specs.values():
        crc = 0
        for start in range(0, len(value), _DIGEST_ITEMS):
            block = np.ascontiguousarray(value[start : start + _DIGEST_ITEMS]).view(np.uint8)
            crc = int(google_crc32c.extend(crc, block.reshape(-1)))
        sums.append(f"{crc:08x}")
    return "-".join(sums)


def _common_dtype(values: list[np.ndarray]) -> str:
    dtypes = {v.dtype.name for v in values}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    if dtype == "float64":
        dtype = "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} cannot be stored; allowed: {', '.join(DTYPES)}")
    return dtype


def _grid(counts: Mapping[str, int]) -> dict[str, Any] | None:
    """Return the token grid of a site as JSON; None for kinds a grid does not know."""
    if not set(counts) <= {"cls", "register", "patch"}:
        return None
    patches = counts.get("patch", 0)
    side = math.isqrt(patches)
    patch = [side, side] if side * side == patches else [1, patches]
    order = [*counts, *(k for k in ("cls", "register", "patch") if k not in counts)]
    grid = {"cls": counts.get("cls", 0), "register": counts.get("register", 0)}
    return {**grid, "patch": patch, "order": order}


def _columns(table: pa.Table | Mapping[str, Any] | None, items: int) -> pa.Table:
    given = table if isinstance(table, pa.Table) else pa.table(dict(table or {}))
    if given.num_columns and given.num_rows != items:
        raise ValueError(f"the table has {given.num_rows} rows for {items} items")
    columns = {name: given[name] for name in given.column_names}
    columns.setdefault("key", pa.array([str(i) for i in range(items)]))
    columns.setdefault("label", pa.nulls(items, pa.int64()))
    columns.setdefault("label_name", pa.nulls(items, pa.string()))
    return pa.table(columns)
