"""Read a store: shuffled batches, one pass in order, whole items.

    rows   acts [B, sum d] | item [B] | token [B]      sites side by side in the channels

`sampling` says what to read and how to cut it, `pools` reads it one thread ahead, and this
module gathers batches. Nothing here needs torch; `actstore.loader` gives tensors.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from actstore import codec, layout
from actstore.batching import Batch, Recycler, Run
from actstore.manifest import ArraySpec
from actstore.pools import Buffer
from actstore.quantise import dequantiser, to_float
from actstore.ranges import Request, open_ranges
from actstore.sampling import Epoch, Order, Sequential, streams_of
from actstore.selection import Selection, Split

if TYPE_CHECKING:
    from actstore.store import Store


_BLOCK = 256
"""Rows converted at a time."""


class NumpySink:
    """Batches as arrays, in the stored dtype or another."""

    def __init__(self, selection: Selection, dtype: Any) -> None:
        self._slices = selection.slices
        self._widen = dequantiser(selection)
        self._stored = selection.store.manifest.dtype
        self._lends = self._stored == np.dtype(dtype).name
        self._recycler = Recycler(selection.width, dtype)

    def begin(self, rows: int) -> None:
        """See `Sink.begin`."""
        self._acts = self._recycler.get(rows)
        self._item = np.empty(rows, dtype=np.int64)
        self._token = np.empty(rows, dtype=np.int32)

    def take(self, buffer: Buffer, start: int, stop: int, first: int) -> None:
        """See `Sink.take`."""
        last = first + stop - start
        values, out = buffer.values[start:stop], self._acts[first:last]
        if self._widen is not None:
            for at in range(0, len(values), _BLOCK):
                token = buffer.token[start + at : min(stop, start + at + _BLOCK)]
                out[at : at + _BLOCK] = self._widen(values[at : at + _BLOCK], token)
        elif self._stored == "bfloat16":
            for at in range(0, len(values), _BLOCK):
                out[at : at + _BLOCK] = layout.from_stored(values[at : at + _BLOCK], self._stored)
        else:
            out[:] = values
        self._item[first:last] = buffer.item[start:stop]
        self._token[first:last] = buffer.token[start:stop]

    def finish(self) -> Batch:
        """See `Sink.finish`."""
        batch = Batch(acts=self._acts, item=self._item, token=self._token, slices=self._slices)
        del self._acts, self._item, self._token
        return batch

    def lend(self, buffer: Buffer, start: int, stop: int) -> Batch | None:
        """See `Sink.lend`."""
        if not self._lends or not buffer.lendable:
            return None
        return Batch(
            acts=buffer.values[start:stop],
            item=buffer.item[start:stop].copy(),
            token=buffer.token[start:stop].copy(),
            slices=self._slices,
        )


def pool_batches(tokens: int) -> int:
    """Return how many batches a pool holds at least, for stripes of `tokens` tokens an item.

    A pool of R rows brings ``tokens`` rows of an item together, so the variance of a batch's mean
    over images is ``1 + (tokens - 1) B / R`` times that of independent rows; at least six
    batches for each further token keep it below 1.17.
    """
    return max(8, 6 * (tokens - 1))


def epochs_of(
    selection: Selection, batch_size: int, *, seed: int, streams: int
) -> Callable[[int], Order]:
    """Return the shuffled order of each epoch over a selection."""
    columns = np.array([column.width for column in selection.columns], dtype=np.int64)
    least = pool_batches(int(columns.max()))

    def order(epoch: int) -> Order:
        return Epoch(
            counts=selection.counts,
            columns=columns,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            streams=streams,
            pool_batches=least,
        )

    return order


def _output_dtype(store: "Store", dtype: Any) -> np.dtype[Any]:
    stored = store.manifest.dtype
    if dtype is None:
        return np.dtype(stored if stored in ("float16", "float32") else "float32")
    wanted: np.dtype[Any] = np.dtype(dtype)
    if wanted.kind != "f":
        raise ValueError(f"batches have a floating point dtype, not {wanted}; see `dtype=`")
    return wanted


def batches(
    store: "Store",
    sites: str | Sequence[str],
    batch_size: int,
    *,
    tokens: str | Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    items: Split | Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    epoch: int = 0,
    start: int = 0,
    streams: int = 1,
    rank: int = 0,
    world: int = 1,
    dtype: Any = None,
    check: bool = False,
) -> Iterator[Batch]:
    """Iterate over one epoch in shuffled order, every row once.

    Parameters
    ----------
    store
        The store; only parts that were committed when it was opened are read.
    sites
        Sites side by side in the channels: a name, names separated by commas, or a sequence.
    batch_size
        Rows of a global batch, shared by the ranks; the last one may be short.
    tokens
        Token kinds, ``"cls,patch"`` or a sequence; None takes every kind stored.
    positions
        Token numbers, in the site's full token order, to keep.
    items
        A `Split`, store positions, or a mask over store positions; None takes all.
    seed, epoch
        Key of the order.
    start
        Global batch of the epoch to begin with.
    streams, rank, world
        Canonical streams, and which share of them this process reads. The union of all ranks'
        batches at a step is the same for every `world` that divides `streams`.
    dtype
        Of the values; by default as stored, float32 for bfloat16 and int8.
    check
        Verify the checksum of every stripe.

    Yields
    ------
    Batch
        Arrays; their memory is reused once nothing refers to it.

    Raises
    ------
    KeyError, ValueError
        When what is asked for is not there, before anything is read.
    FormatError, FileNotFoundError
        When an object of a committed part is damaged or missing; the message names the part.
    """
    selection = Selection(store, sites, tokens=tokens, positions=positions, items=items)
    mine = streams_of(rank, world, streams)
    order = epochs_of(selection, batch_size, seed=seed, streams=streams)(epoch)
    if not 0 <= start <= order.batches:
        raise ValueError(f"start {start} must lie in 0..{order.batches}, the batches of an epoch")
    sink = NumpySink(selection, _output_dtype(store, dtype))
    run = Run(
        selection, lambda _: order, streams=mine, first=start, last=order.batches, check=check
    )
    return run.batches(sink)


def sequential(
    store: "Store",
    sites: str | Sequence[str],
    batch_size: int,
    *,
    tokens: str | Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    items: Split | Int[np.ndarray, " n"] | None = None,
    start: int = 0,
    dtype: Any = None,
    check: bool = False,
) -> Iterator[Batch]:
    """Iterate once over the rows as they lie in the store: by part, token, item.

    For evaluation: no order to mix, and the same rows in the same batches every time.
    Parameters, result and errors are those of `batches`.
    """
    selection = Selection(store, sites, tokens=tokens, positions=positions, items=items)
    columns = np.array([column.width for column in selection.columns], dtype=np.int64)
    order = Sequential(counts=selection.counts, columns=columns, batch_size=batch_size)
    if not 0 <= start <= order.batches:
        raise ValueError(f"start {start} must lie in 0..{order.batches}, the batches of a pass")
    run = Run(
        selection, lambda _: order, streams=range(1), first=start, last=order.batches, check=check
    )
    return run.batches(NumpySink(selection, _output_dtype(store, dtype)))


def items(
    store: "Store", positions: Any, site: str, kind: str, *, dtype: Any = None
) -> Float[np.ndarray, "item token channel"]:
    """Return whole items by store position, in the order asked for.

    Parameters
    ----------
    store
        The store.
    positions
        Store positions, as in column `position` of the index; one integer gives one item.
    site, kind
        Which array.
    dtype
        Of the values; by default as stored, float32 for bfloat16 and int8.

    Raises
    ------
    ValueError
        When a position is not in the store.
    """
    array = store.spec(site, kind)
    wanted = np.atleast_1d(np.asarray(positions))
    if not wanted.size:
        wanted = wanted.astype(np.int64)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
        raise ValueError(f"positions must be integers [n]; got {wanted.dtype} {wanted.shape}")
    size = store.manifest.items_per_part
    part, row = np.divmod(wanted.astype(np.int64), size)
    known = (wanted >= 0) & (part < store.manifest.n_parts)
    known[known] = row[known] < store.part_items[part[known]]
    if not known.all():
        raise ValueError(
            f"{store.url} holds no item at position {wanted[~known][0]}: it was skipped, or its "
            "part is not committed; take positions from column `position` of `store.table()`"
        )
    if store.manifest.codec == "raw":
        out = _cells(store, array, part, row)
    else:
        out = _unpacked(store, array, part, row)
    values = out.reshape(len(wanted), array.tokens, array.channels)
    if dtype is None and store.manifest.dtype in ("float16", "float32"):
        return values
    target = _output_dtype(store, dtype)
    return to_float(values, store.manifest, array).astype(target, copy=False)


def _cells(store: "Store", array: ArraySpec, part: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Read rows of stripes one by one; return [item, stripe, t, channel]."""
    stored = layout.storage_dtype(store.manifest.dtype)
    shape = (len(part), array.n_stripes, array.stripe_tokens, array.channels)
    out = np.empty(shape, dtype=stored)
    flat = out.reshape(-1).view(np.uint8)
    cell = array.stripe_tokens * array.channels * stored.itemsize
    spans = layout.raw_spans(store.manifest, array)[:, 0].tolist()
    requests = []
    for i in np.lexsort((row, part)).tolist():
        path = layout.shard_path(array, int(part[i]))
        for stripe, offset in enumerate(spans):
            requests.append(
                Request(
                    path=path,
                    part=int(part[i]),
                    offset=offset + int(row[i]) * cell,
                    length=cell,
                    tag=(i * array.n_stripes + stripe) * cell,
                )
            )
    view = flat.data
    ranges = open_ranges(store.storage, large=False)
    try:
        ranges.read(
            requests,
            lambda request: view[request.tag : request.tag + cell],
            functools.partial(_copy, flat),
            (),
        )
    finally:
        ranges.close()
    return out


def _unpacked(store: "Store", array: ArraySpec, part: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Read rows of compressed stripes, each stripe once; return [item, stripe, t, channel]."""
    stored = layout.storage_dtype(store.manifest.dtype)
    shape = (len(part), array.n_stripes, array.stripe_tokens, array.channels)
    out = np.empty(shape, dtype=stored)
    requests = []
    for number in np.unique(part).tolist():
        shard = store.shard(array.site, array.kind, number)
        requests += [
            Request(shard.path, number, offset, length, stripe)
            for stripe, (offset, length) in enumerate(shard.spans.tolist())
        ]

    def done(request: Request, view: memoryview) -> None:
        mine = np.flatnonzero(part == request.part)
        values = codec.decode(view, store.manifest, array, stored)
        out[mine, request.tag] = values[row[mine]]

    ranges = open_ranges(store.storage)
    try:
        ranges.read(requests, lambda request: None, done, ())
    finally:
        ranges.close()
    return out


def _copy(flat: np.ndarray, request: Request, view: memoryview) -> None:
    flat[request.tag : request.tag + len(view)] = np.frombuffer(view, dtype=np.uint8)
