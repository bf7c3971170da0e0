"""Cut what the pools hold into batches: the loop between the reading thread and the user.

The rows of a pool lie in the order in which they are given out, so a batch is a run of them, and
where the values need no conversion it is *lent*: a view of the pool, no byte copied. A pool goes
back to the reading thread when nobody looks at it any more. A user who goes on looking (a kept
slice pins a whole pool) is seen when its memory is missed: that pool is left to him, the reader
takes fresh memory, and from then on batches are copies, which pin nothing but themselves.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from actstore.pools import Allocate, Buffer, PoolThread, allocate
from actstore.sampling import Cut, Order
from actstore.selection import Selection

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of a store; arrays from `actstore.reader`, tensors from `actstore.loader`."""

    acts: Any
    """Activations [B, sum d]."""
    item: Any
    """Store position of every row's item, int64 [B]; see column `position` of the index."""
    token: Any
    """Token number in the site's full token order, int32 [B]."""
    slices: dict[str, slice]
    """Channels of each site in `acts`."""

    def __len__(self) -> int:
        return len(self.acts)

    def site(self, name: str) -> Any:
        """Return the activations of one site, [B, d], a view."""
        return self.acts[:, self.slices[name]]


class Sink(Protocol):
    """Where the rows of a batch go."""

    def begin(self, rows: int) -> None:
        """Start a batch of so many rows."""

    def take(self, buffer: Buffer, start: int, stop: int, first: int) -> None:
        """Copy rows ``start..stop`` of a pool to the batch, from row `first` on."""

    def finish(self) -> Batch:
        """Return the batch."""

    def lend(self, buffer: Buffer, start: int, stop: int) -> Batch | None:
        """Return rows ``start..stop`` of a pool as a batch that shares its memory, or None."""


class Recycler:
    """Gives out arrays and takes them back as soon as nobody looks at them any more.

    Memory touched for the first time costs ten times as much, so a batch lives in memory of an
    earlier one, once all arrays and tensors that share it are gone.
    """

    def __init__(self, width: int, dtype: Any, limit: int = 4) -> None:
        self._width, self._dtype, self._limit = width, dtype, limit
        self._arrays: list[np.ndarray] = []

    def get(self, rows: int) -> Shaped[np.ndarray, "rows width"]:
        """Return an array with undefined content."""
        for array in self._arrays:
            # seen by the list, the loop and the argument: by nobody outside
            if len(array) >= rows and sys.getrefcount(array) <= 3:
                return array[:rows]
        array = np.empty((rows, self._width), dtype=self._dtype)
        if len(self._arrays) >= self._limit:
            self._arrays.pop(0)
        self._arrays.append(array)
        return array[:rows]


