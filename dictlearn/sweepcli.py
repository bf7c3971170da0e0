"""The command ``dictlearn sweep``: many dictionaries from one pass, a table, a Pareto plot."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from actstore.place import CachedPlace
from dictlearn.schedule import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(CachedPlace):
    """Train every combination of the options from one pass over a store and compare them.

    Writes results.parquet, results.md and pareto.png (FVU against L0) into --out. A dictionary
    whose loss is not finite is stopped and reported; the others go on. The same command resumes.
    """

    store: tyro.conf.Positional[str]
    """The store; or NAME=STORE,NAME=STORE of the same items, whose sites are then NAME.site."""
    out: Path
    """Folder of the run: log, checkpoints, dictionaries, results."""
    grid: Path | None = None
    """A TOML or JSON file of what to train (dictlearn.gridfile), instead of the options up to
    --skip; its table [train] overrides the training options given here."""
    sites: str | None = None
    """Sites or patterns; an SAE for each unless --together; all by default."""
    reads: str | None = None
    """Sites or patterns read by one dictionary, instead of --sites."""
    writes: str | None = None
    """Sites or patterns written by it: a transcoder from --reads to these."""
    together: bool = False
    """One crosscoder over all the sites."""
    kind: tuple[Literal["TopK", "BatchTopK", "ReLU", "JumpReLU", "Gated"], ...] = ()
    """Which latents are active; see dictlearn.config."""
    k: tuple[int, ...] = ()
    """Latents kept for a token (TopK, BatchTopK)."""
    l1: tuple[float, ...] = ()
    """Coefficients of the L1 penalty (ReLU, Gated)."""
    l0: tuple[float, ...] = ()
    """Coefficients of the penalty of JumpReLU."""
    expansion: tuple[int, ...] = ()
    """Latents for each channel read; 8 by default."""
    latents: tuple[int, ...] = ()
    """Numbers of latents, instead of --expansion."""
    seeds: tuple[int, ...] = ()
    """Of the initial weights; the order of the batches is that of --seed for all."""
    lrs: tuple[float, ...] = ()
    """Peak learning rates."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka prefixes of every dictionary; the full width is always one."""
    skip: bool = False
    """Add a linear path past the latents."""
    dry_run: bool = False
    """Only list what would be trained."""
    workers: int | None = None
    """Threads that share the dictionaries; by default one a core on CPU."""
    model: bool = False
    """Also measure the substitution loss with the model the store names."""
    weights: str | None = None
    """Local weights of that model."""
    images: int = 500
    """Images of the substitution loss."""
    limit: int | None = 200_000
    """Tokens of the evaluation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    log_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Trackers besides log.jsonl and TensorBoard."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=TrainConfig
    )
    """How to train."""


_CHOICES = {
    "kind": "kind",
    "k": "k",
    "l1": "l1",
    "l0": "l0",
    "expansion": "expansion",
    "latents": "latents",
    "seeds": "seed",
    "lrs": "lr",
}
_WHOLE = ("sites", "reads", "writes", "together", "prefixes", "skip")


def tables_of(config: Sweep) -> tuple[list[dict[str, Any]], TrainConfig]:
    """Return the tables of `dictlearn.gridfile` that a command asks for, and its training.

    Raises
    ------
    ValueError
        Options of the grid beside a grid file, or a bad file.
    """
    from dictlearn.gridfile import read_grid

    table: dict[str, Any] = {
        key: list(getattr(config, name)) for name, key in _CHOICES.items() if getattr(config, name)
    }
    table |= {name: getattr(config, name) for name in _WHOLE if getattr(config, name)}
    if config.grid is None:
        if "sites" not in table and "reads" not in table:
            table["sites"] = "*"
        return [table], config.train
    if table:
        raise ValueError(
            f"--grid {config.grid} says what to train; leave out {', '.join(sorted(table))}"
        )
    tables, training = read_grid(config.grid)
    try:
        merged = TrainConfig.from_json(config.train.to_json() | training)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config.grid}, table train: {error}") from error
    return [dict(t) for t in tables], merged


def sweep_with_progress(config: Sweep) -> int:
    """Run ``dictlearn sweep``; 1 when a dictionary failed."""
    from rich.console import Console

    from actstore.aligned import open_aligned
    from dictlearn.commands import device_of, progress_bars, shown_by
    from dictlearn.distributed import Ranks, start_from_environment
    from dictlearn.gridfile import candidates
    from dictlearn.sweep import markdown, sweep

    store = open_aligned(config.store, **config.opening)
    tables, training = tables_of(config)
    chosen = candidates(tables, store)
    device = device_of(config.device)
    start_from_environment(device)
    console = Console(quiet=bool(Ranks.current().rank))
    for one in chosen:
        console.print(one.name, highlight=False, soft_wrap=True)
    console.print(f"{len(chosen)} dictionaries from one pass of {training.steps} steps")
    if config.dry_run:
        return 0
    one_process = device == "cpu" and Ranks.current().world == 1
    workers = min(len(chosen), os.cpu_count() or 1) if one_process else 1
    workers = workers if config.workers is None else config.workers
    model = _model(config, store) if config.model else None
    with progress_bars(console) as progress:
        bar = progress.add_task("train", total=training.steps, note="")
        table = sweep(
            store,
            chosen,
            training,
            out=config.out,
            model=model,
            images=config.images,
            limit=config.limit,
            device=device,
            on_event=shown_by(progress, bar),
            workers=workers,
            log_to=config.log_to,
        )
    console.print(markdown(table), markup=False, highlight=False, soft_wrap=True)
    console.print(f"results.parquet, results.md, pareto.png in {config.out}", soft_wrap=True)
    failed = [row["failed"] for row in table.to_pylist() if row["failed"]]
    for message in failed:
        console.print(f"failed: {message}", markup=False, soft_wrap=True)
    return int(bool(failed))


def _model(config: Sweep, store: Any) -> Any:
    import vitmodels

    described = store.manifest.model
    if described is None:
        raise ValueError(f"{store.url} was not harvested from a model; leave --model out")
    return vitmodels.load(described["id"], weights=config.weights)
