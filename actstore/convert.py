"""Copy a store: to another place, with fewer sites or tokens, another dtype or other parts.

Two ways, chosen by what changes. If parts, stripes and dtype stay, shards are copied as they
are and the copy is what a harvest of the chosen sites would have written. Otherwise values are
packed anew, a part at a time; such a store says in its manifest what it was converted from.
Either way every source byte is compared with its checksum, memory is bounded by two parts, and
a conversion that was killed goes on.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from actstore import layout
from actstore.codec import decode, profile
from actstore.commit import encode_sidecar, index_path, read_sidecar, sidecar_path
from actstore.crc import crc32c
from actstore.index import OK
from actstore.manifest import ArraySpec, FormatError, Manifest, encode_scale
from actstore.pipeline import PartPipeline
from actstore.plan import choose_layout
from actstore.quantise import exact, to_float
from actstore.storage import Storage, open_storage
from actstore.store import Store, check_same, create_store, read_manifest
from actstore.subsample import chunk_path, read_positions, sampled
from actstore.writer import PartBuffer, commit_part


def convert(
    store: Store,
    out: str | os.PathLike[str],
    *,
    sites: str | Sequence[str] | None = None,
    tokens: str | Sequence[str] | None = None,
    dtype: str | None = None,
    codec: str | None = None,
    items_per_part: int | None = None,
    reshard: bool = False,
    memory: int = 4 << 30,
    storage_options: Mapping[str, Any] | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> Store:
    """Write a copy of a complete store.

    Parameters
    ----------
    store
        The source.
    out
        Where the copy goes.
    sites
        Sites or patterns to keep; all by default.
    tokens
        Token kinds to keep; all by default.
    dtype
        Activation dtype of the copy; that of the source by default.
    codec
        Codec profile of the copy: ``raw``, ``archive``, or ``int8``, the same as that dtype; that
        of the source by default. Scales of int8 are such that no value of the source saturates.
    items_per_part
        Items of a part of the copy; those of the source by default.
    reshard
        Choose parts and stripes anew for where the copy goes.
    memory
        Bytes allowed for part buffers when values are packed anew.
    storage_options
        Options of the storage of the copy.
    on_part
        Called with (parts done, parts in all).

    Raises
    ------
    ValueError
        When the source lacks parts, nothing is left to keep, a value does not fit, or another
        store is at `out`.
    FormatError
        When a source byte differs from its checksum.
    """
    from vitmodels.spec import expand_sites

    if not store.is_complete:
        raise ValueError(
            f"{store.url} lacks {len(store.missing_parts)} of {store.manifest.n_parts} parts; "
            "finish its harvest first"
        )
    names = list(store.sites) if sites is None else expand_sites(sites, store.sites)
    kinds = tokens.split(",") if isinstance(tokens, str) else tokens
    kept = [
        a
        for a in store.manifest.arrays
        if a.site in names and (kinds is None or a.kind in kinds or a.kind == "item")
    ]
    if not kept:
        present = sorted({a.kind for a in store.manifest.arrays})
        raise ValueError(f"nothing is left: {store.url} has tokens of kind {', '.join(present)}")
    if codec is not None:
        codec, dtype = profile(codec, dtype or (None if codec == "int8" else store.manifest.dtype))
    if items_per_part is not None and items_per_part < 1:
        raise ValueError(f"items_per_part must be at least 1, not {items_per_part}")
    storage = open_storage(out, storage_options)
    same_parts = not reshard and items_per_part in (None, store.manifest.items_per_part)
    same_values = dtype in (None, store.manifest.dtype) and codec in (None, store.manifest.codec)
    if same_parts and same_values:
        manifest = _subset(store.manifest, kept)
        create_store(storage, manifest)
        _copy(store, storage, manifest, on_part)
    else:
        wanted = items_per_part or (None if reshard else store.manifest.items_per_part)
        manifest = _anew(store, kept, dtype or store.manifest.dtype, wanted, memory, storage)
        manifest = dataclasses.replace(
            manifest, codec=codec or store.manifest.codec, scales=_scales(store, manifest)
        )
        check_same(storage, manifest)
        create_store(storage, manifest)
        _pack(store, storage, manifest, on_part)
    done = Store(storage, manifest)
    done.compact()
    return done


def _subset(manifest: Manifest, kept: Sequence[ArraySpec]) -> Manifest:
    names, paths = {a.site for a in kept}, {a.path for a in kept}
    sites = {name: info for name, info in manifest.sites.items() if name in names}
    scales = {path: scale for path, scale in manifest.scales.items() if path in paths}
    return dataclasses.replace(manifest, arrays=tuple(kept), sites=sites, scales=scales)


def _scales(store: Store, manifest: Manifest) -> dict[str, str]:
    """Return the scales of a copy: those of the source, or made from its statistics."""
    if manifest.dtype != "int8":
        return {}
    if store.manifest.dtype == "int8":
        return dict(manifest.scales)
    return {a.path: encode_scale(exact(store.stats(a.site, a.kind))) for a in manifest.arrays}


def _anew(
    store: Store,
    kept: Sequence[ArraySpec],
    dtype: str,
    items_per_part: int | None,
    memory: int,
    storage: Storage,
) -> Manifest:
    """Return the manifest of a copy that is packed anew: valid items only, new parts."""
    old = store.manifest
    arrays, size = list(kept), items_per_part
    if size is None:
        there = read_manifest(storage)
        size, arrays = choose_layout(
            [dataclasses.replace(a, stripe_tokens=1) for a in kept],
            items=store.n_items,
            dtype=dtype,
            budget=memory,
            remote="://" in storage.url,
        )
        if there is not None and there.items == store.n_items:
            size, arrays = there.items_per_part, list(there.arrays)
    order = {"kind": "converted", "of": store.fingerprint, "was": dict(old.order)}
    return dataclasses.replace(
        _subset(old, kept),
        items=store.n_items,
        items_per_part=size,
        arrays=tuple(arrays),
        dtype=dtype,
        order=order,
        scales=_subset(old, kept).scales if dtype == "int8" else {},
    )


def _copy(
    store: Store,
    storage: Storage,
    manifest: Manifest,
    on_part: Callable[[int, int], None] | None,
) -> None:
    """Copy shards and index rows as they are, part by part."""
    done = Store(storage, manifest)
    for count, part in enumerate(done.missing_parts):
        commit = store.commit(part)
        sidecar = read_sidecar(store.storage, commit)
        paths = [layout.shard_path(array, part) for array in manifest.arrays]
        paths += [chunk_path(kind, part) for kind in sampled(manifest)]
        objects = {}
        for path in [*paths, index_path(part)]:
            data = store.storage.read(path)
            expected = commit.objects[path]
            if len(data) != expected["bytes"] or crc32c(data) != expected["crc32c"]:
                raise _damaged(store, part, path)
            storage.replace(path, [data])
            objects[path] = expected
        small = encode_sidecar(
            {a: sidecar.stats(a) for a in manifest.arrays},
            {a: sidecar.checksums(a) for a in manifest.arrays},
        )
        storage.replace(sidecar_path(part), [small])
        objects[sidecar_path(part)] = {"bytes": len(small), "crc32c": crc32c(small)}
        commit_part(storage, manifest, part, commit.items, objects)
        if on_part is not None:
            on_part(count + 1, len(done.missing_parts))


def _pack(
    store: Store,
    storage: Storage,
    manifest: Manifest,
    on_part: Callable[[int, int], None] | None,
) -> None:
    """Fill the parts of the copy with the valid items of the source, in order."""
    starts = np.concatenate([[0], np.cumsum(store.part_items)])
    index = store.index()
    valid = np.array([status == OK for status in index["status"].to_pylist()], dtype=bool)
    # A skipped item goes to the part of the valid item before it.
    ordinal = np.maximum(np.cumsum(valid) - 1, 0)
    missing = Store(storage, manifest).missing_parts
    with PartPipeline(storage, manifest) as pipeline:
        for count, part in enumerate(missing):
            first = part * manifest.items_per_part
            last = first + manifest.planned(part)
            buffer = pipeline.next_buffer()
            buffer.take_rows(last - first)
            if store.manifest.dtype == "int8":
                _keep_losses(store, buffer, part)
            for kind in sampled(manifest):
                buffer.positions[kind] = _positions(store, kind, manifest, first, last, starts)
            for array in manifest.arrays:
                for rows, token, values in _stripes(store, array, starts, first, last):
                    where = slice(rows.start - first, rows.stop - first)
                    _place(buffer, array, where, token, values, store.manifest)
            chosen = np.flatnonzero((ordinal >= first) & (ordinal < last))
            pipeline.submit(part, buffer, _renumbered(index.take(chosen), first))
            if on_part is not None:
                on_part(count + 1, len(missing))


def _keep_losses(store: Store, buffer: PartBuffer, part: int) -> None:
    """Take over what quantising lost, if parts are those of the source; forget it otherwise.

    Integers are copied as they are: nothing is lost here, and what was lost before is known by
    part of the source.
    """
    old, size = store.manifest, buffer.manifest.items_per_part
    if size != old.items_per_part or store.n_items != old.items:
        buffer.losses.clear()
    sidecar = read_sidecar(store.storage, store.commit(part)) if buffer.losses else None
    for array in list(buffer.losses):
        moments = sidecar.stats(array) if sidecar else None
        if moments is None or moments.saturated is None or moments.error is None:
            del buffer.losses[array]
        else:
            buffer.losses[array].clear()
            buffer.losses[array].add(moments.saturated, moments.error)


def _positions(
    store: Store, kind: str, manifest: Manifest, first: int, last: int, starts: np.ndarray
) -> np.ndarray:
    """Return which positions the valid items first .. last - 1 of the source keep, [S, slot]."""
    valid = np.arange(first, last)
    part = np.searchsorted(starts, valid, side="right") - 1
    out = np.zeros((manifest.items_per_part, sampled(manifest)[kind].tokens), np.int32)
    for number in np.unique(part).tolist():
        mine = np.flatnonzero(part == number)
        known = read_positions(store, kind, number)
        out[mine] = known[valid[mine] - starts[number]]
    return out


def _stripes(
    store: Store, array: ArraySpec, starts: np.ndarray, first: int, last: int
) -> Iterator[tuple[slice, int, np.ndarray]]:
    """Yield (valid rows, first token, values [row, t, d]) of the valid items first .. last - 1."""
    part = int(np.searchsorted(starts, first, side="right")) - 1
    while part < len(starts) - 1 and starts[part] < last:
        begin, end = int(starts[part]), int(starts[part + 1])
        rows = slice(max(first, begin), min(last, end))
        if rows.start < rows.stop:
            shard = store.shard(array.site, array.kind, part)
            sums = read_sidecar(store.storage, store.commit(part)).checksums(shard.array)
            dtype = layout.storage_dtype(store.manifest.dtype)
            manifest = store.manifest
            for number, (offset, length) in enumerate(shard.spans.tolist()):
                data = store.storage.read_range(shard.path, offset, length)
                if crc32c(data) != sums[number]:
                    raise _damaged(store, part, shard.path)
                values = decode(data, manifest, shard.array, dtype)
                token = number * shard.stripe_shape[1]
                yield rows, token, values[rows.start - begin : rows.stop - begin]
        part += 1


def _place(
    buffer: PartBuffer,
    array: ArraySpec,
    rows: slice,
    token: int,
    values: np.ndarray,
    source: Manifest,
) -> None:
    """Cast values [row, t, d] that start at `token` and put them into the stripes."""
    if source.dtype != buffer.manifest.dtype:
        values = buffer.cast(array, to_float(values, source, array))
    for k in range(values.shape[1]):
        stripe, inside = divmod(token + k, array.stripe_tokens)
        buffer.stripes[array][stripe, rows, inside] = values[:, k]


def _renumbered(rows: pa.Table, first: int) -> pa.Table:
    """Return index rows with the positions of the copy."""
    position, numbers = first, []
    for status in rows["status"].to_pylist():
        numbers.append(position if status == OK else None)
        position += status == OK
    column = rows.column_names.index("position")
    return rows.set_column(column, "position", pa.array(numbers, pa.int64()))


def _damaged(store: Store, part: int, path: str) -> FormatError:
    return FormatError(
        f"part {part}, {path} differs from its checksum: actstore repair {store.url} --parts {part}"
    )
