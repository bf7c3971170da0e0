"""Time of one training step against one encoder product, the peers, and the dense twin.

    python benchmarks/train_step.py                          ours: every kind, sparse and dense
    PYTHONPATH=. PEERS/bin/python benchmarks/train_step.py --peers     beside installed peers

A step is everything a trainer does with a batch: loss, auxiliary loss of dead latents, clipping,
decoder constraint, Adam, dead counters, and the loss read back as a number. Contestants take turns
round by round on the same batches; the unit g is one encoder product by `torch.mm` in the same
round. Numbers are medians over rounds. Peers are driven as their own trainers drive them. On a
machine that others load, the ratio of CPU times (which counts threads that wait spinning) is the
steadier one.

    python benchmarks/train_step.py --crossover              sparse and dense step by density
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from dictlearn import candidates
from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.gemm import choose_backend
from dictlearn.kernels import Step, dense_step, sparse_step
from dictlearn.learner import Learner
from dictlearn.picks import pick
from dictlearn.schedule import TrainConfig

StepFn = Callable[[torch.Tensor], float]
D, K, BATCH = 768, 32, 4096


def data(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Sparse mixtures of twice as many atoms as channels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(2 * width, width, generator=generator))
    index = torch.randint(0, 2 * width, (rows, 24), generator=generator)
    weight = torch.rand(rows, 24, generator=generator) * 4
    x = torch.nn.functional.embedding_bag(index, atoms, per_sample_weights=weight, mode="sum")
    return x + 0.05 * torch.randn(rows, width, generator=generator)


def ours(
    latents: int,
    sparsify: Sparsify,
    *,
    reads: dict[str, int] | None = None,
    writes: dict[str, int] | None = None,
    skip: bool = False,
    matryoshka: Matryoshka | None = None,
    dense: bool = False,
    backend: str = "auto",
    picker: str = "exact",
    lr: float = 4e-4,
) -> StepFn:
    """One of our learners; `dense` forces the eager twin."""
    d = Dictionary(
        reads or {"a": D},
        writes,
        latents=latents,
        sparsify=sparsify,
        skip=skip,
        matryoshka=matryoshka,
    )
    config = TrainConfig(steps=10**6, lr=lr, warmup=0, decay=0, dead_after=10**7, picker=picker)
    if backend == "auto":
        backend = choose_backend(BATCH, d.config.d_read, latents, torch.device("cpu"))
    learner = Learner(name="bench", dictionary=d, config=config, backend=backend)
    number = 0

    def step(x: torch.Tensor) -> float:
        nonlocal number
        number += 1
        result = learner.train_step(x, x[:, : d.config.d_write], number)
        return float(sum(result.losses.values()))

    if dense:
        from dictlearn import kernels

        def dense_step(x: torch.Tensor) -> float:
            kept = kernels.has_sparse_step
            kernels.has_sparse_step = lambda dictionary: False
            try:
                return step(x)
            finally:
                kernels.has_sparse_step = kept

        return dense_step
    return step


def peers(latents: int, only: list[str] | None = None) -> dict[str, StepFn]:
    """Every installed peer as its own trainer drives it, TopK 32 (saev 0.1.0 has ReLU only)."""
    found: dict[str, StepFn] = {}
    for name, make in (
        ("sparsify", _sparsify),
        ("sae-lens", _sae_lens),
        ("dictionary_learning", _dictionary_learning),
        ("overcomplete", _overcomplete),
        ("saev (ReLU)", _saev),
    ):
        if only and name not in only:
            continue
        try:
            found[name] = make(latents)
        except (ImportError, AttributeError) as error:  # absent, or at odds with what it imports
            print(f"{name} is left out, it cannot be imported here: {error}")
    return found


def _sparsify(latents: int) -> StepFn:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton kernel needs a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=latents, k=K))
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4)
    since = torch.zeros(latents, dtype=torch.long)

    def step(x: torch.Tensor) -> float:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=since > 10**7)
        loss = out.fvu + out.auxk_loss / 32
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        fired = torch.zeros(latents, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        since.add_(len(x))
        since[fired] = 0
        return float(loss.detach())

    return step


def _sae_lens(latents: int) -> StepFn:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=latents, k=K))
    sae.train()
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4)
    since = torch.zeros(latents)
    frequency = torch.zeros(latents)

    def step(x: torch.Tensor) -> float:
        out = sae.training_forward_pass(
            step_input=TrainStepInput(
                sae_in=x,
                dead_neuron_mask=since > 2500,
                coefficients={},
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        with torch.no_grad():
            firing = out.feature_acts.bool().float()
            fired = firing.sum(-2).bool()
            since.add_(1)
            since[fired] = 0
            frequency.add_(firing.sum(0))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach())

    return step


def _dictionary_learning(latents: int) -> StepFn:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10**6, activation_dim=D, dict_size=latents, k=K, layer=0, lm_name="", device="cpu"
    )
    number = 0

    def step(x: torch.Tensor) -> float:
        nonlocal number
        number += 1
        return float(trainer.update(number, x))

    return step


def _overcomplete(latents: int) -> StepFn:
    from overcomplete.sae import TopKSAE
    from overcomplete.sae.trackers import DeadCodeTracker

    sae = TopKSAE(D, nb_concepts=latents, top_k=K, device="cpu")
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4)
    tracker = DeadCodeTracker(latents, "cpu")

    def step(x: torch.Tensor) -> float:
        optimizer.zero_grad()
        _, z, x_hat = sae(x)
        loss = (x - x_hat).square().mean()
        tracker.update(z)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def _saev(latents: int) -> StepFn:
    from saev import config, nn

    sae = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=latents // D))
    optimizer = torch.optim.Adam(sae.parameters(), lr=4e-4, fused=True)

    def step(x: torch.Tensor) -> float:
        sae.normalize_w_dec()
        _, _, loss = sae(x)
        loss.loss.backward()
        sae.remove_parallel_grads()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.loss.detach())

    return step


def race(contestants: dict[str, StepFn], latents: int, rounds: int, batch: int) -> list[dict]:
    """Time the contestants in turns; return rows with seconds and multiples of g."""
    x_all = data(4 * batch, D)
    weight = torch.randn(D, latents)
    g: list[tuple[float, float]] = []
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        x = x_all[(number % 4) * batch :][:batch].contiguous()
        g.append(clocked(lambda x=x: torch.mm(x, weight)))
        for name, step in contestants.items():
            seconds[name].append(clocked(lambda x=x, step=step: step(x)))
    rows = []
    for name, values in {"one encoder product (g)": g, **seconds}.items():
        row: dict = {"name": name}
        for i, (column, unit) in enumerate((("seconds", "g"), ("cpu", "cpu_g"))):
            row[column] = statistics.median(v[i] for v in values[1:])
            row[unit] = statistics.median(
                v[i] / u[i] for v, u in zip(values[1:], g[1:], strict=True)
            )
        rows.append(row)
    return rows


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def crossover(latents: int, rounds: int, batch: int) -> None:
    """Time both steps of a ReLU dictionary at several densities, set by the encoder's bias."""
    x = data(batch, D)
    dictionary = Dictionary({"a": D}, latents=latents, sparsify=ReLU(l1=1e-3))
    pre = dictionary.pre_activations(x[:512]).detach().flatten()
    options = {"backend": choose_backend(batch, D, latents, torch.device("cpu"))}
    print(f"\nReLU, F={latents}, batch {batch}\n| L0 | L0/F | sparse / dense (wall) | CPU |")
    print("|---|---|---|---|")
    for density in (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12):
        with torch.no_grad():
            dictionary.b_enc.fill_(-float(pre[::16].quantile(1 - density)))
        times = []
        for _ in range(rounds + 1):
            one = clocked(lambda: sparse_step(dictionary, x, x, Step(max_density=1.0, **options)))
            two = clocked(lambda: dense_step(dictionary, x, x, Step(**options)))
            times.append((one[0] / two[0], one[1] / two[1]))
        wall, cpu = (statistics.median(v) for v in zip(*times[1:], strict=True))
        print(f"| {density * latents:.0f} | {density:.3f} | {wall:.2f} | {cpu:.2f} |", flush=True)


