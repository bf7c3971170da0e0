"""What every benchmark needs: limits of the machine, clean caches, memory, tables."""

import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def evict(paths: Iterable[Path]) -> None:
    """Drop the pages of files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident(path: Path) -> float:
    """Return the share of a file's pages that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, size, 1, 1, descriptor, 0)
    pages = -(-size // 4096)
    vector = (ctypes.c_ubyte * pages)()
    libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), vector)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    os.close(descriptor)
    return float((np.frombuffer(vector, dtype=np.uint8) & 1).mean())


def read_through(paths: Sequence[Path], memory: np.ndarray, block: int = 8 << 20) -> float:
    """Read files one after the other into reused memory; return bytes per second."""
    view = memory.reshape(-1).view(np.uint8).data
    total, at = 0, 0
    begin = time.perf_counter()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        offset = 0
        while count := os.preadv(descriptor, [view[at : at + block]], offset):
            offset += count
            at = at + count if at + count + block <= len(view) else 0
        total += offset
        os.close(descriptor)
    return total / (time.perf_counter() - begin)


def peak_rss(reset: bool = False) -> int:
    """Return the peak resident bytes of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no VmHWM")


def interleaved(runs: dict[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    """Run every function `repeat` times in turn, so that all meet the same machine."""
    out: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            out[name].append(run())
    return out


def ratio(results: dict[str, list[float]], name: str, limit: str) -> float:
    """Return the median over the rounds of one result over its limit of the same round."""
    pairs = zip(results[name], results[limit], strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine() -> dict[str, Any]:
    """Describe where a benchmark ran."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows with equal keys as a Markdown table."""
    names = list(rows[0])
    body = [[_text(row.get(n, "")) for n in names] for row in rows]
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print the table of a result and write it all as JSON."""
    print(table(result["rows"]))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {out}")
