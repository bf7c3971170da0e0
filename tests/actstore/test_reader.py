"""Shuffled and sequential reading of real stores: right values, exactly once, clear refusals."""

import itertools
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readings import build, check_batch, expected

import actstore
from actstore.manifest import FormatError
from actstore.reader import batches, sequential
from actstore.selection import Split

SLOW = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, size), min_size=1, max_size=6))
    return {"counts": counts, "size": size, "tokens": draw(st.integers(1, 5)), "widths": (4, 2)}


@SLOW
@given(
    layout=layouts(),
    micro=st.integers(1, 30),
    streams=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    kinds=st.sampled_from(["cls", "patch", "cls,patch", None]),
    two=st.booleans(),
)
def test_every_row_once_from_any_batch_on_for_any_world(
    tmp_path_factory: pytest.TempPathFactory,
    layout: dict[str, Any],
    micro: int,
    streams: int,
    seed: int,
    kinds: str | None,
    two: bool,
) -> None:
    store = build(tmp_path_factory.mktemp("s") / "a.zarr", **layout)
    wanted = {"cls": {0}, "patch": set(range(1, 1 + layout["tokens"]))}
    tokens = set().union(*(wanted[k] for k in (kinds or "cls,patch").split(",")))
    due = {
        (p * layout["size"] + r, t)
        for p, n in enumerate(layout["counts"])
        for r in range(n)
        for t in tokens
    }
    options = {
        "sites": "s0,s1" if two else "s1",
        "batch_size": micro * streams,
        "tokens": kinds,
        "seed": seed,
        "epoch": 1,
        "streams": streams,
    }
    whole = list(batches(store, **options))
    seen = [check_batch(store, b, (4, 2)) for b in whole]
    assert sum(map(len, seen)) == len(due)
    assert set().union(*seen) == due
    assert all(len(b) == micro * streams for b in whole[:-1])
    for world in {1, 2, streams}:
        if streams % world:
            continue
        ranks = [list(batches(store, **options, rank=r, world=world)) for r in range(world)]
        for i, batch in enumerate(whole):
            assert np.array_equal(np.concatenate([r[i].acts for r in ranks]), batch.acts)
            assert np.array_equal(np.concatenate([r[i].item for r in ranks]), batch.item)
    for start in range(len(whole) + 1):
        rest = list(batches(store, **options, start=start))
        assert len(rest) == len(whole) - start
        for got, want in zip(rest, whole[start:], strict=True):
            assert np.array_equal(got.acts, want.acts)
            assert np.array_equal(got.token, want.token)


@SLOW
@given(layout=layouts(), batch=st.integers(1, 30))
def test_a_sequential_pass_follows_the_store(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, Any], batch: int
) -> None:
    store = build(tmp_path_factory.mktemp("s") / "a.zarr", **layout)
    whole = list(sequential(store, "s0,s1", batch))
    pairs = [(i, t) for b in whole for i, t in zip(b.item.tolist(), b.token.tolist(), strict=True)]
    for b in whole:
        check_batch(store, b, (4, 2))
    due = [
        (p * layout["size"] + r, t)
        for p, n in enumerate(layout["counts"])
        for t in range(1 + layout["tokens"])
        for r in range(n)
    ]
    assert pairs == due
    start = len(whole) // 2
    rest = list(sequential(store, "s0,s1", batch, start=start))
    assert [b.item.tolist() for b in rest] == [b.item.tolist() for b in whole[start:]]


@pytest.mark.parametrize("widths", [(4, 2), (3, 3)])
@pytest.mark.parametrize("stripe_tokens", [(1, 2), (2, 3), (6, 6)])
@pytest.mark.parametrize("positions", [None, [0, 2, 3, 6], [5]])
def test_stripes_of_several_tokens(
    tmp_path: Path, widths: tuple[int, int], stripe_tokens: tuple[int, int], positions: Any
) -> None:
    store = build(
        tmp_path / "a", [5, 3, 4], size=5, tokens=6, widths=widths, stripe_tokens=stripe_tokens
    )
    seen = [
        check_batch(store, b, widths)
        for b in batches(store, ["s1", "s0"], 7, positions=positions, check=True)
    ]
    items = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13]
    due = set(itertools.product(items, range(7) if positions is None else positions))
    assert set().union(*seen) == due
    assert sum(map(len, seen)) == len(due)


