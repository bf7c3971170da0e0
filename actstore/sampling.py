"""Order of a shuffled epoch, as pure arithmetic: nothing here reads, waits or remembers.

A part holds ``counts[p]`` items; a column is one stripe position, ``columns[g]`` tokens wide.
Every column g visits the parts in its own order, a rotation of one keyed permutation pi::

    sigma_g(w) = pi[(w + shift_g) mod P]                w = 0 .. P-1
    window w   = {stripe (sigma_g(w), g) for every g}   every token position once
    pool k     = windows [k P / K, (k + 1) P / K)       K pools, each permuted as a whole
    epoch      = pool 0 permuted | pool 1 permuted | ...    rows 0 .. R-1
    stream c   = rows [c R / C, (c + 1) R / C) of the epoch
    batch b    = rows [b m, (b + 1) m) of every stream, joined in stream order, m = batch / C

The shifts are distinct as long as there are parts, so a window takes its stripes from as many
different parts as it can. Because all columns rotate one permutation, the rows before a window
follow from one cumulative sum over the parts, and a batch number becomes (pool, offset) without
a walk through the epoch, however short single parts are. Every row belongs to one batch of one
stream, which is "exactly once"; the union over ranks depends on C alone, not on the world size.

Memory and time to build grow with the number of parts, not with items or tokens.

Letters: P parts, G columns, K pools, R rows, C streams, J stripes of a pool.
"""

import bisect
import dataclasses

import numpy as np
from jaxtyping import Int64

_PARTS, _SHIFTS, _ROWS, _ITEMS = range(4)
_KNOWN = 4096
"""First rows of pools remembered."""


def _philox(seed: int, epoch: int, index: int, purpose: int) -> np.random.Philox:
    """Return the generator of one purpose; `seed` is taken modulo 2**64."""
    return np.random.Philox(
        key=np.array([seed & (2**64 - 1), epoch], dtype=np.uint64),
        counter=np.array([0, 0, index, purpose], dtype=np.uint64),
    )


