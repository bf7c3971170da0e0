"""Speed of writing: a store, with fsync and commit, over raw write + fsync of the same bytes.

    python -m benchmarks.write

Two ways to a store are measured, interleaved with the raw limit in one run:
`arrays`  values that lie in memory [item, token, channel], through `write_arrays` in source order;
`harvest` a model that costs nothing: four sites whose values are ready in memory, through the
          whole harvest (plan, decode threads, staging, writer), what a fast GPU would meet.
The raw limit writes as many bytes, in files as long as the shards, with fsync of each.
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro

import actstore
from benchmarks.values import residual_stream
from vitmodels.spec import ModelSpec, SiteInfo, TokenGrid

WRITE_CHUNK = 8 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    items: int = 8192
    """Items of the store of arrays."""
    width: int = 768
    """Channels a token."""
    patches: int = 196
    """Patch tokens an item."""
    rounds: int = 3
    """Rounds; the median of each is reported."""
    folder: str | None = None
    """Where to write; the system's folder for temporary files by default."""
    only: str = "arrays,harvest"
    """What to measure."""


def raw(folder: Path, sizes: list[int], data: np.ndarray) -> float:
    """Return the seconds of writing files of `sizes` bytes, each with fsync."""
    folder.mkdir()
    view = memoryview(data).cast("B")
    start = time.perf_counter()
    for number, size in enumerate(sizes):
        descriptor = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT, 0o644)
        offset = number * 4096 % max(1, len(view) - size)
        done = 0
        while done < size:
            block = view[offset + done : offset + min(size, done + WRITE_CHUNK)]
            done += os.write(descriptor, block)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def shard_sizes(store: actstore.Store) -> list[int]:
    """Return the bytes of every shard of a store."""
    paths = [p for p in Path(store.url, "acts").rglob("c.*") if p.is_file()]
    return [p.stat().st_size for p in paths]


class Free:
    """A model that costs nothing: the values of its four sites are ready in memory."""

    def __init__(self, width: int, patches: int, batch: int) -> None:
        side = int(patches**0.5)
        grid = TokenGrid(cls=1, patch=(side, patches // side))
        self.device = torch.device("cpu")
        names = [f"blocks.{i}.resid_post" for i in range(4)]
        shape = (grid.n_tokens, width)
        self._sites = {
            n: SiteInfo(name=n, axes=("token", "channel"), shape=shape, grid=grid) for n in names
        }
        generator = torch.Generator().manual_seed(0)
        self._values = {n: torch.randn(batch, *shape, generator=generator) for n in names}
        self.spec = ModelSpec(
            id="free", family="free", backend="free", d_model=width, n_layers=4, n_heads=1,
            d_head=width, d_mlp=0, grid=grid, input_shape=(1, 1, 1),
        )  # fmt: skip

    def sites(self) -> dict[str, SiteInfo]:
        """Return the four sites."""
        return self._sites

    def run(self, x: torch.Tensor, sites: Any, stop_early: bool = True) -> dict[str, torch.Tensor]:
        """Return the ready values."""
        return {name: self._values[name][: len(x)] for name in sites}


class Empty:
    """A data set of inputs without content."""

    def __init__(self, items: int) -> None:
        self._items = items
        self._input = torch.zeros(1, 1, 1)

    def __len__(self) -> int:
        return self._items

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._input


def measure(
    folder: Path, rounds: int, write: Callable[[str], actstore.Store], data: np.ndarray
) -> dict[str, Any]:
    """Return medians of the seconds of a store and of the raw limit, and the ratio."""
    ours, limit, sizes = [], [], []
    for number in range(rounds):
        out = str(folder / f"store{number}")
        start = time.perf_counter()
        store = write(out)
        ours.append(time.perf_counter() - start)
        sizes = shard_sizes(store)
        shutil.rmtree(out)
        os.sync()
        limit.append(raw(folder / "raw", sizes, data))
        os.sync()
    total = sum(sizes) / 1e9
    return {
        "gigabytes": round(total, 3),
        "store_gb_s": round(total / median(ours), 3),
        "raw_gb_s": round(total / median(limit), 3),
        "ratio": round(median(limit) / median(ours), 3),
        "ratios": [round(b / a, 3) for a, b in zip(ours, limit, strict=True)],
    }


def main(config: Config) -> int:
    """Run the benchmark and print JSON and a table."""
    rng = np.random.default_rng(0)
    results = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        if "arrays" in config.only:
            patch = residual_stream(config.items, config.patches, config.width)
            values = {"patch": patch, "cls": patch[:, :1]}
            site = {"blocks.6.resid_post": values}
            results["arrays"] = measure(
                folder, config.rounds, lambda out: actstore.write_arrays(out, site), patch
            )
        if "harvest" in config.only:
            batch = 64
            model = Free(config.width, config.patches, batch)
            data = rng.integers(0, 255, 256 << 20, dtype=np.uint8)
            results["harvest"] = measure(
                folder,
                config.rounds,
                lambda out: actstore.harvest(
                    model=model, data=Empty(config.items // 4), sites="*", out=out, batch_size=batch
                ),
                data,
            )
    print(json.dumps(results))
    for name, row in results.items():
        print(f"{name:8} {row['store_gb_s']} GB/s of {row['raw_gb_s']} GB/s: {row['ratio']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
