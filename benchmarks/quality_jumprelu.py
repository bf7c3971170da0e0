"""Held-out FVU of JumpReLU beside the peers, at the L0 that each of their runs reached.

    PYTHONPATH=. PEERS/bin/python benchmarks/quality_jumprelu.py --data tokens --out jumprelu.jsonl
    python benchmarks/quality_jumprelu.py --table jumprelu.jsonl

A penalty's coefficient does not name an L0, and in a few hundred steps no peer's run comes down to
32. Ours is steered to an L0 by `TrainConfig.target_l0`. So each peer runs with two coefficients,
ours is steered to several L0 around theirs, and its FVU at the L0 of a peer's run is read off
between its two nearest runs of the same seed: log FVU linear in log L0. L0 and FVU are those under
each run's own thresholds. Batches, steps, Adam and the learning rate's schedule are the same for
all.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import Make, Setting, exported, measure, train

TARGETS = (32.0, 40.0, 50.0, 64.0)
"""L0 that ours is steered to."""

PENALTIES = {"sae-lens": (0.8, 2.4), "dictionary_learning": (180.0, 540.0)}
"""Coefficients of the peers: of those tried (``docs/results/quality.md``), two each that end at
different L0 within `TARGETS`."""

Run = dict[str, Any]


def contestants() -> Iterator[tuple[str, float, Make]]:
    """Every run of a seed: trainer, L0 asked for or coefficient, how to make it."""
    from benchmarks.quality_contestants import dictionary_learning, ours, sae_lens

    yield from (("ours", l0, ours("JumpReLU", l0)) for l0 in TARGETS)
    for c in PENALTIES["sae-lens"]:
        yield "sae-lens", c, sae_lens("JumpReLU", c, threshold=0.1)
    for c in PENALTIES["dictionary_learning"]:
        yield "dictionary_learning", c, dictionary_learning("JumpReLU", c, bandwidth=0.1)


def at(l0: float, runs: list[Run]) -> float | None:
    """FVU at an L0 on the line between the nearest runs on both sides; None outside of them."""
    over = [r for r in runs if r["l0_own"] >= l0]
    under = [r for r in runs if r["l0_own"] < l0]
    if not over or not under:
        return None
    a, b = min(over, key=lambda r: r["l0_own"]), max(under, key=lambda r: r["l0_own"])
    share = math.log(l0 / b["l0_own"]) / math.log(a["l0_own"] / b["l0_own"])
    return float(b["fvu_own"] * (a["fvu_own"] / b["fvu_own"]) ** share)


def table(lines: Iterable[str]) -> str:
    """One row a run of a peer, then the mean ratio of each peer."""
    rows = [json.loads(line) for line in lines]
    mine = {s: [r for r in rows if (r["name"], r["seed"]) == ("ours", s)] for s in _seeds(rows)}
    out = [
        "| trainer | coefficient | seed | L0 | FVU | FVU of ours there | ours / theirs | dead |"
        "\n|---|---|---|---|---|---|---|---|"
    ]
    ratios: dict[str, list[float]] = {}
    for r in rows:
        if r["name"] == "ours":
            continue
        here = at(r["l0_own"], mine[r["seed"]])
        cells = [r["name"], f"{r['coefficient']:g}", str(r["seed"]), f"{r['l0_own']:.1f}"]
        cells += [f"{r['fvu_own']:.4f}"]
        if here is None:
            cells += ["not bracketed", ""]
        else:
            ratios.setdefault(r["name"], []).append(here / r["fvu_own"])
            cells += [f"{here:.4f}", f"{here / r['fvu_own']:.3f}"]
        out.append("| " + " | ".join([*cells, f"{r['dead']:.1%}"]) + " |")
    out.append("\n| ours, steered to | seed | L0 | FVU | dead | CPU s |\n|---|---|---|---|---|---|")
    for r in (r for runs in mine.values() for r in runs):
        cells = [f"{r['coefficient']:g}", str(r["seed"]), f"{r['l0_own']:.1f}"]
        cells += [f"{r['fvu_own']:.4f}", f"{r['dead']:.1%}", f"{r['seconds']:.0f}"]
        out.append("| " + " | ".join(cells) + " |")
    means = (f"{name} {np.mean(v):.3f} ({len(v)} runs)" for name, v in ratios.items())
    return "\n".join(out) + f"\n\nFVU of ours over theirs at equal L0: {', '.join(means)}\n"


def _seeds(rows: list[Run]) -> list[int]:
    return sorted({r["seed"] for r in rows})


def main() -> None:
    """Train whoever is installed, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("jumprelu.jsonl"))
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table(args.table.read_text().splitlines()))
        return
    tokens, held = exported(args.data)
    width = tokens.shape[1]
    setting = Setting(
        width=width,
        latents=args.expansion * width,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        mean=tokens.mean(0),
    )
    for seed in args.seeds:
        for name, coefficient, make in contestants():
            try:
                one, seconds = train(make, setting, tokens, seed)
            except ModuleNotFoundError as error:
                sys.stdout.write(f"skipped {name}: {error}\n")
                continue
            run = {"name": name, "seed": seed, "lr": args.lr, "coefficient": coefficient}
            run |= {"steps": args.steps, "batch": args.batch, "seconds": seconds}
            run |= measure(one, "JumpReLU", held)
            with args.out.open("a") as file:
                file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
