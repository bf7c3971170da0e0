"""How fast, how well mixed and how small is reading? One command, limits measured in the same run.

    python -m benchmarks.read --scratch /somewhere/with/8GB [--json result.json] [--rounds 5]

Writes a store of 8,192 items x 197 tokens x 768 float16 (2.5 GB; `--items` for less) to a
scratch folder and reads it with the loader of the product, warm and cold, beside a plain
sequential read of the same bytes into memory of the same size. All runs of one row alternate
with their limit, so that other load on the machine meets both; ratios are medians over rounds. The
reader is three threads that wait for each other and the limit is one that never waits, so load
beyond the cores hurts the reader alone; there, run it under ``chrt -f 5``.
"""

import argparse
import gc
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import actstore
from actstore.pools import Buffer, Filler, allocate
from actstore.reader import batches, epochs_of
from actstore.selection import Selection
from actstore.store import Store
from benchmarks import measure
from benchmarks.synthetic import write_synthetic

BATCH = 4096
SITE = "blocks.0.resid_post"


def files(store: Store, sites: list[str], kind: str = "patch") -> list[Path]:
    """Return the shards of some arrays, in the order of their parts."""
    parts = range(store.manifest.n_parts)
    return [Path(store.shard(site, kind, p).uri) for site in sites for p in parts]


def epoch_bytes(store: Store, sites: list[str], **options: Any) -> tuple[float, int]:
    """Read one epoch of patches; return seconds and bytes."""
    begin = time.perf_counter()
    rows = 0
    for batch in batches(store, sites, BATCH, tokens="patch", **options):
        rows += len(batch)
    width = sum(store.spec(site, "patch").channels for site in sites)
    return time.perf_counter() - begin, rows * width * 2


def rate(store: Store, sites: list[str], **options: Any) -> float:
    """Return bytes per second of one epoch."""
    seconds, size = epoch_bytes(store, sites, **options)
    return size / seconds


def tensor_rate(store: Store, dtype: str) -> float:
    """Return stored bytes per second of one epoch as tensors."""
    import torch

    from actstore.loader import TokenLoader

    loader = TokenLoader(store, SITE, BATCH, tokens="patch", epochs=1, dtype=getattr(torch, dtype))
    begin = time.perf_counter()
    rows = sum(len(b) for b in loader)
    return rows * store.spec(SITE, "patch").channels * 2 / (time.perf_counter() - begin)


def cold(paths: list[Path], run: Callable[[], float]) -> float:
    """Run with none of the files in the page cache."""
    measure.evict(paths)
    return run()


def quality(store: Store, epochs: int) -> dict[str, float]:
    """Return the variance of batch means over that of i.i.d. rows, and distinct images."""
    table = store.table()
    source = np.zeros(store.manifest.items, dtype=np.int64)
    source[table["position"].to_numpy()] = table["source"].to_numpy()
    image, position, distinct = [], [], []
    for epoch in range(epochs):
        for b in batches(store, SITE, BATCH, tokens="patch", seed=epoch):
            if len(b) == BATCH:
                image.append(source[b.item].mean())
                position.append(b.token.mean())
                distinct.append(len(np.unique(b.item)))
    n, t = store.n_items, store.spec(SITE, "patch").tokens
    return {
        "image": float(np.var(image) / ((n**2 - 1) / 12 / BATCH)),
        "position": float(np.var(position) / ((t**2 - 1) / 12 / BATCH)),
        "distinct": float(np.mean(distinct) / (n * (1 - (1 - 1 / n) ** BATCH))),
        "batches": len(image),
    }


