"""Batches that share the memory of the pools: right values, few pools pinned."""

from pathlib import Path
from typing import Any

import numpy as np
from readings import build, check_batch

from actstore.reader import batches, epochs_of
from actstore.selection import Selection


def owner(values: np.ndarray) -> np.ndarray:
    return values if values.base is None else owner(values.base)


def test_batches_are_views_of_two_pools_where_nothing_is_converted(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [64] * 4, size=64, tokens=8)
    selection = Selection(store, "s0")
    pool = epochs_of(selection, 50, seed=0, streams=1)(0).max_pool_rows
    lent = [id(owner(b.acts)) for b in batches(store, "s0", 50) if len(owner(b.acts)) == pool]
    assert len(lent) > 30
    assert len(set(lent)) == 2
    converted = {len(owner(b.acts)) for b in batches(store, "s0", 50, dtype="float32")}
    assert converted <= {50, 2304 % 50}


def test_a_kept_slice_pins_few_pools_and_its_values_stay(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [8] * 40, size=8, tokens=8)
    selection = Selection(store, "s0")
    order = epochs_of(selection, 16, seed=0, streams=1)(0)
    assert order.pools > 12
    kept = [b.acts[3:5] for b in batches(store, "s0", 16)]
    copies = [b.acts[3:5].copy() for b in batches(store, "s0", 16)]
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))
    pinned = {id(owner(a)) for a in kept if len(owner(a)) > 16}
    assert 1 <= len(pinned) <= 2


def test_every_second_batch_kept_for_a_while(tmp_path: Path) -> None:
    """A queue of some batches between reader and consumer, as a prefetching consumer has."""
    store = build(tmp_path / "a", [8] * 40, size=8, tokens=8)
    waiting: list[Any] = []
    seen = 0
    for b in batches(store, "s0", 16):
        waiting.append(b)
        if len(waiting) > 5:
            seen += len(check_batch(store, waiting.pop(0)))
    seen += sum(len(check_batch(store, b)) for b in waiting)
    assert seen == 320 * 9
