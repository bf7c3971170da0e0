"""Write one part: stripes from a reused buffer to shards, then the commit record.

Legend: S items of a part, T tokens, t tokens of a stripe, d channels, B items of a batch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Shaped

from actstore import codec, layout
from actstore.commit import (
    Commit,
    encode_sidecar,
    index_path,
    read_commit,
    record_path,
    sidecar_path,
)
from actstore.crc import combine, crc32c
from actstore.index import encode_index_rows
from actstore.manifest import ArraySpec, FormatError, Manifest
from actstore.moments import channel_moments
from actstore.quantise import Loss, quantise
from actstore.stats import ChannelStats
from actstore.storage import Storage, aligned_zeros
from actstore.subsample import chunk_path, sampled

FLOAT16_MAX = 65504.0


class PartBuffer:
    """Room for one part of every array, stripes in the order of the shard: [T/t, S, t, d]."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        dtype = layout.storage_dtype(manifest.dtype)
        self.stripes: dict[ArraySpec, np.ndarray] = {
            a: aligned_zeros(
                (a.n_stripes, manifest.items_per_part, a.stripe_tokens, a.channels), dtype
            )
            for a in manifest.arrays
        }
        self.losses: dict[ArraySpec, Loss] = {}
        """What quantising lost, of stores with scales; absent where it is not known."""
        if manifest.scales:
            self.losses = {a: Loss(a.channels) for a in manifest.arrays}
        self.positions: dict[str, np.ndarray] = {}
        """Positions [S, slot] by kind, where tokens are chosen; rows behind the items are free."""
        self.items = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory the buffer holds."""
        return sum(stripes.nbytes for stripes in self.stripes.values())

    def clear(self) -> None:
        """Forget the items; memory is kept."""
        self.items = 0
        for loss in self.losses.values():
            loss.clear()

    def append(self, values: Mapping[ArraySpec, Shaped[np.ndarray, "B T d"]]) -> None:
        """Add a batch: for every array its values [B, T, d], in float32 or as stored.

        Raises
        ------
        ValueError
            When a value is not finite or does not fit the stored dtype, or the part is full.
        """
        counts = {len(v) for v in values.values()}
        if len(counts) != 1 or values.keys() != self.stripes.keys():
            raise ValueError("a batch must hold every array of the store, with equal items")
        count = counts.pop()
        rows = self.take_rows(count)
        for array, v_BTd in values.items():
            if v_BTd.shape != (count, array.tokens, array.channels):
                raise ValueError(
                    f"{array.path}: expected values [{count}, {array.tokens}, {array.channels}], "
                    f"got {list(v_BTd.shape)}"
                )
            stored = self.cast(array, v_BTd)
            shape = (count, array.n_stripes, array.stripe_tokens, array.channels)
            self.stripes[array][:, rows] = stored.reshape(shape).swapaxes(0, 1)

    def take_rows(self, count: int) -> slice:
        """Claim the next `count` rows of every stripe; ValueError when the part is full."""
        if self.items + count > self.manifest.items_per_part:
            raise ValueError(
                f"a part holds {self.manifest.items_per_part} items, {self.items} are there and "
                f"{count} more came"
            )
        self.items += count
        return slice(self.items - count, self.items)

    def cast(self, array: ArraySpec, values: np.ndarray) -> np.ndarray:
        """Return values as they are stored; ValueError when they do not fit."""
        dtype = self.manifest.dtype
        target = layout.storage_dtype(dtype)
        if values.dtype == target:
            return values
        scale = self.manifest.scale(array)
        if values.dtype.kind != "f" or (dtype == "int8" and scale is None):
            raise ValueError(
                f"{array.path}: values of dtype {values.dtype} cannot be stored as {dtype}; "
                f"pass floating point values or {target}"
            )
        check_range(array, values, dtype)
        if scale is not None:
            stored, saturated, error = quantise(values, scale)
            self.losses[array].add(saturated, error)
            return stored
        if dtype == "bfloat16":
            return layout.to_bfloat16(values)
        return values.astype(target)


def check_range(array: ArraySpec, values: np.ndarray, dtype: str) -> None:
    """Refuse values that the stored dtype cannot hold.

    Raises
    ------
    ValueError
        Naming site, channel, value and what to do.
    """
    if not values.size:
        return
    limit = FLOAT16_MAX if dtype == "float16" else float(np.finfo(np.float32).max)
    high, low = float(values.max()), float(values.min())
    if -limit <= low and high <= limit:
        return
    flat = values.reshape(-1, array.channels)
    row, channel = np.argwhere(~(np.abs(flat) <= limit))[0]
    raise_range(array, int(channel), float(flat[row, channel]), dtype)


def raise_range(array: ArraySpec, channel: int, value: float, dtype: str) -> None:
    """Raise the error for a value out of the range of the stored dtype."""
    if np.isfinite(value):
        raise ValueError(
            f"site {array.site} ({array.kind}), channel {channel}: {value:g} does not fit {dtype} "
            f"(at most {FLOAT16_MAX:g}); harvest with --dtype bfloat16 or --dtype float32"
        )
    raise ValueError(
        f"site {array.site} ({array.kind}), channel {channel}: the model gave {value}; a store "
        "holds finite values only: check the weights and the input, or run the model in float32"
    )


def write_part(
    storage: Storage,
    manifest: Manifest,
    part: int,
    buffer: PartBuffer,
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    pool: Executor,
) -> Commit:
    """Write and commit one part; a part that is already committed stays as it is.

    Order on the medium: shards, sidecar and index rows, each durable; the record last. The
    objects go out side by side on `pool`, which also sums and checks values meanwhile.

    Raises
    ------
    ValueError
        When a value is not finite; nothing is committed then.
    FormatError
        When another run committed this part under another manifest.
    """
    arrays = list(buffer.stripes)
    for stripes in buffer.stripes.values():
        stripes[:, buffer.items :] = 0
    written = [pool.submit(_write_shard, storage, manifest, part, a, buffer) for a in arrays]
    summed = [pool.submit(_moments, manifest, a, buffer) for a in arrays]
    busy: list[Future[Any]] = [*written, *summed]
    wait(busy)  # the buffer is reused afterwards, whatever failed
    stats = dict(zip(arrays, (future.result() for future in summed), strict=True))
    shards = dict(zip(arrays, (future.result() for future in written), strict=True))
    objects = {
        layout.shard_path(array, part): {"bytes": shard.size, "crc32c": shard.crc}
        for array, shard in shards.items()
    }
    sums = {array: shard.sums for array, shard in shards.items()}
    small = {
        sidecar_path(part): encode_sidecar(stats, sums),
        index_path(part): encode_index_rows(rows),
        **_positions(manifest, part, buffer),
    }
    for future in [pool.submit(storage.replace, path, [data]) for path, data in small.items()]:
        future.result()
    for path, data in small.items():
        objects[path] = {"bytes": len(data), "crc32c": crc32c(data)}
    return commit_part(storage, manifest, part, buffer.items, objects)


def commit_part(
    storage: Storage,
    manifest: Manifest,
    part: int,
    items: int,
    objects: Mapping[str, Mapping[str, int]],
) -> Commit:
    """Create the record of a part whose objects are durable, or return the one that is there.

    Raises
    ------
    FormatError
        When another run committed this part under another manifest.
    """
    fingerprint = manifest.fingerprint
    commit = Commit(part=part, items=items, fingerprint=fingerprint, objects=objects)
    if storage.create(record_path(part), commit.encode()):
        return commit
    there = read_commit(storage, part)
    if there.fingerprint != fingerprint:
        raise FormatError(
            f"{storage.url}: part {part} was committed under another manifest "
            f"({there.fingerprint[:12]}, this run has {fingerprint[:12]})"
        )
    return there


def _positions(manifest: Manifest, part: int, buffer: PartBuffer) -> dict[str, bytes]:
    """Return the objects that say which positions each item keeps."""
    out = {}
    for kind in sampled(manifest):
        position = np.array(buffer.positions[kind], dtype="<i4")
        position[buffer.items :] = 0
        out[chunk_path(kind, part)] = position.tobytes()
    return out


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    """What the commit says about one shard."""

    sums: np.ndarray
    """CRC-32C of every stripe."""
    crc: int
    """CRC-32C of the shard."""
    size: int
    """Bytes of the shard."""


def _write_shard(
    storage: Storage, manifest: Manifest, part: int, array: ArraySpec, buffer: PartBuffer
) -> _Written:
    """Encode and write one shard; raw stripes go out as one buffer, without a copy."""
    stripes = buffer.stripes[array]
    pieces = [codec.encode(stripe, manifest.codec) for stripe in stripes]
    lengths = np.array([memoryview(piece).nbytes for piece in pieces], dtype=np.int64)
    spans = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    index = layout.encode_index(spans)
    body = [stripes] if manifest.codec == "raw" else pieces
    storage.replace(layout.shard_path(array, part), [*body, index])
    sums = [crc32c(piece) for piece in pieces]
    total = combine([*zip(sums, lengths.tolist(), strict=True), (crc32c(index), len(index))])
    size = int(lengths.sum()) + len(index)
    return _Written(sums=np.array(sums, dtype=np.uint32), crc=total, size=size)


def _moments(manifest: Manifest, array: ArraySpec, buffer: PartBuffer) -> ChannelStats:
    """Return the moments of the valid values, those of the part's items."""
    stripes = buffer.stripes[array].reshape(array.n_stripes, -1, array.channels)
    rows = buffer.items * array.stripe_tokens
    total = channel_moments(stripes, manifest.dtype, rows)
    if not np.isfinite(total.absmax).all():
        channel = int(np.isfinite(total.absmax).argmin())
        raise_range(array, channel, float(total.absmax[channel]), manifest.dtype)
    scale = manifest.scale(array)
    if scale is None:
        return total
    loss = buffer.losses.get(array)
    total = total.scaled(scale)
    if loss is None:
        return total
    return dataclasses.replace(total, saturated=loss.saturated.copy(), error=loss.error.copy())