MEMORY = """
import gc, sys, actstore
from actstore.reader import batches, epochs_of
from actstore.selection import Selection
from benchmarks.measure import peak_rss
store = actstore.open(sys.argv[1])
list(zip(batches(store, sys.argv[2], 64, tokens="cls"), range(2)))   # imports and code pages
gc.collect()
before = peak_rss(reset=True)
before = peak_rss()
selection = Selection(store, sys.argv[2], tokens="patch")
order = epochs_of(selection, int(sys.argv[3]), seed=0, streams=1)(0)
pools = 2 * order.max_pool_rows * selection.row_bytes
for batch in batches(store, sys.argv[2], int(sys.argv[3]), tokens="patch"):
    pass
print(peak_rss() - before, pools)
"""


def memory(store: Store) -> tuple[float, float]:
    """Return resident MB the reader adds at its peak, and MB of its two pools."""
    command = [sys.executable, "-c", MEMORY, store.url, SITE, str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    added, pools = map(int, done.stdout.split())
    return added / 1e6, pools / 1e6


def resume_ratio(store: Store, rng: np.random.Generator) -> tuple[float, float]:
    """Return the time to a first batch at a random place over that to read one pool, and it."""
    selection = Selection(store, SITE, tokens="patch")
    order = epochs_of(selection, BATCH, seed=0, streams=1)(0)
    filler = Filler(selection, check=False)
    pool = int(rng.integers(order.pools))
    gc.collect()
    begin = time.perf_counter()
    buffer = Buffer(selection, order.max_pool_rows, allocate)
    filler.fill(buffer, filler.plan(order, 0, pool))
    one_pool = time.perf_counter() - begin
    filler.close()
    del buffer
    gc.collect()
    start = int(rng.integers(order.batches))
    begin = time.perf_counter()
    iterator = batches(store, SITE, BATCH, tokens="patch", start=start)
    next(iterator)
    first = time.perf_counter() - begin
    iterator.close()  # type: ignore[attr-defined]
    return first / one_pool, first


def items_rates(store: Store, rng: np.random.Generator) -> tuple[float, float]:
    """Return bytes per second of 64 random items by `items`, and by preadv of the same rows."""
    positions = rng.choice(store.manifest.items, 64, replace=False)
    begin = time.perf_counter()
    got = store.items(positions, SITE, "patch")
    ours = got.nbytes / (time.perf_counter() - begin)
    out = np.empty_like(got)
    cell = got.shape[2] * 2
    size = store.manifest.items_per_part
    paths = files(store, [SITE])
    begin = time.perf_counter()
    for i, position in enumerate(positions.tolist()):
        part, row = divmod(position, size)
        descriptor = os.open(paths[part], os.O_RDONLY)
        view = out[i].reshape(-1).view(np.uint8).data
        for token in range(got.shape[1]):
            offset = (token * size + row) * cell
            os.preadv(descriptor, [view[token * cell : (token + 1) * cell]], offset)
        os.close(descriptor)
    plain = got.nbytes / (time.perf_counter() - begin)
    if not np.array_equal(out, got):
        raise ValueError("store.items and preadv disagree")
    return ours, plain


def row(what: str, value: float, target: float, *, at_most: bool = False, **more: Any) -> dict:
    """Return one row of the table."""
    met = value <= target if at_most else value >= target
    return {
        "what": what,
        "value": float(value),
        "target": ("<= " if at_most else ">= ") + str(target),
        "met": bool(met),
        "detail": ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items()
        ),
    }


