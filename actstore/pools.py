"""Fill pools from a store, one thread ahead of whoever empties them.

Memory is `buffers` pools, allocated once and reused: memory touched for the first time costs ten
times as much as memory that was used before.
"""

import concurrent.futures
import functools
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Shaped, UInt64

from actstore import codec, layout
from actstore.commit import read_sidecar
from actstore.crc import crc32c
from actstore.manifest import ArraySpec
from actstore.ranges import Request, damaged, open_ranges
from actstore.sampling import Order, Pool
from actstore.selection import Column, Selection, Stripe
from actstore.subsample import Relabel
from actstore.vectored import vectors

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
"""Makes the memory of a pool."""


def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return ordinary memory, not touched yet."""
    return np.empty(shape, dtype=dtype)


class Buffer:
    """Room for one pool: values [row, channel], sites side by side; item and token of each row.

    Rows lie in the order in which they are given out.
    """

    def __init__(self, selection: Selection, rows: int, make: Allocate) -> None:
        dtype = layout.storage_dtype(selection.store.manifest.dtype)
        self._make = make
        self.values: Shaped[np.ndarray, "row channel"] = make((rows, selection.width), dtype)
        self.item: Int64[np.ndarray, " row"] = make((rows,), np.dtype(np.int64))
        self.token: Int32[np.ndarray, " row"] = make((rows,), np.dtype(np.int32))
        self.address = self.values.ctypes.data
        self.rows = 0
        """Rows of the pool that is in it."""
        self.key: tuple[int, int] = (-1, -1)
        """Epoch and number of the pool that is in it."""
        self.place: Int64[np.ndarray, " row"] = np.zeros(0, dtype=np.int64)
        """Where each row of the pool, in the order of `Pool`, lies in `values`."""
        self.vectors: list[UInt64[np.ndarray, "row 2"]] = []
        """Address and bytes of `place` of every row, by site."""
        self.extra: Any = None
        """Whatever `after_fill` left, for example a copy on a device."""

    @property
    def lendable(self) -> bool:
        """Whether views of the values can be counted: their base is the array itself."""
        return self.values.base is None

    @property
    def lent(self) -> bool:
        """Whether somebody outside looks at the values."""
        # seen by the attribute and by the argument
        return self.lendable and sys.getrefcount(self.values) > 2

    def renew(self) -> None:
        """Leave the values to whoever looks at them, and take fresh memory."""
        self.values = self._make(self.values.shape, self.values.dtype)
        self.address = self.values.ctypes.data


class Target(NamedTuple):
    """What a request's bytes are."""

    stripe: Stripe
    first: int
    """First row of the stripe in the pool."""
    items: int
    """Items taken."""
    rows: Any
    """Which items of the stripe; None for the first ones."""
    direct: bool
    """Whether every cell of the bytes is a row, in the order of the rows."""


class Plan(NamedTuple):
    """What is known of a pool before it is read; it is read once, into one buffer."""

    key: tuple[int, int]
    """Epoch and number of the pool."""
    requests: list[Request]
    """What to read, by object and offset."""
    place: Int64[np.ndarray, " row"]
    """See `Buffer.place`."""
    scatter: list[UInt64[np.ndarray, "row 2"]]
    """`Buffer.vectors`, for a buffer at address 0."""
    item: Int64[np.ndarray, " row"]
    """Store position of every row, in the order in which they are given out."""
    token: Int32[np.ndarray, " row"]
    """Token number of every row."""


