"""How sparse CLS and patches are by depth, and what splicing costs, on a store of many layers.

    python benchmarks/findings.py --store STORE --weights FILE --out findings.jsonl
    python benchmarks/findings.py --table findings.jsonl > docs/results/vit-s.md

1. One BatchTopK dictionary a layer over CLS and patches together: the L0 of each kind is free.
2. ReLU dictionaries with one L1 coefficient (the squared error in units of each site's own
   variance) on CLS alone and on patches alone: both L0 and FVU are free.
3. TopK dictionaries of several k on CLS alone and on patches alone: FVU against L0.
4. The dictionaries of 1, spliced, by a linear probe on the last layer fitted on items not
   evaluated: cross-entropy clean, spliced, zero- and mean-ablated.

Each stage is one pass over the store (`dictlearn.sweep`); lines are appended, stages done are
skipped.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SEED_SPLIT = {"holdout": 0.1, "split_seed": 0}


def stages(sites: dict[str, int], steps: int, batch: int) -> dict[str, tuple[str, list[Any]]]:
    """Candidates of every stage by name, with the kinds of tokens they read."""
    from dictlearn.config import BatchTopK, ReLU, TopK
    from dictlearn.sweep import Candidate

    def every(rules: Iterable[Any], expansion: int, which: Iterable[str]) -> list[Any]:
        return [
            Candidate(reads={s: sites[s]}, latents=expansion * sites[s], sparsify=rule)
            for s in which
            for rule in rules
        ]

    names = list(sites)
    some = names[1::2]
    out: dict[str, tuple[str, list[Any]]] = {
        "joint": ("cls,patch", every([BatchTopK(32)], 8, names))
    }
    for kind in ("cls", "patch"):
        out[f"l1 {kind}"] = (kind, every([ReLU(l1=3e-3)], 2, names))
    for kind in ("cls", "patch"):
        out[f"topk {kind}"] = (kind, every([TopK(8), TopK(32), TopK(128)], 2, some))
    return out


def run(args: argparse.Namespace) -> None:
    """Run what is not there yet."""
    import actstore
    from dictlearn.schedule import TrainConfig
    from dictlearn.sweep import sweep

    store = actstore.open(args.store)
    sites = {s: store.spec(s, store.kinds(s)[0]).channels for s in store.sites}
    done = _lines(args.out)
    there = {row["stage"] for row in done}
    if "spliced" not in there and "joint" in there and args.weights:
        _append(args.out, _spliced(args, store))
    for stage, (tokens, candidates) in stages(sites, args.steps, args.batch).items():
        if stage in there:
            continue
        config = TrainConfig(
            steps=args.steps, batch_size=args.batch, tokens=tokens, lr=2e-3,
            checkpoint_every=100, log_every=25, **SEED_SPLIT,
        )  # fmt: skip
        folder = args.work / stage.replace(" ", "-")
        table = sweep(store, candidates, config, out=folder, limit=100_000)
        rows = [{"stage": stage, **row} for row in table.to_pylist()]
        _append(args.out, rows)
        if stage == "joint" and args.weights:
            _append(args.out, _spliced(args, store))


def _spliced(args: argparse.Namespace, store: Any) -> list[dict[str, Any]]:
    from actstore.selection import Split
    from dictlearn.evaluation import evaluate
    from dictlearn.formats import load
    from dictlearn.heads import fit_probe
    from dictlearn.substitution import store_model

    half = Split(half="validation", holdout=SEED_SPLIT["holdout"], seed=0)
    model = store_model(store, args.weights)
    probe = fit_probe(store, items=Split(half="train", holdout=SEED_SPLIT["holdout"], seed=0))
    rows = []
    order = list(store.sites)
    found = [load(p.parent) for p in (args.work / "joint").glob("*/config.json")]
    found.sort(key=lambda d: order.index(next(iter(d.config.reads))))
    for d in found[1::2]:  # every other layer is enough: five forward passes an image and row
        for tokens in ("cls", "patch"):
            report = evaluate(
                d, store, tokens=tokens, items=half, limit=4096, model=model, heads=[probe],
                images=args.images,
            )  # fmt: skip
            s = report.substitution
            row = {"stage": "spliced", "reads": report.reads[0], "tokens": tokens}
            row |= {"probe": probe.name, "images": s.images, "fvu": report.fvu}
            row |= {f"ce_{k}": v for k, v in s.ce.items()}
            row |= {f"top1_{k}": v for k, v in s.top1.items()}
            rows.append(row)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    return rows


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a section a stage."""
    columns = {
        "joint": ["reads", "l0", "l0_cls", "l0_patch", "fvu", "fvu_cls", "fvu_patch", "dead"],
        "l1": ["reads", "l0", "fvu", "dead"],
        "topk": ["reads", "l0", "fvu", "dead"],
        "spliced": ["reads", "tokens", "fvu", "ce_clean", "ce_error", "ce_spliced", "ce_zero",
                    "ce_mean", "top1_clean", "top1_spliced"],
    }  # fmt: skip

    def text(value: Any) -> str:
        return (
            f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "")
        )

    out = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        keys = [k for k in columns[stage.split()[0]] if any(row.get(k) is not None for row in mine)]
        out += [f"\n## {stage}\n", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        out += ["| " + " | ".join(text(row.get(k)) for k in keys) + " |" for row in mine]
    return "\n".join(out) + "\n"


def main() -> None:
    """Run, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store")
    parser.add_argument("--weights")
    parser.add_argument("--work", type=Path, default=Path("findings"))
    parser.add_argument("--out", type=Path, default=Path("findings.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        sys.stdout.write(table(_lines(args.table)))
        return
    run(args)


if __name__ == "__main__":
    main()
