"""Shuffled reading beside other loaders, on the same values in one run.

    python -m benchmarks.read_peers --scratch /somewhere/with/2GB
        [--saev PYTHON] [--litdata PYTHON] [--annbatch PYTHON] [--items 1024] [--rounds 3]
        [--out result.json]

PYTHON is an interpreter that has the peer. Every loader runs in an interpreter of its own
(``read_peer.py``) and reads its own best form of the same synthetic activations; epochs of all
loaders alternate, as does the limit, a plain sequential read of the product's files. annbatch needs
Python 3.12 (``pip install annbatch zarr zarrs anndata``). Columns:

tokens/s      of a whole epoch, its start included, pages in the cache; of saev and litdata, whose
              workers are slow, of eight batches after the first
cold          the same with no page of the files in the cache
of the limit  tokens/s over those of the sequential read of the float16 values
VIF           variance of the means of whole batches over that of independent draws, of the
              number of the image in the data set (sorted by class) and of the position
distinct      different images in a batch over those of independent draws
memory        resident at the peak of an epoch beyond that before, workers included, files not
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import actstore
from benchmarks import measure
from benchmarks.synthetic import write_synthetic

SITE = "blocks.0.resid_post"

ELSEWHERE = ("saev", "litdata", "annbatch")
"""Peers that need an interpreter of their own."""


class Loader:
    """A loader in its own interpreter: asked for an epoch, it answers with what it took."""

    def __init__(self, name: str, python: str, setting: list[str]) -> None:
        script = str(Path(__file__).with_name("read_peer.py"))
        self.epochs: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [python, "-W", "ignore", script, name, *setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._until("ready")

    def __call__(self, keep: bool = True) -> float:
        """Read an epoch; return its tokens per second."""
        if self._process.stdin is None:
            raise ValueError("the loader has no standard input")
        self._process.stdin.write(f"{len(self.epochs)}\n")
        self._process.stdin.flush()
        answer = json.loads(self._until("result").removeprefix("result "))
        if keep:
            self.epochs.append(answer)
        return float(answer["rows"] / answer["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _until(self, word: str) -> str:
        for line in self._process.stdout or ():
            if line.startswith(word):
                return line
        raise ValueError(f"{self._process.args!r} ended: does its interpreter have the peer?")


def write_values(folder: Path, items: int) -> actstore.Store:
    """Write the store, and its patches as one file in the order of the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    store = write_synthetic(str(folder / "acts.zarr"), items=items, items_per_part=items // 16)
    array = store.spec(SITE, "patch")
    path, shape = folder / "values.f16", (items, array.tokens, array.channels)
    if not path.exists():
        table = store.table()
        out = np.memmap(path, mode="w+", dtype=np.float16, shape=shape)
        for position in np.array_split(np.arange(items), 16):
            source = table["source"].to_numpy()[position]
            out[source] = store.items(table["position"].to_numpy()[position], SITE, "patch")
        out.flush()
    return store


def mixing(epochs: list[dict[str, Any]], items: int, patches: int, batch: int) -> list[float]:
    """Return the VIF of image and position, and distinct images over those of i.i.d. rows."""
    image, position, distinct = np.array([m for e in epochs for m in e["marks"]]).T
    return [
        float(np.var(image) / ((items**2 - 1) / 12 / batch)),
        float(np.var(position) / ((patches**2 - 1) / 12 / batch)),
        float(np.mean(distinct) / (items * (1 - (1 - 1 / items) ** batch))),
    ]


def cold(folder: Path, run: Callable[[], float]) -> Callable[[], float]:
    """Return a run without any page of the folder in the page cache."""

    def evicted() -> float:
        measure.evict(p for p in folder.rglob("*") if p.is_file())
        return run()

    return evicted


def run(folder: Path, pythons: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Write the values where they are not there yet, and read them with every loader."""
    store = write_values(folder, options.items)
    array = store.spec(SITE, "patch")
    numbers = [options.items, array.tokens, array.channels, options.batch]
    setting = [str(folder), *map(str, numbers)]
    loaders = {name: Loader(name, python, setting) for name, python in pythons.items()}
    paths = [Path(store.shard(SITE, "patch", p).uri) for p in range(store.manifest.n_parts)]
    room = np.zeros(sum(p.stat().st_size for p in paths) // 2, dtype=np.uint8)

    def limit() -> float:
        return measure.read_through(paths, room) / (array.channels * 2)

    rows = []
    try:
        for loader in loaders.values():
            loader(keep=False)  # imports, first worker
        runs: dict[str, Callable[[], float]] = {"limit": limit, **loaders}
        warm = measure.interleaved(runs, options.rounds)
        chilled = {name: cold(folder, call) for name, call in runs.items()}
        colds = measure.interleaved(chilled, options.rounds)
        for name, loader in loaders.items():
            vif = mixing(loader.epochs, options.items, array.tokens, options.batch)
            mine = loader.epochs[: options.rounds]
            tokens = mine[0]["rows"]
            rows.append(
                {
                    "loader": name,
                    "Mtok/s": statistics.median(warm[name]) / 1e6,
                    "Mtok per CPU second": tokens / 1e6 / statistics.median(e["cpu"] for e in mine),
                    "of the limit": measure.ratio(warm, name, "limit"),
                    "cold Mtok/s": statistics.median(colds[name]) / 1e6,
                    "cold, of the limit": measure.ratio(colds, name, "limit"),
                    "VIF image": vif[0],
                    "VIF position": vif[1],
                    "distinct": vif[2],
                    "memory MB": max(e["memory"] for e in loader.epochs) / 1e6,
                }
            )
    finally:
        for loader in loaders.values():
            loader.close()
    sizes = dict(zip(("items", "patches", "channels", "batch"), numbers, strict=True))
    return {
        "rows": rows,
        "warm": warm,
        "cold": colds,
        "setting": {**sizes, "GB": float(np.prod(numbers[:3])) * 2 / 1e9},
        "not run": {p: "no interpreter given" for p in ELSEWHERE if p not in pythons},
        "machine": {**measure.machine(), "load": os.getloadavg()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the values; kept")
    for name in ELSEWHERE:
        parser.add_argument(f"--{name}", help=f"interpreter that has {name}")
    parser.add_argument("--items", type=int, default=1024, help="of 196 x 768 values; 16 parts")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    pythons = dict.fromkeys(("actstore", "actstore-float32", "zarr"), sys.executable)
    pythons |= {k: v for k in ELSEWHERE if (v := getattr(options, k)) is not None}
    result = run(options.scratch / f"peers-{options.items}", pythons, options)
    result["command"] = " ".join(["python -m benchmarks.read_peers", *sys.argv[1:]])
    measure.report(result, options.out)


if __name__ == "__main__":
    main()