class Filler:
    """Turns pools into requests and requests into rows."""

    def __init__(self, selection: Selection, *, check: bool) -> None:
        self._selection, self._check = selection, check
        self._manifest = selection.store.manifest
        self._raw = self._manifest.codec == "raw"
        self._dtype = layout.storage_dtype(self._manifest.dtype)
        self._ranges = open_ranges(selection.store.storage)
        self._checksums = functools.lru_cache(1024)(self._read_checksums)
        self._relabel = Relabel(selection)
        self._widths = np.array([c.width for c in selection.columns], dtype=np.int64)
        self._tokens = np.concatenate([c.token for c in selection.columns])
        self._first_token = np.cumsum(self._widths) - self._widths
        self._starts = [s.start for s in selection.slices.values()]
        arrays = {s.array for c in selection.columns for s in c.stripes}
        self._spans = {a: layout.raw_spans(self._manifest, a).tolist() for a in arrays}
        self._found = functools.lru_cache(4096)(self._find_spans)
        self._sources = [[self._source(c, s) for s in c.stripes] for c in selection.columns]

    def close(self) -> None:
        """Give up files and threads."""
        self._ranges.close()

    def _requests(self, pool: Pool) -> list[Request]:
        """Return what has to be read for a pool, by object and offset."""
        selection, size = self._selection, self._manifest.items_per_part
        parts = selection.parts[pool.part].tolist()
        counts = selection.counts[pool.part].tolist()
        firsts = pool.offset.tolist()
        out = []
        for j, g in enumerate(pool.column.tolist()):
            part, count = parts[j], counts[j]
            rows = selection.rows(part)
            for stripe, array, offset, length, whole in self._sources[g]:
                span = count if rows is None else int(rows[-1]) + 1
                direct = rows is None and whole and self._raw and not self._check
                span = size if self._check else span
                if not self._raw:
                    offset, length = self._found(array, part)[stripe.index]
                    span = size
                out.append(
                    Request(
                        layout.shard_path(array, part),
                        part,
                        offset,
                        span * length // size,
                        Target(stripe, firsts[j], count, rows, direct),
                    )
                )
        out.sort(key=_place_on_disk)
        return out

    def _source(self, column: Column, stripe: Stripe) -> tuple[Stripe, ArraySpec, int, int, bool]:
        """Return a stripe with its place in the shard, and whether its bytes are the rows."""
        array = stripe.array
        offset, length = self._spans[array][stripe.index]
        whole = len(stripe.tokens) == column.width == array.stripe_tokens
        return stripe, array, offset, length, whole

    def plan(self, order: Order, epoch: int, index: int) -> "Plan":
        """Return all that can be said of a pool before there is memory for it."""
        pool = order.pool(index)
        n = pool.rows
        shuffled = order.permutation(index, n)
        place = np.empty(n, dtype=np.int64)
        place[shuffled] = np.arange(n, dtype=np.int64)
        size, stride = self._dtype.itemsize, self._selection.width * self._dtype.itemsize
        scatter = [
            vectors(s.start * size, place, stride, (s.stop - s.start) * size)
            for s in self._selection.slices.values()
        ]
        item, token = self._labels(pool, shuffled)
        return Plan((epoch, index), self._requests(pool), place, scatter, item, token)

    def fill(self, buffer: Buffer, plan: "Plan", upcoming: Sequence[Request] = ()) -> None:
        """Read a pool into a buffer; `upcoming` requests are probably those of the next one."""
        n = len(plan.place)
        buffer.key, buffer.rows, buffer.place = plan.key, n, plan.place
        buffer.item[:n], buffer.token[:n] = plan.item, plan.token
        buffer.vectors = plan.scatter
        for scatter in plan.scatter:
            scatter[:, 0] += np.uint64(buffer.address)
        self._ranges.read(
            plan.requests,
            functools.partial(self._place, buffer),
            functools.partial(self._done, buffer),
            upcoming,
        )

    def _labels(
        self, pool: Pool, order: Int64[np.ndarray, " row"]
    ) -> tuple[Int64[np.ndarray, " row"], Int32[np.ndarray, " row"]]:
        """Return item and token of every row, in the order in which they are given out."""
        selection, n = self._selection, pool.rows
        edges, lengths = pool.offset, np.diff(pool.offset)
        widths = self._widths[pool.column]
        start = selection.parts[pool.part] * self._manifest.items_per_part
        cell = np.arange(n, dtype=np.int64) - np.repeat(edges[:-1], lengths)
        if (widths == 1).all():
            item, slot = cell, np.zeros_like(cell)
        else:
            item, slot = np.divmod(cell, np.repeat(widths, lengths))
        if selection.filtered:
            for j, part in enumerate(selection.parts[pool.part].tolist()):
                chosen = selection.rows(part)
                if chosen is not None:
                    rows = slice(int(edges[j]), int(edges[j + 1]))
                    item[rows] = chosen[item[rows]]
        item += np.repeat(start, lengths)
        token = self._tokens[np.repeat(self._first_token[pool.column], lengths) + slot]
        if self._relabel.needed:
            self._relabel(pool, item, token)
        return item[order], token[order]

    def _place(self, buffer: Buffer, request: Request) -> UInt64[np.ndarray, "n 2"] | None:
        target: Target = request.tag
        if not target.direct:
            return None
        stripe = target.stripe
        last = target.first + target.items * stripe.width
        return buffer.vectors[stripe.site][target.first : last]

    def _done(self, buffer: Buffer, request: Request, view: memoryview) -> None:
        target: Target = request.tag
        stripe = target.stripe
        if self._check:
            expected = self._checksums(request.part)[stripe.array][stripe.index]
            if crc32c(view) != int(expected):
                raise damaged(self._selection.store.storage, request, stripe.index)
        t, d = stripe.array.stripe_tokens, stripe.array.channels
        if self._raw:
            values = np.frombuffer(view, dtype=self._dtype).reshape(-1, t, d)
        else:
            values = codec.decode(view, self._manifest, stripe.array, self._dtype)
        last = target.first + target.items * stripe.width
        place = buffer.place[target.first : last].reshape(-1, stripe.width)
        first = self._starts[stripe.site]
        out = _rows(buffer.values[:, first : first + d])
        cells = _rows(values)[slice(target.items) if target.rows is None else target.rows]
        if len(stripe.tokens) == t == stripe.width:  # all of them, in their order
            out[place] = cells
            return
        for token, slot in zip(stripe.tokens, stripe.slots, strict=True):
            out[place[:, slot]] = cells[:, token]

    def _find_spans(self, array: ArraySpec, part: int) -> list[list[int]]:
        """Return offset and length of the stripes of a compressed shard."""
        spans: list[list[int]] = self._selection.store.shard(
            array.site, array.kind, part
        ).spans.tolist()
        return spans

    def _read_checksums(self, part: int) -> dict[ArraySpec, np.ndarray]:
        store = self._selection.store
        sidecar = read_sidecar(store.storage, store.commit(part))
        return {a: sidecar.checksums(a) for a in self._manifest.arrays}