def run(store: Store, rounds: int) -> dict[str, Any]:
    """Measure everything; return rows and raw figures."""
    rng = np.random.default_rng(0)
    two = list(store.sites[:2])
    paths = files(store, [SITE])
    selection = Selection(store, SITE, tokens="patch")
    order = epochs_of(selection, BATCH, seed=0, streams=1)(0)
    room = np.zeros(2 * order.max_pool_rows * selection.row_bytes, dtype=np.uint8)
    measure.read_through(paths, room)
    spent: dict[str, list[float]] = {"sequential": [], "shuffled": []}

    def counted(name: str, run: Callable[[], float]) -> Callable[[], float]:
        """Note the processor seconds of a run: of a busy machine they say more than the clock."""

        def noted() -> float:
            used = time.process_time()
            result = run()
            spent[name].append(time.process_time() - used)
            return result

        return noted

    warm = measure.interleaved(
        {
            "sequential": counted("sequential", lambda: measure.read_through(paths, room)),
            "shuffled": counted("shuffled", lambda: rate(store, [SITE])),
            "tensors float16": lambda: tensor_rate(store, "float16"),
            "tensors float32": lambda: tensor_rate(store, "float32"),
            "checked": lambda: rate(store, [SITE], check=True),
        },
        rounds,
    )
    cold_runs = measure.interleaved(
        {
            "sequential": lambda: cold(paths, lambda: measure.read_through(paths, room)),
            "shuffled": lambda: cold(paths, lambda: rate(store, [SITE])),
        },
        rounds,
    )
    rows = [
        row(
            "shuffled read cold / cold sequential",
            measure.ratio(cold_runs, "shuffled", "sequential"),
            0.85,
            GBps=float(np.median(cold_runs["shuffled"])) / 1e9,
            sequential=float(np.median(cold_runs["sequential"])) / 1e9,
        ),
        row(
            "shuffled read warm / warm sequential",
            measure.ratio(warm, "shuffled", "sequential"),
            0.75,
            GBps=float(np.median(warm["shuffled"])) / 1e9,
            sequential=float(np.median(warm["sequential"])) / 1e9,
            Mtok_per_s=float(np.median(warm["shuffled"])) / selection.row_bytes / 1e6,
            of_cpu_seconds=measure.ratio(spent, "sequential", "shuffled"),
        ),
    ]
    mixed = quality(store, 3)
    rows += [
        row("VIF of the image index", mixed["image"], 1.2, at_most=True, batches=mixed["batches"]),
        row("VIF of the patch position", mixed["position"], 1.2, at_most=True),
        row("distinct images / i.i.d.", mixed["distinct"], 0.98),
    ]
    added, pools = memory(store)
    rows.append(
        row(
            "reader memory beyond the two pools, MB",
            added - pools,
            64,
            at_most=True,
            pools_MB=pools,
        )
    )
    sites: dict[str, list[float]] = {}
    if len(two) == 2:
        both = files(store, two)
        measure.read_through(both, room)
        sites = measure.interleaved(
            {"one": lambda: rate(store, [SITE]), "two": lambda: rate(store, two)}, rounds
        )
        rows.append(
            row(
                "two aligned sites / one site, bytes per second",
                measure.ratio(sites, "two", "one"),
                0.9,
                GBps=float(np.median(sites["two"])) / 1e9,
            )
        )
    resumed = [resume_ratio(store, rng) for _ in range(4 * rounds)]
    rows.append(
        row(
            "resume: first batch / one pool, time",
            float(np.median([r for r, _ in resumed])),
            1.5,
            at_most=True,
            ms=1e3 * float(np.median([s for _, s in resumed])),
        )
    )
    fetched = [items_rates(store, rng) for _ in range(4 * rounds)]
    rows.append(
        row(
            "64 random items / the same rows by preadv",
            float(np.median([a / b for a, b in fetched])),
            0.3,
            GBps=float(np.median([a for a, _ in fetched])) / 1e9,
        )
    )
    return {
        "rows": rows,
        "warm": warm,
        "cold": cold_runs,
        "sites": sites,
        "quality": mixed,
        "machine": {**measure.machine(), "load": os.getloadavg()},
        "store": {"items": store.n_items, "parts": store.manifest.n_parts},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the store")
    parser.add_argument("--items", type=int, default=8192)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="keep the store for another run")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    folder = options.scratch / f"read-{options.items}-{options.sites}.zarr"
    write_synthetic(str(folder), items=options.items, sites=options.sites)
    try:
        result = run(actstore.open(folder), options.rounds)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    result["command"] = " ".join(["python -m benchmarks.read", *sys.argv[1:]])
    measure.report(result, options.json)


if __name__ == "__main__":
    main()
