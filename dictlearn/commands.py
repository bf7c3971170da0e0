"""What the subcommands of ``dictlearn`` do, with progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dictlearn.config import Matryoshka, Sparsify, sparsify_from_json
from dictlearn.dictionary import Dictionary
from dictlearn.runfile import default_names, described_in
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import TrainEvent, train

if TYPE_CHECKING:
    from actstore.aligned import Aligned
    from actstore.store import Store
    from dictlearn.cli import SparsityOf, Train


def progress_bars(console: Console) -> Progress:
    """Return the bars of a command, each with a note."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def device_of(name: str) -> str:
    """Return the device an option names; ``auto`` takes the best there is."""
    from actstore.harvester import choose_device

    return choose_device(name)


def shown_by(progress: Progress, bar: TaskID) -> Callable[[TrainEvent], None]:
    """Return a callback that draws the events of a training run."""

    def show(event: TrainEvent) -> None:
        if event.message:
            progress.console.print(event.message)
        note = ""
        if event.kind == "log" and event.metrics:
            worst = max(m["fvu"] for m in event.metrics.values())
            l0 = sum(m["l0"] for m in event.metrics.values()) / len(event.metrics)
            dead = sum(m["dead"] for m in event.metrics.values()) / len(event.metrics)
            note = (
                f"FVU <= {worst:.4f}  L0 {l0:.1f}  dead {dead:.1%}  "
                f"{event.tokens_per_second:,.0f} tokens/s  waiting {event.data_wait:.1%}"
            )
            progress.update(bar, completed=event.step, note=note)
        else:
            progress.update(bar, completed=event.step)

    return show


def train_with_progress(config: Train) -> int:
    """Run ``dictlearn train``."""
    from actstore.aligned import open_aligned
    from dictlearn.distributed import Ranks, start_from_environment

    device = device_of(config.device)
    start_from_environment(device)
    console = Console(quiet=bool(Ranks.current().rank))
    store = open_aligned(config.store, **config.opening)
    dictionaries, configs, names = plan(config, store)
    for name, d in zip(names, dictionaries, strict=True):
        console.print(f"{name}: {d.config.d_read} -> {d.latents} latents, {d.config.sparsify}")
    with progress_bars(console) as progress:
        bar = progress.add_task("train", total=configs[0].steps, note="")

        done = train(
            store,
            dictionaries,
            configs,
            out=config.out,
            names=names,
            device=device,
            on_event=shown_by(progress, bar),
            log_to=config.log_to,
        )
    table = Table("dictionary", "L0", "FVU", "dead")
    table.add_column("where", overflow="fold")
    for one in done:
        m = one.metrics
        numbers = [f"{m['l0']:.1f}", f"{m['fvu']:.4f}", f"{m['dead']:.1%}"] if m else ["", "", ""]
        table.add_row(one.name, *numbers, one.failed or str(one.path))
    console.print(table)
    console.print(
        f"next: dictlearn eval {config.out} --store {config.store}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return int(any(one.failed for one in done))


def plan(
    config: Train, store: Store | Aligned
) -> tuple[list[Dictionary], list[TrainConfig], list[str]]:
    """Return the dictionaries a command asks for, their configurations and names."""
    if config.config is not None:
        return _from_run(config.config)
    from vitmodels.spec import expand_sites

    reads = expand_sites(config.sites, store.sites)
    writes = expand_sites(config.writes, store.sites) if config.writes else None
    wirings: list[tuple[Sequence[str], Sequence[str]]]
    if writes is not None:
        wirings = [(reads, writes)]
    elif config.together:
        wirings = [(reads, reads)]
    else:
        wirings = [([site], [site]) for site in reads]
    dictionaries = []
    for read, write in wirings:
        inputs = {s: _width(store, s) for s in read}
        dictionaries.append(
            Dictionary(
                inputs,
                {s: _width(store, s) for s in write},
                latents=config.latents or config.expansion * sum(inputs.values()),
                sparsify=_sparsify(config),
                skip=config.skip,
                matryoshka=Matryoshka(prefixes=config.prefixes) if config.prefixes else None,
                seed=config.train.seed,
            )
        )
    return dictionaries, [config.train] * len(dictionaries), default_names(dictionaries)


def _sparsify(config: Train) -> Sparsify:
    given = {"k": config.k, "l1": config.l1, "l0": config.l0}
    takes = {"TopK": "k", "BatchTopK": "k", "ReLU": "l1", "Gated": "l1", "JumpReLU": "l0"}
    mine = takes[config.kind]
    if extra := [name for name, value in given.items() if value is not None and name != mine]:
        raise ValueError(f"--kind {config.kind} takes --{mine}, not --{extra[0]}")
    if given[mine] is None:
        given[mine] = {"k": 32, "l1": 1e-3, "l0": 1e-3}[mine]
    return sparsify_from_json({"kind": config.kind, mine: given[mine]})


def _from_run(path: Path) -> tuple[list[Dictionary], list[TrainConfig], list[str]]:
    file = path / "run.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; a run's folder holds run.json")
    described, configs = described_in(file)
    dictionaries = [
        Dictionary.from_config(d, seed=c.seed)
        for d, c in zip(described.values(), configs, strict=True)
    ]
    return dictionaries, configs, list(described)


def _width(store: Store | Aligned, site: str) -> int:
    return store.spec(site, store.kinds(site)[0]).channels


def print_sparsity(config: SparsityOf) -> int:
    """Run ``dictlearn sparsity``."""
    import actstore
    from dictlearn.analysis import sparsity
    from dictlearn.formats import load

    found = sparsity(
        actstore.open(config.store), load(config.dictionary), tokens=config.tokens, top=config.top
    )
    folder = found.save(config.out)
    console = Console()
    table = Table("tokens", "number", "L0")
    for kind, count in zip(found.kinds, found.tokens, strict=True):
        table.add_row(kind, f"{count:,}", f"{found.l0_by_kind[kind]:.2f}")
    console.print(table)
    console.print(f"dead latents {found.dead:.1%}; tables in {folder}", highlight=False)
    return 0