def permutation(
    n: int, *, seed: int, epoch: int, purpose: int, index: int = 0
) -> Int64[np.ndarray, " n"]:
    """Return a permutation of ``range(n)``, a pure function of its arguments.

    Philox 4x64-10 with key (seed, epoch) and counter (0, 0, index, purpose) gives a 64-bit key
    for every element; its low bits are replaced by the element and the keys are sorted. Raw
    bits are used because NumPy keeps them stable between versions, and its shuffles not.
    """
    if n < 2:
        return np.zeros(n, dtype=np.int64)
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    keys: np.ndarray = _philox(seed, epoch, index, purpose).random_raw(n)
    keys &= ~mask
    keys |= np.arange(n, dtype=np.uint64)
    # one radix pass over the top bits, and what is then nearly in order merges in one more: the
    # result of a plain sort in a fifth of its time
    keys = keys[np.argsort((keys >> np.uint64(48)).astype(np.uint16), kind="stable")]
    keys.sort(kind="stable")
    keys &= mask
    return keys.view(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Stripes that are in memory together, in the order of their rows before the permutation."""

    index: int
    """Number of the pool in its epoch."""
    part: Int64[np.ndarray, " J"]
    """Part of every stripe, as an index into `counts`."""
    column: Int64[np.ndarray, " J"]
    """Column of every stripe."""
    offset: Int64[np.ndarray, " J+1"]
    """First row of every stripe in the pool; the last entry is the number of rows."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.offset[-1])


@dataclasses.dataclass(frozen=True)
class Cut:
    """A run of rows of a permuted pool."""

    pool: int
    """Number of the pool."""
    start: int
    """First row, counted in the permuted pool."""
    stop: int
    """Row after the last one."""


class Order:
    """What an epoch's order answers; `Epoch` shuffles, `Sequential` does not.

    Parameters
    ----------
    counts
        Items to read of every part; parts with none have to be left out.
    columns
        Tokens to read of every stripe position.
    batch_size
        Rows of a global batch, over all streams; a multiple of `streams`.
    streams
        Number of canonical streams C; world sizes that divide it see the same batches.

    Raises
    ------
    ValueError
        When `streams` does not divide `batch_size`, or a number is not positive.
    """

    pools: int
    """Number of pools K."""

    def __init__(
        self,
        *,
        counts: Int64[np.ndarray, " P"],
        columns: Int64[np.ndarray, " G"],
        batch_size: int,
        streams: int = 1,
    ) -> None:
        if batch_size < 1 or streams < 1 or batch_size % streams:
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of streams ({streams})"
            )
        if not counts.size or not columns.size or (counts < 1).any() or (columns < 1).any():
            raise ValueError("an epoch needs parts and columns, each with at least one row")
        self.counts, self.columns = counts, columns
        self.streams = streams
        self.micro_batch = batch_size // streams
        self.rows = int(counts.sum()) * int(columns.sum())
        """Rows of the epoch, over all streams."""
        self.batches = -(-self.rows // (streams * self.micro_batch))
        """Global batches of the epoch; only the last one may be short."""
        self._known: dict[int, int] = {}

    def first_row(self, pool: int) -> int:
        """Return how many rows of the epoch precede a pool."""
        row = self._known.get(pool)
        if row is None:
            if len(self._known) > _KNOWN:
                self._known = {}
            row = self._known[pool] = self._first_row(pool)
        return row

    def _first_row(self, pool: int) -> int:
        raise NotImplementedError

    def _stripes(self, pool: int) -> tuple[Int64[np.ndarray, " J"], Int64[np.ndarray, " J"]]:
        """Return part and column of every stripe of a pool."""
        raise NotImplementedError

    def permutation(self, pool: int, rows: int) -> Int64[np.ndarray, " rows"]:
        """Return the order in which the `rows` rows of a pool are given out."""
        raise NotImplementedError

    @property
    def max_pool_rows(self) -> int:
        """Rows a pool has at most, whatever the seed and the epoch."""
        raise NotImplementedError

    def pool(self, index: int) -> Pool:
        """Return the stripes of a pool, sorted by part and column for the sake of the disk."""
        part, column = self._stripes(index)
        offset = np.zeros(len(part) + 1, dtype=np.int64)
        np.cumsum(self.counts[part] * self.columns[column], out=offset[1:])
        return Pool(index=index, part=part, column=column, offset=offset)

    def cut(self, batch: int, stream: int) -> list[Cut]:
        """Return where the rows of global batch `batch` of one stream lie; empty past its end."""
        end = (stream + 1) * self.rows // self.streams
        start = stream * self.rows // self.streams + batch * self.micro_batch
        stop = min(start + self.micro_batch, end)
        if start >= stop:
            return []
        pool = bisect.bisect_right(range(self.pools), start, key=self.first_row) - 1
        cuts = []
        first = self.first_row(pool)
        while start < stop:
            last = self.first_row(pool + 1)
            cuts.append(Cut(pool, start - first, min(stop, last) - first))
            start, first, pool = last, last, pool + 1
        return cuts


class Epoch(Order):
    """One epoch's shuffled order; parameters of `Order` and these.

    Parameters
    ----------
    seed, epoch
        Key of the order.
    pool_batches
        A pool holds at least so many batches of its stream, on average over the pools.
    """

    def __init__(
        self,
        *,
        counts: Int64[np.ndarray, " P"],
        columns: Int64[np.ndarray, " G"],
        batch_size: int,
        seed: int,
        epoch: int,
        streams: int = 1,
        pool_batches: int = 8,
    ) -> None:
        super().__init__(counts=counts, columns=columns, batch_size=batch_size, streams=streams)
        if epoch < 0 or pool_batches < 1:
            raise ValueError(f"epoch {epoch} must be >= 0 and pool_batches {pool_batches} >= 1")
        self.seed, self.epoch = seed, epoch
        n_parts, n_columns = len(counts), len(columns)
        windows = -(-pool_batches * self.micro_batch * n_parts // self.rows)
        self.pools = max(1, n_parts // windows)
        self._order = permutation(n_parts, seed=seed, epoch=epoch, purpose=_PARTS)
        self._shift = self._shifts(n_parts, n_columns)
        self._before = np.zeros(n_parts + 1, dtype=np.int64)
        np.cumsum(counts[self._order], out=self._before[1:])

    def _shifts(self, n_parts: int, n_columns: int) -> Int64[np.ndarray, " G"]:
        """Return a rotation for every column, each value as often as any other or once more."""
        turns = -(-n_columns // n_parts)
        if turns > 1:
            drawn = np.concatenate([self._permute(n_parts, _SHIFTS, i) for i in range(turns)])
            drawn = drawn[:n_columns]
        else:  # one rotation from each of G slices of the parts: distinct, without P draws
            edges = np.arange(n_columns + 1, dtype=np.int64) * n_parts // n_columns
            raw = _philox(self.seed, self.epoch, 0, _SHIFTS).random_raw(n_columns)
            drawn = edges[:-1] + (raw % np.diff(edges).astype(np.uint64)).astype(np.int64)
        mixed: np.ndarray = drawn[self._permute(n_columns, _SHIFTS, turns)]
        return mixed

    def _permute(self, n: int, purpose: int, index: int) -> Int64[np.ndarray, " n"]:
        return permutation(n, seed=self.seed, epoch=self.epoch, purpose=purpose, index=index)

    def first_window(self, pool: int) -> int:
        """Return the first window of `pool`."""
        return pool * len(self.counts) // self.pools

    def _first_row(self, pool: int) -> int:
        n_parts = len(self.counts)
        window = self.first_window(pool) + self._shift
        wraps = window >= n_parts
        before = self._before[window - n_parts * wraps] + self._before[-1] * wraps
        return int(((before - self._before[self._shift]) * self.columns).sum())

    def _stripes(self, pool: int) -> tuple[Int64[np.ndarray, " J"], Int64[np.ndarray, " J"]]:
        first, last = self.first_window(pool), self.first_window(pool + 1)
        n_columns = len(self.columns)
        window = np.arange(first, last, dtype=np.int64)[:, None] + self._shift
        part = self._order[window % len(self.counts)]
        key = (part * n_columns + np.arange(n_columns, dtype=np.int64)).ravel()
        key.sort()
        return np.divmod(key, n_columns)

    def permutation(self, pool: int, rows: int) -> Int64[np.ndarray, " rows"]:
        """Return the order in which the `rows` rows of a pool are given out."""
        return self._permute(rows, _ROWS, pool)

    @property
    def max_pool_rows(self) -> int:
        """See `Order.max_pool_rows`."""
        windows = -(-len(self.counts) // self.pools)
        largest = np.partition(self.counts, len(self.counts) - windows)[-windows:]
        return int(largest.sum()) * int(self.columns.sum())


class Sequential(Order):
    """Rows as they lie in the store: part by part, column by column, item by item.

    A pool is a run of columns of one part.
    """

    def __init__(
        self,
        *,
        counts: Int64[np.ndarray, " P"],
        columns: Int64[np.ndarray, " G"],
        batch_size: int,
        pool_batches: int = 8,
    ) -> None:
        super().__init__(counts=counts, columns=columns, batch_size=batch_size)
        n_parts, n_columns = len(counts), len(columns)
        wanted = -(-pool_batches * batch_size * n_parts * n_columns // self.rows)
        self._runs = max(1, n_columns // wanted)
        self.pools = n_parts * self._runs
        self._items = np.concatenate([[0], np.cumsum(counts)])
        self._tokens = np.concatenate([[0], np.cumsum(columns)])

    def _edges(self, run: int) -> tuple[int, int]:
        n = len(self.columns)
        return run * n // self._runs, (run + 1) * n // self._runs

    def _first_row(self, pool: int) -> int:
        part, run = divmod(pool, self._runs)
        whole = int(self._items[part]) * int(self._tokens[-1])
        if not run:
            return whole
        return whole + int(self.counts[part]) * int(self._tokens[self._edges(run)[0]])

    def _stripes(self, pool: int) -> tuple[Int64[np.ndarray, " J"], Int64[np.ndarray, " J"]]:
        part, run = divmod(pool, self._runs)
        column = np.arange(*self._edges(run), dtype=np.int64)
        return np.full_like(column, part), column

    def permutation(self, pool: int, rows: int) -> Int64[np.ndarray, " rows"]:
        """Return the rows as they are."""
        return np.arange(rows, dtype=np.int64)

    @property
    def max_pool_rows(self) -> int:
        """See `Order.max_pool_rows`."""
        runs = [self._edges(run) for run in range(self._runs)]
        widest = max(int(self._tokens[b] - self._tokens[a]) for a, b in runs)
        return int(self.counts.max()) * widest


def streams_of(rank: int, world: int, streams: int) -> range:
    """Return the canonical streams that `rank` of `world` reads.

    Raises
    ------
    ValueError
        When `world` does not divide `streams`, or `rank` is not below `world`.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be in 0..world-1, world is {world}")
    if streams % world:
        fit = ", ".join(str(n) for n in range(1, streams + 1) if streams % n == 0)
        raise ValueError(
            f"{streams} streams cannot be shared by {world} ranks, only by {fit}: the world "
            f"size must divide streams; start the run with streams a multiple of every world "
            f"size it may get"
        )
    each = streams // world
    return range(rank * each, (rank + 1) * each)


def held_out(
    part: int, items: int, *, start: int, fraction: float, seed: int
) -> Int64[np.ndarray, " held"]:
    """Return the rows of a part that a split keyed by `seed` holds out, ascending.

    Of the `items` items of the part, whose first store position is `start`,
    ``floor(fraction (start + items)) - floor(fraction start)`` are held out: parts share the
    fraction evenly, and each depends on nothing but itself.
    """
    count = int(fraction * (start + items)) - int(fraction * start)
    order = permutation(items, seed=seed, epoch=0, purpose=_ITEMS, index=part)
    return np.sort(order[:count])
