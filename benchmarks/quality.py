"""Held-out FVU at equal k, steps, batches and learning rate, beside the peers' own training steps.

    python benchmarks/quality.py --export STORE --site blocks.7.resid_post --data tokens.npz
    PYTHONPATH=. PEERS/bin/python benchmarks/quality.py --data tokens.npz

The first command writes shuffled training tokens and held-out tokens of a store, in units of the
mean channel variance. The second trains every contestant on the same batches in the same order,
Adam at a constant learning rate, and prints FVU and L0 on the held-out tokens under the inference
rule.
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

K, EXPANSION = 32, 8
Make = Callable[[int, int, float, torch.Tensor], tuple[Callable, Callable]]


def export(url: str, site: str, path: Path, tokens: int) -> None:
    """Write shuffled training tokens and held-out tokens of a store."""
    import actstore
    from actstore.reader import batches
    from actstore.selection import Split

    store = actstore.open(url)
    parts = {}
    for half, limit in (("train", tokens), ("validation", tokens // 10)):
        rows = []
        items = Split(half=half, holdout=0.1)
        for batch in batches(store, site, 4096, tokens="patch", items=items, dtype="float32"):
            rows.append(np.array(batch.acts))
            if sum(map(len, rows)) >= limit:
                break
        parts[half] = np.concatenate(rows)
    factor = float(parts["train"].var(0).mean()) ** -0.5
    np.savez(path, **{k: (v * factor).astype(np.float32) for k, v in parts.items()})


def ours(sparsify: str) -> Make:
    """Our learner with one of our strategies."""

    def make(d: int, latents: int, lr: float, mean: torch.Tensor) -> tuple[Callable, Callable]:
        from dictlearn import config
        from dictlearn.dictionary import Dictionary
        from dictlearn.learner import Learner
        from dictlearn.schedule import TrainConfig

        d_ = Dictionary({"a": d}, latents=latents, sparsify=getattr(config, sparsify)(K))
        with torch.no_grad():
            d_.b_dec.copy_(mean)
        train = TrainConfig(steps=10**6, lr=lr, warmup=0, decay=0, dead_after=10**7)
        learner = Learner(name="ours", dictionary=d_, config=train, backend="onednn")
        number = 0

        def step(x: torch.Tensor) -> None:
            nonlocal number
            learner.train_step(x, x, number)
            number += 1

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            acts = d_.encode(x)
            return acts, d_.decode(acts)

        return step, run

    return make


def sparsify(d: int, latents: int, lr: float, mean: torch.Tensor) -> tuple[Callable, Callable]:
    """EleutherAI's sparsify, with its trainer's steps."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(d, SparseCoderConfig(num_latents=latents, k=K))
    sae.b_dec.data = mean.clone()
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)

    def step(x: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = sae(x)
        return out.latent_acts, out.sae_out

    return step, run


def dictionary_learning(which: str) -> Make:
    """dictionary_learning's trainers (they start b_dec at the geometric median themselves)."""

    def make(d: int, latents: int, lr: float, mean: torch.Tensor) -> tuple[Callable, Callable]:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        kind = {"TopK": TopKTrainer, "BatchTopK": BatchTopKTrainer}[which]
        trainer = kind(
            steps=10**6,
            activation_dim=d,
            dict_size=latents,
            k=K,
            layer=0,
            lm_name="",
            device="cpu",
            lr=lr,
            warmup_steps=0,
            threshold_start_step=0,
        )
        number = 0

        def step(x: torch.Tensor) -> None:
            nonlocal number
            trainer.update(number, x)
            number += 1

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            acts = trainer.ae.encode(x)
            return acts, trainer.ae.decode(acts)

        return step, run

    return make


def sae_lens(which: str) -> Make:
    """SAELens's training classes, with its trainer's steps."""

    def make(d: int, latents: int, lr: float, mean: torch.Tensor) -> tuple[Callable, Callable]:
        import sae_lens as lens
        from sae_lens.saes.sae import TrainStepInput

        config = getattr(lens, f"{which}TrainingSAEConfig")(d_in=d, d_sae=latents, k=K)
        sae = getattr(lens, f"{which}TrainingSAE")(config)
        sae.b_dec.data = mean.clone()
        sae.train()
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        none = torch.zeros(latents, dtype=torch.bool)

        def step(x: torch.Tensor) -> None:
            given = TrainStepInput(
                sae_in=x,
                dead_neuron_mask=none,
                coefficients={},
                n_training_steps=0,
                is_logging_step=False,
            )
            sae.training_forward_pass(step_input=given).loss.backward()
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            acts = sae.encode(x)
            return acts, sae.decode(acts)

        return step, run

    return make


CONTESTANTS: dict[str, Make] = {
    "ours TopK": ours("TopK"),
    "sparsify TopK": sparsify,
    "dictionary_learning TopK": dictionary_learning("TopK"),
    "sae-lens TopK": sae_lens("TopK"),
    "ours BatchTopK": ours("BatchTopK"),
    "dictionary_learning BatchTopK": dictionary_learning("BatchTopK"),
    "sae-lens BatchTopK": sae_lens("BatchTopK"),
}


def main() -> None:
    """Export, or train and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--export")
    parser.add_argument("--site", default="blocks.7.resid_post")
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.export:
        export(args.export, args.site, args.data, args.tokens)
        return
    warnings.simplefilter("ignore")
    with np.load(args.data) as file:
        train, held = (torch.from_numpy(file[k]) for k in ("train", "validation"))
    mean, d = train.mean(0), train.shape[1]
    spread = float((held - held.mean(0)).square().sum())
    rows = []
    print("| trainer | lr | FVU | L0 | dead | seconds |\n|---|---|---|---|---|---|")
    for name, make in CONTESTANTS.items():
        if args.only not in name:
            continue
        for lr in args.lr:
            torch.manual_seed(0)
            step, run = make(d, EXPANSION * d, lr, mean)
            start = time.perf_counter()
            for number in range(args.steps):
                at = (number * args.batch) % (len(train) - args.batch)
                step(train[at : at + args.batch].contiguous())
            seconds = time.perf_counter() - start
            error, active, fired = 0.0, 0, torch.zeros(EXPANSION * d, dtype=torch.bool)
            with torch.no_grad():
                for x in held.split(4096):
                    acts, y = run(x)
                    error += float((y - x).square().sum())
                    active += int((acts != 0).sum())
                    if acts.shape[1] == len(fired):
                        fired |= (acts != 0).any(0)
            dead = 1 - float(fired.float().mean()) if fired.any() else float("nan")
            row = {"name": name, "lr": lr, "fvu": error / spread, "l0": active / len(held)}
            rows.append({**row, "dead": dead, "seconds": seconds})
            numbers = f"{row['fvu']:.4f} | {row['l0']:.1f} | {dead:.1%} | {seconds:.0f}"
            print(f"| {name} | {lr:g} | {numbers} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