def _rows(values: Shaped[np.ndarray, "... channel"]) -> Shaped[np.ndarray, "..."]:
    """Return values with all channels of a token as one element: moved by one copy each."""
    return values.view(np.dtype((np.void, values.shape[-1] * values.itemsize)))[..., 0]


def _place_on_disk(request: Request) -> tuple[str, int]:
    return request.path, request.offset


class PoolThread:
    """Fills pools in the order of `loads`, at most `buffers` of them before one is given back."""

    def __init__(
        self,
        selection: Selection,
        loads: Iterator[tuple[Order, int, int]],
        *,
        buffers: int,
        rows: int,
        make: Allocate = allocate,
        check: bool = False,
        after_fill: Callable[[Buffer], None] | None = None,
    ) -> None:
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[Buffer | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        for _ in range(buffers):
            self._free.put(Buffer(selection, rows, make))
        filler = Filler(selection, check=check)
        arguments = (filler, loads, self._free, self._full, self._stop, after_fill)
        self._thread = threading.Thread(
            target=_run, args=arguments, name="actstore-reader", daemon=True
        )
        self._thread.start()

    def take(self) -> Buffer:
        """Return the next pool, waiting for it; raise what went wrong while reading it."""
        item = self._full.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def give_back(self, buffer: Buffer) -> None:
        """Let a buffer be filled again."""
        buffer.extra = None
        self._free.put(buffer)

    def close(self) -> None:
        """Stop the thread; it finishes the pool it is reading."""
        self._stop.set()
        self._free.put(None)
        self._thread.join()


def _run(
    filler: Filler,
    loads: Iterator[tuple[Order, int, int]],
    free: "queue.SimpleQueue[Buffer | None]",
    full: "queue.SimpleQueue[Buffer | BaseException]",
    stop: threading.Event,
    after_fill: Callable[[Buffer], None] | None,
) -> None:
    # pools are planned while others are read: sorting keys takes a tenth as long as reading
    planner = concurrent.futures.ThreadPoolExecutor(1, "actstore-plan")
    try:
        plans = (filler.plan(*load) for load in loads)
        now = next(plans, None)
        following = planner.submit(next, plans, None)
        while now is not None:
            later = planner.submit(next, plans, None)
            buffer = free.get()
            if buffer is None or stop.is_set():
                return
            soon = following.result() if following.done() else None  # the first one may not be
            filler.fill(buffer, now, soon.requests if soon else ())
            if after_fill is not None:
                after_fill(buffer)
            full.put(buffer)
            now, following = following.result(), later
    except BaseException as error:  # handed to the consumer, which raises it
        full.put(error)
    finally:
        planner.shutdown()
        filler.close()