@pytest.mark.parametrize("items", [1, 2, 17])
@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_small_stores(tmp_path: Path, items: int, batch_size: int) -> None:
    store = build(tmp_path / "a", [items], size=items, tokens=0)
    got = list(batches(store, "s0", batch_size))
    assert sorted(i for b in got for i in b.item.tolist()) == list(range(items))
    assert len(got) == -(-items // batch_size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    store = build(tmp_path / "a", [3, 2], size=3, dtype=dtype)
    default = {"float16": np.float16, "bfloat16": np.float32, "float32": np.float32}[dtype]
    for b in batches(store, "s0", 4):
        assert b.acts.dtype == default
        if dtype != "bfloat16":
            check_batch(store, b)
        else:
            want = expected(0, b.item, b.token, 4)
            assert np.allclose(b.acts, want, rtol=2**-8)
    for b in batches(store, "s0", 4, dtype="float64"):
        assert b.acts.dtype == np.float64
    with pytest.raises(ValueError, match="floating point"):
        batches(store, "s0", 4, dtype="int32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stripe_tokens", [(1,), (3,)])
def test_compressed_stores_read_as_raw_ones(
    tmp_path: Path, dtype: str, stripe_tokens: tuple[int, ...]
) -> None:
    layout: dict[str, Any] = {
        "size": 5,
        "tokens": 6,
        "widths": (4, 2),
        "stripe_tokens": stripe_tokens,
        "dtype": dtype,
    }
    raw = build(tmp_path / "raw", [5, 3, 4], **layout)
    packed = build(tmp_path / "packed", [5, 3, 4], codec="archive", **layout)
    options: dict[str, Any] = {"positions": [0, 2, 3, 6], "check": True}
    for items in (None, Split(half="train", holdout=0.3), [1, 6, 12]):
        a = list(batches(raw, "s0,s1", 7, items=items, **options))
        b = list(batches(packed, "s0,s1", 7, items=items, **options))
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert np.array_equal(left.acts, right.acts)
            assert np.array_equal(left.token, right.token)
    assert np.array_equal(
        raw.items([12, 0, 6], "s1", "patch"), packed.items([12, 0, 6], "s1", "patch")
    )
    mounted = packed.dask("s0", "patch").compute(scheduler="sync")
    assert np.array_equal(mounted, raw.dask("s0", "patch").compute(scheduler="sync"))


def test_memory_of_a_batch_is_reused_only_when_nobody_looks(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [64] * 4, size=64, tokens=8)
    kept = [b.acts[3:5] for b in batches(store, "s0", 50)]
    copies = [b.acts[3:5].copy() for b in batches(store, "s0", 50)]
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_one_token_of_one_item_in_order_and_shuffled(tmp_path: Path, batch_size: int) -> None:
    store = build(tmp_path / "a", [1], size=1, tokens=0)
    for read in (batches, sequential):
        [only] = read(store, "s0", batch_size)
        assert check_batch(store, only) == {(0, 0)}
    store = build(tmp_path / "b", [3], size=3, tokens=2)
    got = list(sequential(store, "s0", batch_size))
    assert set().union(*(check_batch(store, b) for b in got)) == set(
        itertools.product(range(3), range(3))
    )


def test_a_store_that_grows_is_read_as_far_as_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = build(tmp_path / "a", [4, 4, 4], size=4, commit={0, 2})
    with caplog.at_level(logging.WARNING):
        got = [check_batch(store, b) for b in batches(store, "s0", 5)]
    assert "2 committed of 3 parts" in caplog.text
    assert {i for p in got for i, _ in p} == {0, 1, 2, 3, 8, 9, 10, 11}
    empty = build(tmp_path / "b", [4], size=4, commit=set())
    with pytest.raises(ValueError, match="0 items are committed in 0 of 1 parts"):
        batches(empty, "s0", 5)


def test_refusals_before_anything_is_read(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [4, 4], size=4, widths=(4, 2))
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (KeyError, "nearest: s0", {"sites": "s00"}),
        (KeyError, "did you mean 'patch'", {"tokens": "patches"}),
        (KeyError, "stored are cls, patch", {"tokens": "register"}),
        (ValueError, "each once", {"sites": "s0,s0"}),
        (ValueError, "at least one site", {"sites": ""}),
        (ValueError, "multiple of streams", {"batch_size": 5, "streams": 2}),
        (ValueError, "0..7", {"start": 8}),
        (ValueError, "must divide", {"streams": 1, "world": 2}),
        (ValueError, r"positions \[9\] are not tokens", {"positions": [1, 9]}),
        (ValueError, "no token position", {"positions": []}),
    ]
    for error, match, change in cases:
        arguments = {"sites": "s0", "batch_size": 5} | change
        with pytest.raises(error, match=match):
            batches(store, **arguments)


