"""The order of an epoch: exactly once, disjoint, resumable, elastic, well mixed."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.reader import pool_batches
from actstore.sampling import Epoch, held_out, permutation, streams_of

GOLDEN_PERMUTATION = [4, 2, 0, 6, 1, 5, 7, 3]
GOLDEN_BATCH = [(1, 1, 3), (0, 1, 1), (0, 0, 1), (0, 1, 0)]


def rows_of(epoch: Epoch, batch: int, streams: range) -> list[tuple[int, int, int]]:
    """Return (part, column, row of the stripe) of every row of a batch, by definition."""
    out = []
    for stream in streams:
        for cut in epoch.cut(batch, stream):
            pool = epoch.pool(cut.pool)
            order = epoch.permutation(cut.pool, pool.rows)[cut.start : cut.stop]
            assert len(order) == cut.stop - cut.start
            stripe = np.searchsorted(pool.offset, order, side="right") - 1
            row = order - pool.offset[stripe]
            out += list(zip(pool.part[stripe], pool.column[stripe], row, strict=True))
    return [(int(a), int(b), int(c)) for a, b, c in out]


@st.composite
def epochs(draw: st.DrawFn) -> Epoch:
    size = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(1, size), min_size=1, max_size=12))
    columns = draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
    streams = draw(st.sampled_from([1, 2, 3, 4, 6]))
    return Epoch(
        counts=np.array(counts),
        columns=np.array(columns),
        batch_size=streams * draw(st.integers(1, 25)),
        seed=draw(st.integers(0, 2**64 - 1)),
        epoch=draw(st.integers(0, 5)),
        streams=streams,
        pool_batches=draw(st.integers(1, 8)),
    )


@settings(deadline=None, max_examples=100)
@given(epochs())
def test_every_row_once_ranks_disjoint_union_elastic(epoch: Epoch) -> None:
    due = {
        (p, g, r)
        for p, n in enumerate(epoch.counts.tolist())
        for g, width in enumerate(epoch.columns.tolist())
        for r in range(n * width)
    }
    worlds = [w for w in (1, 2, 3, 4, 6) if epoch.streams % w == 0]
    seen: list[tuple[int, int, int]] = []
    sizes = []
    for batch in range(epoch.batches):
        whole = rows_of(epoch, batch, range(epoch.streams))
        sizes.append(len(whole))
        for world in worlds:
            ranks = [
                rows_of(epoch, batch, streams_of(r, world, epoch.streams)) for r in range(world)
            ]
            assert list(itertools.chain(*ranks)) == whole  # disjoint, complete, in the same order
        seen += whole
    assert len(seen) == len(due) == epoch.rows
    assert set(seen) == due
    assert all(size == epoch.micro_batch * epoch.streams for size in sizes[:-1])
    assert all(sizes)
    assert rows_of(epoch, epoch.batches, range(epoch.streams)) == []


@settings(deadline=None, max_examples=100)
@given(epochs())
def test_windows_hold_every_column_once_and_pools_tile_the_epoch(epoch: Epoch) -> None:
    assert epoch.first_row(0) == 0
    assert epoch.first_row(epoch.pools) == epoch.rows
    stripes = []
    for k in range(epoch.pools):
        pool = epoch.pool(k)
        windows = epoch.first_window(k + 1) - epoch.first_window(k)
        assert windows >= 1
        assert windows * epoch.counts.max() * epoch.columns.sum() >= epoch.pool(k).rows
        assert np.bincount(pool.column).tolist() == [windows] * len(epoch.columns)
        assert pool.rows == epoch.first_row(k + 1) - epoch.first_row(k) <= epoch.max_pool_rows
        stripes += list(zip(pool.part.tolist(), pool.column.tolist(), strict=True))
    assert len(stripes) == len(set(stripes)) == len(epoch.counts) * len(epoch.columns)


def test_a_pool_holds_eight_batches() -> None:
    counts, columns = np.full(100, 50), np.ones(1, dtype=int)
    epoch = Epoch(counts=counts, columns=columns, batch_size=100, seed=0, epoch=0)
    assert epoch.pools == 6
    assert all(epoch.pool(k).rows >= 800 for k in range(epoch.pools))
    whole = Epoch(counts=counts, columns=columns, batch_size=1000, seed=0, epoch=0)
    assert (whole.pools, whole.max_pool_rows) == (1, 5000)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int, int]]:
        e = Epoch(
            counts=np.full(6, 5), columns=np.ones(3, int), batch_size=9, seed=seed, epoch=epoch
        )
        return list(itertools.chain(*(rows_of(e, b, range(1)) for b in range(e.batches))))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_the_order_is_the_one_of_format_1() -> None:
    """A changed order would silently break the resuming of runs: these numbers are fixed."""
    assert permutation(8, seed=1, epoch=2, purpose=0).tolist() == GOLDEN_PERMUTATION
    epoch = Epoch(counts=np.array([3, 2]), columns=np.array([1, 2]), batch_size=4, seed=7, epoch=1)
    assert rows_of(epoch, 0, range(1)) == GOLDEN_BATCH


@given(st.integers(0, 400), st.integers(0, 2**64 - 1), st.integers(0, 9))
def test_permutation_is_one(n: int, seed: int, index: int) -> None:
    order = permutation(n, seed=seed, epoch=0, purpose=2, index=index)
    assert sorted(order.tolist()) == list(range(n))


def test_permutation_is_uniform() -> None:
    """Every element lands everywhere equally often: chi-square with 49 degrees of freedom."""
    seen = np.zeros((8, 8))
    draws = 4000
    for i in range(draws):
        seen[np.arange(8), permutation(8, seed=3, epoch=0, purpose=2, index=i)] += 1
    chi2 = ((seen - draws / 8) ** 2 / (draws / 8)).sum()
    assert chi2 < 90


def vif(
    parts: int, items: int, tokens: int, batch: int, epochs: int, stripe: int = 1
) -> tuple[float, float, float]:
    """Return VIF of the item, VIF of the token and distinct items over those of i.i.d. rows.

    Items are permuted before the harvest, so that an item's value is drawn here at random.
    """
    value = np.random.default_rng(0).permutation(parts * items)
    item_means, token_means, distinct, rows = [], [], [], 0
    for e in range(epochs):
        epoch = Epoch(
            counts=np.full(parts, items),
            columns=np.full(tokens // stripe, stripe),
            batch_size=batch,
            seed=5,
            epoch=e,
            pool_batches=pool_batches(stripe),
        )
        orders = {}
        for b in range(epoch.rows // batch):
            found_items, found_tokens = [], []
            for cut in epoch.cut(b, 0):
                if cut.pool not in orders:
                    pool = epoch.pool(cut.pool)
                    orders = {cut.pool: (pool, epoch.permutation(cut.pool, pool.rows))}
                pool, order = orders[cut.pool]
                chosen = order[cut.start : cut.stop]
                which = np.searchsorted(pool.offset, chosen, side="right") - 1
                row, slot = np.divmod(chosen - pool.offset[which], stripe)
                found_items.append(pool.part[which] * items + row)
                found_tokens.append(pool.column[which] * stripe + slot)
            item, token = np.concatenate(found_items), np.concatenate(found_tokens)
            rows = len(item)
            item_means.append(value[item].mean())
            token_means.append(token.mean())
            distinct.append(len(np.unique(item)))
    n = parts * items
    item_vif = np.var(item_means) / ((n**2 - 1) / 12 / rows)
    token_vif = np.var(token_means) / ((tokens**2 - 1) / 12 / rows)
    expected = n * (1 - (1 - 1 / n) ** rows)
    return float(item_vif), float(token_vif), float(np.mean(distinct) / expected)


@pytest.mark.parametrize(
    ("parts", "items", "stripe"), [(20, 64, 1), (32, 256, 1), (300, 32, 1), (40, 256, 4)]
)
def test_batches_are_as_varied_as_independent_draws(parts: int, items: int, stripe: int) -> None:
    item_vif, token_vif, distinct = vif(parts, items, 48, 512, epochs=4, stripe=stripe)
    assert item_vif <= 1.2
    assert token_vif <= 1.2
    assert distinct >= (0.98 if stripe == 1 else 0.95)


def test_rows_grouped_by_image_would_fail_that_test() -> None:
    """The statistic sees what it is meant to see: a batch of whole images has a VIF near T."""
    value = np.random.default_rng(0).permutation(20 * 64)
    rows = 512
    means = value[: len(value) // 11 * 11].reshape(-1, 11).mean(axis=1)  # 11 images of 49 tokens
    assert np.var(means) / (((20 * 64) ** 2 - 1) / 12 / rows) > 20


def test_a_thousand_million_items_cost_parts_not_items() -> None:
    parts = 1_000_000  # of 1,000 items
    tracemalloc.start()
    begin = time.perf_counter()
    epoch = Epoch(
        counts=np.full(parts, 1000), columns=np.ones(197, int), batch_size=4096, seed=0, epoch=3
    )
    cuts = epoch.cut(epoch.batches // 3, 0)
    pool = epoch.pool(cuts[0].pool)
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch.rows == 197 * 10**9
    assert pool.rows == 197_000
    assert seconds < 8
    assert peak < 64e6
    assert epoch.max_pool_rows == 197_000


@pytest.mark.parametrize(
    ("rank", "world", "streams", "match"),
    [(0, 3, 4, "must divide"), (2, 2, 4, "below|0..world-1"), (0, 0, 4, "world")],
)
def test_impossible_worlds_are_refused(rank: int, world: int, streams: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        streams_of(rank, world, streams)


@pytest.mark.parametrize("change", [{"batch_size": 5, "streams": 2}, {"epoch": -1}])
def test_impossible_epochs_are_refused(change: dict[str, int]) -> None:
    arguments = {"batch_size": 4, "seed": 0, "epoch": 0} | change
    with pytest.raises(ValueError, match="must be"):
        Epoch(counts=np.ones(2, int), columns=np.ones(2, int), **arguments)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=20),
    st.floats(0, 1),
    st.integers(0, 2**63),
)
def test_held_out_rows_have_the_fraction_asked_for(
    counts: list[int], fraction: float, seed: int
) -> None:
    total = 0
    for part, n in enumerate(counts):
        rows = held_out(part, n, start=part * 40, fraction=fraction, seed=seed)
        assert len(set(rows.tolist())) == len(rows) <= n
        assert (rows < n).all()
        assert abs(len(rows) - n * fraction) <= 1
        total += len(rows)
    full = [held_out(p, 40, start=p * 40, fraction=fraction, seed=seed) for p in range(5)]
    assert sum(map(len, full)) == int(200 * fraction)