def missed(latents: int, steps: int) -> None:
    """Print how many of the true k largest the candidates miss, fresh and after training."""
    x = data(8 * BATCH, D)
    dictionary = Dictionary({"a": D}, latents=latents, sparsify=TopK(K))
    config = TrainConfig(steps=steps, lr=1e-3, picker="candidates", gemm="onednn")
    learner = Learner(name="missed", dictionary=dictionary, config=config, backend="onednn")
    for number in range(steps + 1):
        if number in (0, steps):
            for spare in (0, 4, 8, 16):
                candidates.SPARE, kept = spare, candidates.SPARE
                lost = total = 0
                for rows in x[: 2 * BATCH].split(BATCH):
                    centred = rows - dictionary.b_dec.detach()
                    exact = pick(dictionary.requires_grad_(False), centred)
                    found = pick(dictionary, centred, picker="candidates")
                    keys = [p.row * latents + p.latent for p in (exact, found)]
                    lost += int((~torch.isin(keys[0][exact.pre > 0], keys[1])).sum())
                    total += int((exact.pre > 0).sum())
                candidates.SPARE = kept
                dictionary.requires_grad_(True)
                print(f"F={latents}, step {number}, {spare} spare: missed {lost} of {total}")
        if number < steps:
            rows = x[(number % 8) * BATCH :][:BATCH]
            learner.train_step(rows, rows, number)


