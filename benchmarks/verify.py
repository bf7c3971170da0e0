"""Speed of `actstore verify` over a sequential read of the same files, warm and cold.

python -m benchmarks.verify
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import tyro

import actstore
from actstore.verify import verify
from benchmarks.values import residual_stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    items: int = 4096
    """Items of the store, of 196 x 768 float16 values."""
    rounds: int = 3
    """Rounds; medians are reported."""
    folder: str | None = None
    """Where to write; the system's folder for temporary files by default."""


def sequential(paths: list[Path]) -> float:
    """Return the seconds of reading files one after the other into one buffer."""
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(config: Config) -> int:
    """Run the benchmark and print JSON."""
    values = residual_stream(config.items, 196, 768)
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        store = actstore.write_arrays(f"{name}/a", {"blocks.6.resid_post": {"patch": values}})
        del values
        paths = sorted(p for p in Path(name).rglob("c.*") if p.is_file())
        total = sum(p.stat().st_size for p in paths) / 1e9
        result = {}
        for how in ("warm", "cold"):
            ours, limit, ours_cpu, limit_cpu = [], [], [], []
            for _ in range(config.rounds):
                sequential(paths)
                if how == "cold":
                    forget(paths)
                cpu = time.process_time()
                limit.append(sequential(paths))
                limit_cpu.append(time.process_time() - cpu)
                if how == "cold":
                    forget(paths)
                start, cpu = time.perf_counter(), time.process_time()
                if verify(store):
                    raise RuntimeError("a sound store has problems")
                ours.append(time.perf_counter() - start)
                ours_cpu.append(time.process_time() - cpu)
            result[how] = {
                "verify_gb_s": round(total / median(ours), 2),
                "sequential_gb_s": round(total / median(limit), 2),
                "ratio": round(median(a / b for a, b in zip(limit, ours, strict=True)), 2),
                "cpu_ratio": round(median(limit_cpu) / median(ours_cpu), 2),
            }
    load = os.getloadavg()[0]
    print(json.dumps({"gigabytes": round(total, 2), "load": round(load, 1), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