class Run:
    """Batches of some streams of consecutive epochs, from any batch on.

    Parameters
    ----------
    selection
        What to read.
    order_of
        Order of each epoch; all have the same number of batches.
    streams
        Canonical streams of this rank.
    first, last
        Global batch numbers, over all epochs; `last` is exclusive, None goes on for ever.
    per_epoch
        Batches taken of an epoch; all of them by default.
    check
        Verify checksums.
    make
        Makes the memory of the pools.
    after_fill
        Called by the reading thread with every filled pool.
    """

    def __init__(
        self,
        selection: Selection,
        order_of: Callable[[int], Order],
        *,
        streams: range,
        first: int,
        last: int | None,
        per_epoch: int | None = None,
        check: bool = False,
        make: Allocate = allocate,
        after_fill: Callable[[Buffer], None] | None = None,
    ) -> None:
        self.selection, self.streams = selection, streams
        # the thread plans up to three pools ahead, which may be epochs
        self._order_of = functools.lru_cache(4)(order_of)
        self._first, self._last = first, last
        order = self._order_of(0)
        self._batches = per_epoch or order.batches
        self._check, self._make, self._after_fill = check, make, after_fill
        self.pool_rows = order.max_pool_rows
        """Rows a buffer has room for."""
        self.buffers = 2 * len(streams)
        """Pools in memory."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pools, what the reader holds besides single batches."""
        return self.buffers * self.pool_rows * (self.selection.row_bytes + 12)

    def _steps(self) -> Iterator[tuple[Order, int, int]]:
        """Yield order, epoch and batch within the epoch."""
        number = self._first
        while self._last is None or number < self._last:
            epoch, batch = divmod(number, self._batches)
            yield self._order_of(epoch), epoch, batch
            number += 1

    def _loads(self) -> Iterator[tuple[Order, int, int]]:
        """Yield the pools in the order in which `batches` needs them."""
        held: dict[int, tuple[int, int]] = {}
        for order, epoch, batch in self._steps():
            for stream in self.streams:
                for cut in order.cut(batch, stream):
                    if held.get(stream) != (epoch, cut.pool):
                        held[stream] = (epoch, cut.pool)
                        yield order, epoch, cut.pool

    def batches(self, sink: Sink) -> Generator[Batch, None, None]:
        """Yield the batches; closing the iterator stops the reading thread."""
        store = self.selection.store
        if not store.is_complete:
            logger.warning(
                "%s is incomplete: reading the %d committed of %d parts",
                store.url,
                int((store.part_items >= 0).sum()),
                store.manifest.n_parts,
            )
        thread = PoolThread(
            self.selection,
            self._loads(),
            buffers=self.buffers,
            rows=self.pool_rows,
            check=self._check,
            make=self._make,
            after_fill=self._after_fill,
        )
        hands = _Hands(thread, self.buffers)
        try:
            for order, epoch, batch in self._steps():
                cuts = [
                    (stream, cut) for stream in self.streams for cut in order.cut(batch, stream)
                ]
                yield self._cut(sink, hands, epoch, cuts)
        finally:
            thread.close()

    def _cut(self, sink: Sink, hands: "_Hands", epoch: int, cuts: list[tuple[int, Cut]]) -> Batch:
        """Return the batch that some cuts make, each of the pool its stream is at."""
        if len(cuts) == 1:
            stream, cut = cuts[0]
            buffer = hands.pool(stream, (epoch, cut.pool))
            # not the last ones of a pool: who looks at them delays the reading thread
            ends = buffer.rows - cut.stop < cut.stop - cut.start
            lent = sink.lend(buffer, cut.start, cut.stop) if hands.lending and not ends else None
            if lent is not None:
                return lent
        sink.begin(sum(cut.stop - cut.start for _, cut in cuts))
        at = 0
        for stream, cut in cuts:
            buffer = hands.pool(stream, (epoch, cut.pool))
            sink.take(buffer, cut.start, cut.stop, at)
            at += cut.stop - cut.start
            if cut.stop == buffer.rows:
                hands.drop(stream)
        return sink.finish()


class _Hands:
    """The pools that batches are cut from, until the reading thread gets them back."""

    def __init__(self, thread: PoolThread, buffers: int) -> None:
        self._thread, self._buffers = thread, buffers
        self._held: dict[int, Buffer] = {}
        self._dropped: list[Buffer] = []
        self.lending = True
        """Whether batches may share the memory of pools."""

    def pool(self, stream: int, key: tuple[int, int]) -> Buffer:
        """Return the pool a stream is at, the next one of the thread where `key` is not held."""
        self._settle()
        buffer = self._held.get(stream)
        if buffer is not None and buffer.key != key:
            self.drop(stream)
            buffer = None
        if buffer is None:
            if len(self._held) + len(self._dropped) == self._buffers:
                # nothing is left to read into, and the user keeps what he was lent
                self.lending = False
                self._dropped[0].renew()
                self._settle()
            buffer = self._held[stream] = self._thread.take()
        return buffer

    def drop(self, stream: int) -> None:
        """Have done with the pool of a stream; it is given back once nobody looks at it."""
        self._dropped.append(self._held.pop(stream))
        self._settle()

    def _settle(self) -> None:
        for buffer in [b for b in self._dropped if not b.lent]:
            self._dropped.remove(buffer)
            self._thread.give_back(buffer)
