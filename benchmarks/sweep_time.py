"""Time of a sweep of many dictionaries from one pass against as many runs one after another.

    python benchmarks/sweep_time.py --threads 2       16 small dictionaries
    python benchmarks/sweep_time.py --threads 2 --width 768 --expansion 8 --count 4

A store of planted activations is written to a temporary folder. Each round trains the same
dictionaries three ways, in turns: single runs with all threads, one pass with all threads taking
one dictionary after another, and one pass whose dictionaries are shared by as many workers as
threads. All three write log, checkpoints and dictionaries. Wall and CPU seconds are printed with
the largest difference of any weight to that of the single run; the share of the loop spent waiting
for data is that of a single run.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import actstore
from actstore.store import Store
from dictlearn.config import BatchTopK, TopK
from dictlearn.formats import load
from dictlearn.progress import TrainEvent
from dictlearn.schedule import TrainConfig
from dictlearn.sweep import Candidate
from dictlearn.trainer import train

SITE = "blocks.7.resid_post"


def make_store(folder: Path, items: int, tokens: int, width: int) -> Store:
    """Sparse mixtures of twice as many atoms as channels, with noise."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(2 * width, width)).astype(np.float32)
    values = np.empty((items, tokens, width), np.float32)
    for item in range(items):
        pick = rng.integers(0, 2 * width, (tokens, 12))
        weight = rng.random((tokens, 12, 1), np.float32)
        values[item] = (weight * atoms[pick]).sum(1) + rng.normal(size=(tokens, width)) * 0.1
    arrays = {SITE: {"patch": values}}
    return actstore.write_arrays(folder, arrays, items_per_part=max(1, items // 16))


def candidates(width: int, expansion: int, count: int) -> list[Candidate]:
    """TopK and BatchTopK, several k, several seeds."""
    grid = itertools.product((0, 1), (TopK, BatchTopK), (8, 16, 32, 64))
    return [
        Candidate(reads={SITE: width}, latents=expansion * width, sparsify=kind(k), seed=seed)
        for seed, kind, k in itertools.islice(grid, count)
    ]


def single(store: Store, chosen: list[Candidate], config: TrainConfig, out: Path) -> list[float]:
    """Every dictionary in a run of its own; returns the shares waited for data."""
    waits: list[float] = []

    def note(event: TrainEvent) -> None:
        if event.kind == "log":
            waits.append(event.data_wait)

    for one in chosen:
        train(store, one.build(), config, out=out / one.name, names=[one.name], on_event=note)
    return waits


def together(
    store: Store, chosen: list[Candidate], config: TrainConfig, out: Path, workers: int
) -> None:
    """Every dictionary from one pass."""
    names = [c.name for c in chosen]
    train(store, [c.build() for c in chosen], config, out=out, names=names, workers=workers)


def difference(one: Path, other: Path, chosen: list[Candidate], nested: bool) -> float:
    """Largest difference of any weight, relative to the largest of its tensor."""
    worst = 0.0
    for c in chosen:
        a = load(one / c.name / c.name if nested else one / c.name).state_dict()
        b = load(other / c.name).state_dict()
        for key, value in a.items():
            scale = max(float(value.abs().max()), 1e-12)
            worst = max(worst, float((value - b[key]).abs().max()) / scale)
    return worst


def main() -> None:
    """Run the rounds and print a table; JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig(
        steps=args.steps, batch_size=args.batch, checkpoint_every=0, log_every=5, gemm="onednn"
    )
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = make_store(work / "acts.zarr", 512, 196, args.width)
        chosen = candidates(args.width, args.expansion, args.count)
        waits: list[float] = []
        for number in range(args.rounds):
            here = work / f"round-{number}"
            ways = {
                "single runs": lambda out: waits.extend(single(store, chosen, config, out)),
                "one pass": lambda out: together(store, chosen, config, out, 1),
                f"one pass, {args.threads} workers": lambda out: together(
                    store, chosen, config, out, args.threads
                ),
            }
            for name, way in ways.items():
                start, cpu = time.perf_counter(), time.process_time()
                way(here / name)
                spent = (time.perf_counter() - start, time.process_time() - cpu)
                seconds.setdefault(name, []).append(spent)
        last = work / f"round-{args.rounds - 1}"
        torch.set_num_threads(1)
        single(store, chosen[:2], config, last / "one thread")
        torch.set_num_threads(args.threads)
        rows = []
        base = [statistics.median(v) for v in zip(*seconds["single runs"], strict=True)]
        for name, values in seconds.items():
            wall, cpu = (statistics.median(v) for v in zip(*values, strict=True))
            rows.append({"way": name, "wall": wall, "cpu": cpu})
            rows[-1] |= {"wall_ratio": wall / base[0], "cpu_ratio": cpu / base[1]}
            nested = name == "single runs"
            if not nested:
                rows[-1]["difference"] = difference(last / "single runs", last / name, chosen, True)
        rows[-1]["difference_one_thread"] = difference(
            last / "one thread", last / rows[-1]["way"], chosen[:2], True
        )
    print(
        f"{args.count} dictionaries, d={args.width}, F={args.width * args.expansion}, "
        f"{args.steps} steps of {args.batch}, {args.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print("| way | wall s | CPU s | wall ratio | CPU ratio | largest difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['wall']:.1f} | {row['cpu']:.1f} | {row['wall_ratio']:.2f} | "
            f"{row['cpu_ratio']:.2f} | {row.get('difference', 0.0):.1e} |"
        )
    print(f"workers against single runs of one thread: {rows[-1]['difference_one_thread']:.1e}")
    print(f"waiting for data: median {statistics.median(waits):.1%}, largest {max(waits):.1%}")
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "data_wait": waits}, indent=1) + "\n")


if __name__ == "__main__":
    main()
