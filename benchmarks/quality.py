"""Held-out FVU at equal L0, tokens, batches and learning-rate schedule, beside the peers.

    python benchmarks/quality.py --export STORE --site blocks.7.resid_post --data tokens
    PYTHONPATH=. PEERS/bin/python benchmarks/quality.py --data tokens --out quality.jsonl
    python benchmarks/quality.py --table quality.jsonl > docs/results/quality.md

The first command writes shuffled training tokens and held-out tokens of a store, in units of the
mean channel variance. The second trains every contestant on the same batches in the same order, by
its own initialisation, losses and constraints (`benchmarks.quality_contestants`), and appends a
line for each run, so that it can be stopped and goes on where it was; what is not installed is
skipped, so that it can be run in several environments. The third makes the table.

The learning rate rises over 5 % of the steps and falls to 0 over the last 20 % for everyone, with
Adam. L0 is made equal by the same rule for everyone: TopK keeps the k largest pre-activations of a
token, the others the k * B largest of (pre-activation - threshold) in a batch of B = 4,096 held-out
tokens; ``l0_own`` is what the thresholds found in training give. Dead: never active on held-out
tokens.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

K, BATCH = 32, 4096


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a contestant is given."""

    width: int
    latents: int
    steps: int
    batch: int
    lr: float
    mean: torch.Tensor

    def factor(self, step: int) -> float:
        """Learning rate of a step over the peak."""
        rise, fall = round(0.05 * self.steps), round(0.2 * self.steps)
        return min((step + 1) / rise, 1.0) * min((self.steps - step) / fall, 1.0)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A trainer as three functions, and the threshold it found."""

    step: Callable[[torch.Tensor, int], None]
    """Take a step on a batch."""
    pre: Callable[[torch.Tensor], torch.Tensor]
    """Pre-activations."""
    decode: Callable[[torch.Tensor], torch.Tensor]
    """Output for dense activations."""
    theta: Callable[[], torch.Tensor | float | None] = lambda: None
    """Threshold of inference, one or a latent; None where there is none."""
    finish: Callable[[list[torch.Tensor]], None] = lambda batches: None
    """What a trainer does after the last step, with batches that follow."""


Make = Callable[[Setting], Contestant]


def export(url: str, site: str, path: Path, tokens: int) -> None:
    """Write shuffled training tokens and held-out tokens of a store."""
    import actstore
    from actstore.reader import batches
    from actstore.selection import Split

    store = actstore.open(url)
    parts = {}
    for half, limit in (("train", tokens), ("validation", tokens // 10)):
        rows: list[np.ndarray] = []
        items = Split(half=half, holdout=0.1)
        for batch in batches(store, site, 4096, tokens="patch", items=items, dtype="float32"):
            rows.append(np.array(batch.acts))
            if sum(map(len, rows)) >= limit:
                break
        parts[half] = np.concatenate(rows)
    factor = float(parts["train"].var(0).mean()) ** -0.5
    path.mkdir(parents=True, exist_ok=True)
    for half, rows_ in parts.items():
        np.save(path / f"{half}.npy", (rows_ * factor).astype(np.float32))
    sys.stdout.write(f"{path}: {', '.join(f'{k} {v.shape}' for k, v in parts.items())}\n")


def exported(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return training and held-out tokens that `export` wrote, for runs on one quiet thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = [path / f"{half}.npy" for half in ("train", "validation")]
    tokens, held = (torch.from_numpy(np.load(file, mmap_mode="r")) for file in files)
    return tokens, held


@torch.no_grad()
def measure(one: Contestant, kind: str, held: torch.Tensor) -> dict[str, Any]:
    """FVU at L0 = k, dead share, and L0 and FVU under the thresholds found in training."""
    theta = one.theta()
    error = error_own = 0.0
    active = active_own = 0
    fired = torch.zeros(one.pre(held[:1]).shape[1], dtype=torch.bool)
    for x in held.split(BATCH):
        pre = one.pre(x)
        acts = torch.zeros_like(pre)
        if kind == "TopK":
            top = pre.topk(K, dim=1)
            acts.scatter_(1, top.indices, top.values.relu())
        else:
            over = torch.where(pre > 0, pre - (0.0 if theta is None else theta), -torch.inf)
            least = over.flatten().topk(K * len(x)).values[-1]
            acts = torch.where((over >= least) & (over > -torch.inf), pre, 0.0)
        error += float((one.decode(acts) - x).square().sum())
        active += int((acts != 0).sum())
        fired |= (acts != 0).any(0)
        if theta is not None:
            own = torch.where((pre > theta) & (pre > 0), pre, 0.0)
            error_own += float((one.decode(own) - x).square().sum())
            active_own += int((own != 0).sum())
    spread = float((held - held.mean(0)).square().sum())
    out = {"fvu": error / spread, "l0": active / len(held), "dead": 1 - float(fired.float().mean())}
    if theta is not None:
        out |= {"fvu_own": error_own / spread, "l0_own": active_own / len(held)}
    return out


def train(
    make: Make, setting: Setting, train_: torch.Tensor, seed: int
) -> tuple[Contestant, float]:
    """Train one contestant; returns it and the seconds of CPU it took."""
    torch.manual_seed(seed)
    one = make(setting)
    order = np.random.default_rng(seed)
    at = np.zeros(0, np.int64)
    start = time.process_time()
    for number in range(setting.steps):
        if len(at) < setting.batch:  # a new epoch; the rest of the last one is left out
            at = order.permutation(len(train_))
        chosen, at = at[: setting.batch], at[setting.batch :]
        one.step(train_[torch.from_numpy(chosen)], number)
    after = [torch.from_numpy(order.choice(len(train_), setting.batch)) for _ in range(8)]
    one.finish([train_[index] for index in after])
    return one, time.process_time() - start


def table(lines: Iterable[str]) -> str:
    """Mean and standard deviation over seeds, at the best learning rate of each contestant."""
    rows = [json.loads(line) for line in lines]
    groups = list(dict.fromkeys((r["kind"], r["latents"]) for r in rows))
    out = [
        "| kind | latents | trainer | lr | seeds | FVU at L0 = k | over the best | dead "
        "| L0 by its own threshold | CPU s |\n|---|---|---|---|---|---|---|---|---|---|"
    ]
    for kind, latents in groups:
        best: dict[str, dict[float, list[Any]]] = {}
        for r in rows:
            if (r["kind"], r["latents"]) == (kind, latents):
                best.setdefault(r["name"], {}).setdefault(r["lr"], []).append(r)
        chosen = {}
        # a rate tried with one seed only does not stand for three
        for name, by_lr in best.items():
            most = max(len(rs) for rs in by_lr.values())
            full = [rs for rs in by_lr.values() if len(rs) == most]
            chosen[name] = min(full, key=lambda rs: np.mean([r["fvu"] for r in rs]))
        least = min(float(np.mean([r["fvu"] for r in rs])) for rs in chosen.values())
        for name, rs in chosen.items():
            fvu = np.array([r["fvu"] for r in rs])
            own = [f"{np.mean([r['l0_own'] for r in rs]):.1f}"] if "l0_own" in rs[0] else [""]
            cells = [kind, str(latents), name, f"{rs[0]['lr']:g}", str(len(rs))]
            cells += [f"{fvu.mean():.4f} ± {fvu.std():.4f}", f"{fvu.mean() / least - 1:+.1%}"]
            cells += [f"{np.mean([r['dead'] for r in rs]):.1%}", *own]
            cells += [f"{np.mean([r['seconds'] for r in rs]):.0f}"]
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def main() -> None:
    """Export, train and compare, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--export")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--site", default="blocks.7.resid_post")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="contestants whose 'kind name' starts so")
    parser.add_argument("--out", type=Path, default=Path("quality.jsonl"))
    args = parser.parse_args()
    if args.table:
        sys.stdout.write(table(args.table.read_text().splitlines()))
        return
    if args.export:
        export(args.export, args.site, args.data, args.tokens)
        return
    from benchmarks.quality_contestants import CONTESTANTS

    tokens, held = exported(args.data)
    width = tokens.shape[1]
    done = (
        [json.loads(line) for line in args.out.read_text().splitlines()]
        if args.out.exists()
        else []
    )
    keys = ("kind", "name", "seed", "lr", "steps", "batch", "latents")
    for seed in args.seeds:
        for (kind, name), make in CONTESTANTS.items():
            for lr in args.lr:
                run = {"kind": kind, "name": name, "seed": seed, "lr": lr}
                run |= {"steps": args.steps, "batch": args.batch}
                run |= {"latents": args.expansion * width}
                if not f"{kind} {name}".startswith(args.only) or any(
                    all(r[k] == run[k] for k in keys) for r in done
                ):
                    continue
                setting = Setting(
                    width=width,
                    latents=args.expansion * width,
                    steps=args.steps,
                    batch=args.batch,
                    lr=lr,
                    mean=tokens.mean(0),
                )
                try:
                    one, seconds = train(make, setting, tokens, seed)
                except ModuleNotFoundError as error:
                    sys.stdout.write(f"skipped {kind} {name}: {error}\n")
                    continue
                run |= measure(one, kind, held) | {"seconds": seconds}
                with args.out.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                sys.stdout.write(json.dumps(run) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