def test_sites_of_different_grids_are_not_aligned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sites = {
        "a": {"cls": rng.normal(size=(6, 1, 4)), "patch": rng.normal(size=(6, 9, 4))},
        "b": {"cls": rng.normal(size=(6, 1, 4)), "patch": rng.normal(size=(6, 4, 4))},
        "c": {"item": rng.normal(size=(6, 1, 4))},
    }
    store = actstore.write_arrays(tmp_path / "a", sites, dtype="float32")
    with pytest.raises(ValueError, match="token grids differ"):
        batches(store, "a,b", 4)
    with pytest.raises(ValueError, match="has no cls, patch tokens"):
        batches(store, "a,c", 4)
    assert sum(len(b) for b in batches(store, "c", 4)) == 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "a", [6, 6, 6, 2], size=6, widths=(8,))
    return tmp_path / "a"


def shard(folder: Path, part: int) -> Path:
    store = actstore.open(folder)
    return Path(store.shard("s0", "patch", part).uri)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"part 2 is committed; `actstore repair .*a`"):
        list(batches(actstore.open(folder), "s0", 4))


def test_a_truncated_shard_is_named(folder: Path) -> None:
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match=r"part 1 is truncated.*`actstore repair .*a`"):
        list(batches(actstore.open(folder), "s0", 4))


@pytest.mark.parametrize("part", [1, 3])
def test_a_flipped_bit_is_found_on_demand(folder: Path, part: int) -> None:
    path = shard(folder, part)
    data = bytearray(path.read_bytes())
    data[150] ^= 4
    path.write_bytes(data)
    store = actstore.open(folder)
    list(batches(store, "s0", 4))
    with pytest.raises(FormatError, match=rf"part {part} is damaged.*stripe 1.*actstore repair"):
        list(batches(store, "s0", 4, check=True))
    list(batches(store, "s0", 4, tokens="cls", check=True))


def test_leaving_early_stops_the_thread(folder: Path) -> None:
    def readers() -> int:
        return sum(t.name == "actstore-reader" for t in threading.enumerate())

    store = actstore.open(folder)
    before = readers()
    for _ in range(3):
        for _ in batches(store, "s0", 2):
            break
    iterator = batches(store, "s0", 2)
    next(iterator)
    assert readers() == before + 1
    del iterator
    assert readers() == before


def test_batches_of_a_real_store_are_as_varied_as_independent_draws(tmp_path: Path) -> None:
    """VIF of the image in the data set and of the position, on 24 parts of sorted images."""
    items, tokens, rows = 24 * 40, 16, 256
    values = np.zeros((items, tokens, 2), np.float16)
    store = actstore.write_arrays(tmp_path / "a", {"s": {"patch": values}}, items_per_part=40)
    source = np.empty(items, dtype=np.int64)
    table = store.table()
    source[table["position"].to_numpy()] = table["source"].to_numpy()
    image, position, distinct = [], [], []
    for epoch in range(6):
        for b in batches(store, "s", rows, seed=1, epoch=epoch):
            image.append(source[b.item].mean())
            position.append(b.token.mean())
            distinct.append(len(np.unique(b.item)))
    assert np.var(image) / ((items**2 - 1) / 12 / rows) <= 1.2
    assert np.var(position) / ((tokens**2 - 1) / 12 / rows) <= 1.2
    assert np.mean(distinct) / (items * (1 - (1 - 1 / items) ** rows)) >= 0.98
