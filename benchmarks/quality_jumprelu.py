"""Held-out FVU of JumpReLU at L0 = 32, between runs that bracket it, beside the peers.

    PYTHONPATH=. PEERS/bin/python benchmarks/quality_jumprelu.py --data tokens --out jumprelu.jsonl
    python benchmarks/quality_jumprelu.py --table jumprelu.jsonl

Nobody's penalty ends at exactly the L0 asked for, and a shift of all thresholds, as
`benchmarks.quality` applies, spoils a run that ended far from it. So each peer is trained with
several coefficients of its penalty, tripled or divided by three until two runs lie on both sides of
L0 = 32 under their own thresholds, and the FVU at 32 is read off between these: log FVU linear in
log L0. Ours is steered there by `TrainConfig.target_l0`, one run a seed; its FVU is carried along
the peers' mean slope from the L0 it reached. Batches, steps, Adam and the learning rate's schedule
are the same for all.
"""

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.quality import K, Make, Setting, measure, train

RATIO, TRIES = 3.0, 5


def _makers() -> dict[str, tuple[Callable[[float], Make], float]]:
    """Each contestant for a coefficient, and the coefficient to begin with."""
    from benchmarks.quality_contestants import dictionary_learning, ours, sae_lens

    return {
        "ours": (lambda coefficient: ours("JumpReLU"), 1.0),
        "sae-lens": (lambda c: sae_lens("JumpReLU", c, threshold=0.1), 0.8),
        "dictionary_learning": (
            lambda c: dictionary_learning("JumpReLU", c, bandwidth=0.1),
            60.0,
        ),
    }


def bracketed(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Nearest runs above and below L0 = k."""
    over = [r for r in runs if r["l0_own"] >= K]
    under = [r for r in runs if r["l0_own"] < K]
    if not over or not under:
        return None
    return min(over, key=lambda r: r["l0_own"]), max(under, key=lambda r: r["l0_own"])


def slope(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Slope: d log FVU / d log L0 between two runs."""
    rise = math.log(a["fvu_own"] / b["fvu_own"])
    return rise / math.log(a["l0_own"] / b["l0_own"])


def at_k(run: dict[str, Any], gradient: float) -> float:
    """FVU at L0 = k on a line of that slope through a run."""
    return float(run["fvu_own"]) * math.exp(gradient * math.log(K / run["l0_own"]))


def table(lines: Iterable[str]) -> str:
    """Mean and standard deviation over seeds."""
    rows = [json.loads(line) for line in lines]
    groups: dict[tuple[str, float], dict[int, list[dict[str, Any]]]] = {}
    for r in rows:
        groups.setdefault((r["name"], r["lr"]), {}).setdefault(r["seed"], []).append(r)
    pairs = {g: [bracketed(rs) for rs in by.values()] for g, by in groups.items()}
    slopes = [slope(*p) for (name, _), ps in pairs.items() if name != "ours" for p in ps if p]
    mean = float(np.mean(slopes)) if slopes else math.nan
    found: dict[tuple[str, float], list[float]] = {}
    for (name, lr), by in groups.items():
        for pair, rs in zip(pairs[name, lr], by.values(), strict=True):
            near = min(rs, key=lambda r: abs(math.log(r["l0_own"] / K)))
            if name == "ours" and slopes:
                found.setdefault((name, lr), []).append(at_k(near, mean))
            elif name != "ours" and pair:
                found.setdefault((name, lr), []).append(at_k(pair[0], slope(*pair)))
    least = min(float(np.mean(v)) for v in found.values()) if found else math.nan
    out = [
        "| trainer | lr | seeds | FVU at L0 = 32 | over the best | L0 of the runs "
        "| their dead | FVU with all thresholds shifted | CPU s a run |\n"
        "|---|---|---|---|---|---|---|---|---|"
    ]
    for (name, lr), by in groups.items():
        rs = [r for one in by.values() for r in one]
        fvu = found.get((name, lr))
        cells = [name, f"{lr:g}", str(len(by))]
        cells += (
            [f"{np.mean(fvu):.4f} ± {np.std(fvu):.4f}", f"{np.mean(fvu) / least - 1:+.1%}"]
            if fvu
            else ["not bracketed", ""]
        )
        cells += [" ".join(f"{r['l0_own']:.0f}" for r in rs)]
        cells += [" ".join(f"{r['dead']:.1%}" for r in rs)]
        near = [min(one, key=lambda r: abs(math.log(r["l0_own"] / K))) for one in by.values()]
        cells += [f"{np.mean([r['fvu'] for r in near]):.4f}"]
        cells += [f"{np.mean([r['seconds'] for r in rs]):.0f}"]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + f"\n\nd log FVU / d log L0 of the peers: {mean:.2f}\n"


def main() -> None:
    """Train until L0 = k is bracketed, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=["ours", "sae-lens", "dictionary_learning"])
    parser.add_argument("--out", type=Path, default=Path("jumprelu.jsonl"))
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table(args.table.read_text().splitlines()))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = [args.data / f"{half}.npy" for half in ("train", "validation")]
    tokens, held = (torch.from_numpy(np.load(file, mmap_mode="r")) for file in files)
    width = tokens.shape[1]
    setting = Setting(
        width=width,
        latents=args.expansion * width,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        mean=tokens.mean(0),
    )
    makers = _makers()
    start = {name: makers[name][1] for name in args.only}
    for seed in args.seeds:
        for name in args.only:
            runs: list[dict[str, Any]] = []
            coefficient = start[name]
            while len(runs) < TRIES and bracketed(runs) is None:
                one, seconds = train(makers[name][0](coefficient), setting, tokens, seed)
                run = {"name": name, "seed": seed, "lr": args.lr, "coefficient": coefficient}
                run |= {"steps": args.steps, "batch": args.batch, "seconds": seconds}
                run |= measure(one, "JumpReLU", held)
                runs.append(run)
                with args.out.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                if name == "ours":
                    break
                start[name] = coefficient  # the next seed begins where this one ended
                coefficient *= RATIO if run["l0_own"] >= K else 1 / RATIO


if __name__ == "__main__":
    main()
