"""Dictionaries over every toy model, trained by sweeps, with one table of results.

    python benchmarks/sweep_toys.py --work FOLDER --out docs/results/toys.md

For each of the eight toys: one store of all layers, then three passes over it (CLS, patches, both),
each training an SAE on every layer's resid_post and on every mlp_out. The passes over CLS alone and
over patches alone also train ReLU SAEs with one L1 coefficient, whose L0 is free; the pass over
both a transcoder over every MLP, a crosscoder over all layers, and BatchTopK SAEs on every layer's
resid_post, whose L0 of CLS and of patches is free to differ. Evaluation is on held-out digits, with
the model's own head. A toy that is done is not trained again.
"""

import argparse
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import actstore
import vitmodels
from dictlearn.config import BatchTopK, ReLU, TopK
from dictlearn.schedule import TrainConfig
from dictlearn.sweep import Candidate, markdown, sweep

TOYS = [f"toy/digits-{n}l{kind}" for n in (1, 2, 3, 4) for kind in ("", "-attn")]
WIDTH, LATENTS, K = 64, 512, 8
FREE = ReLU(l1=1e-2)
"""Its L0 is what the data give: the penalty is in units of each site's own variance."""
COLUMNS = ["model", "tokens", "reads", "writes", "kind", "l0_cls", "l0_patch", "fvu", "dead"]
COLUMNS += ["ce_clean", "ce_spliced", "ce_zero", "ce_mean", "top1_clean", "top1_spliced"]


def candidates(layers: int, attention_only: bool, tokens: str) -> list[Candidate]:
    """Everything one pass trains."""
    resid = [f"blocks.{i}.resid_post" for i in range(layers)]
    out = [Candidate(reads={s: WIDTH}, latents=LATENTS, sparsify=TopK(K)) for s in resid]
    outs = [] if attention_only else [f"blocks.{i}.mlp_out" for i in range(layers)]
    out += [Candidate(reads={s: WIDTH}, latents=LATENTS, sparsify=TopK(K)) for s in outs]
    if tokens != "cls,patch":
        return out + [Candidate(reads={s: WIDTH}, latents=LATENTS, sparsify=FREE) for s in resid]
    out += [Candidate(reads={s: WIDTH}, latents=LATENTS, sparsify=BatchTopK(K)) for s in resid]
    if layers > 1:
        every = dict.fromkeys(resid, WIDTH)
        out.append(Candidate(reads=every, latents=LATENTS, sparsify=TopK(K)))
    for i, site in enumerate(outs):
        read, write = {f"blocks.{i}.mlp_in": WIDTH}, {site: WIDTH}
        out.append(Candidate(reads=read, writes=write, latents=LATENTS, sparsify=TopK(K)))
    return out


def main() -> None:
    """Harvest, sweep, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results/toys.md"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    rows, seconds = [], time.perf_counter()
    for toy in TOYS:
        name = toy.split("/")[1]
        layers, attention_only = int(name.split("-")[1][0]), name.endswith("attn")
        model = vitmodels.load(toy)
        sites = "blocks.*.resid_post"
        if not attention_only:
            sites += ",blocks.*.mlp_in,blocks.*.mlp_out"
        url = args.work / f"{name}.zarr"
        store = actstore.harvest(model=model, data="digits", sites=sites, out=url, device="cpu")
        for tokens in ("cls", "patch", "cls,patch"):
            config = TrainConfig(
                steps=args.steps,
                batch_size=1024,
                lr=2e-3,
                holdout=0.1,
                tokens=tokens,
                checkpoint_every=0,
                log_every=50,
            )
            chosen = candidates(layers, attention_only, tokens)
            folder = args.work / f"{name}-{tokens.replace(',', '-')}"
            ready = folder / "results.parquet"
            table = (
                pq.read_table(ready)
                if ready.is_file()
                else sweep(store, chosen, config, out=folder, model=model, images=500, limit=None)
            )
            rows += [{"model": name, "tokens": tokens, **row} for row in table.to_pylist()]
            done = time.perf_counter() - seconds
            print(f"{name} {tokens}: {len(rows)} dictionaries after {done:.0f} s", flush=True)
    seconds = time.perf_counter() - seconds
    present = {c: [row.get(c) for row in rows] for c in COLUMNS}
    text = (
        f"# Dictionaries over the toys\n\n`python benchmarks/sweep_toys.py --work FOLDER`: "
        f"{len(rows)} dictionaries ({LATENTS} latents, k = {K}, {args.steps} steps of 1,024 "
        f"tokens) in {seconds / 60:.1f} minutes on {torch.get_num_threads()} threads, harvest and "
        "evaluation on 500 digits held out from the dictionaries included. CE and top-1 replace "
        "the kinds of tokens the dictionary was trained on.\n\n"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text + markdown(pa.table(present)))


if __name__ == "__main__":
    main()