def kinds(latents: int) -> dict[str, StepFn]:
    """Every kind of dictionary, sparse step and dense twin."""
    half = D // 2
    wide = {"sparsify": TopK(K)}
    jump = JumpReLU(threshold=2.4, l0=1e-3, bandwidth=0.2)
    cases: dict[str, dict] = {
        "TopK": wide,
        "BatchTopK": {"sparsify": BatchTopK(K)},
        "JumpReLU": {"sparsify": jump},
        "ReLU + L1": {"sparsify": ReLU(l1=1e-3)},
        "Gated": {"sparsify": Gated(l1=1e-3)},
        "Matryoshka TopK": {
            **wide,
            "matryoshka": Matryoshka(prefixes=(latents // 16, latents // 4)),
        },
        "transcoder": {**wide, "writes": {"b": D}},
        "skip transcoder": {**wide, "writes": {"b": D}, "skip": True},
        "crosscoder": {**wide, "reads": {"a": half, "b": half}},
    }
    out: dict[str, StepFn] = {}
    for name, options in cases.items():
        out[name] = ours(latents, **options)
        out[f"{name}, dense"] = ours(latents, **options, dense=True)
    return out


def main() -> None:
    """Run what the arguments ask for and print a table; JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only", nargs="+", help="peers, by name")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--crossover", action="store_true")
    parser.add_argument("--missed", type=int, default=0, metavar="STEPS")
    parser.add_argument("--latents", type=int, nargs="+", default=[6144])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    results = {}
    for latents in args.latents:
        if args.crossover:
            crossover(latents, args.rounds, args.batch)
            continue
        if args.missed:
            missed(latents, args.missed)
            continue
        contestants = {
            "ours, MKL": ours(latents, TopK(K), backend="default"),
            "ours, oneDNN": ours(latents, TopK(K), backend="onednn"),
            "ours, candidates": ours(latents, TopK(K), backend="onednn", picker="candidates"),
        }
        if args.peers:
            contestants |= peers(latents, args.only)
        if args.kinds:
            contestants |= kinds(latents)
        rows = race(contestants, latents, args.rounds, args.batch)
        results[latents] = rows
        print(
            f"\nd={D}, F={latents}, k={K}, batch {args.batch}, {args.threads} threads, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        print("| step | seconds | g | CPU s | CPU g |\n|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['name']} | {row['seconds']:.3f} | {row['g']:.2f} | {row['cpu']:.3f} | "
                f"{row['cpu_g']:.2f} |",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
