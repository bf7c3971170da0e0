"""What the subcommands of ``dictlearn`` do, with progress bars and tables."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dictlearn.config import DictionaryConfig, Matryoshka, Sparsify, sparsify_from_json
from dictlearn.dictionary import Dictionary
from dictlearn.report import Report, markdown
from dictlearn.runfile import default_names
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import TrainEvent, train

if TYPE_CHECKING:
    from actstore.store import Store
    from dictlearn.cli import Eval, SparsityOf, Train


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console)


def _device(name: str) -> str:
    from actstore.harvester import choose_device

    return choose_device(name)


def train_with_progress(config: Train) -> int:
    """Run ``dictlearn train``."""
    import actstore
    from dictlearn.distributed import Ranks, start_from_environment

    device = _device(config.device)
    start_from_environment(device)
    console = Console(quiet=bool(Ranks.current().rank))
    store = actstore.open(config.store)
    dictionaries, configs, names = plan(config, store)
    for name, d in zip(names, dictionaries, strict=True):
        console.print(f"{name}: {d.config.d_read} -> {d.latents} latents, {d.config.sparsify}")
    with _progress(console) as progress:
        bar = progress.add_task("train", total=configs[0].steps, note="")

        def show(event: TrainEvent) -> None:
            if event.message:
                progress.console.print(event.message)
            note = ""
            if event.kind == "log" and event.metrics:
                worst = max(m["fvu"] for m in event.metrics.values())
                l0 = sum(m["l0"] for m in event.metrics.values()) / len(event.metrics)
                note = (
                    f"FVU <= {worst:.4f}  L0 {l0:.1f}  {event.tokens_per_second:,.0f} tokens/s  "
                    f"waiting {event.data_wait:.1%}"
                )
                progress.update(bar, completed=event.step, note=note)
            else:
                progress.update(bar, completed=event.step)

        done = train(
            store,
            dictionaries,
            configs,
            out=config.out,
            names=names,
            device=device,
            on_event=show,
        )
    table = Table("dictionary", "L0", "FVU", "dead", "where")
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


def plan(config: Train, store: Store) -> tuple[list[Dictionary], list[TrainConfig], list[str]]:
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
    run = json.loads(file.read_text())
    configs = [TrainConfig.from_json(c) for c in run["train"]]
    described = {n: DictionaryConfig.from_json(d) for n, d in run["dictionaries"].items()}
    dictionaries = [
        Dictionary.from_config(d, seed=c.seed)
        for d, c in zip(described.values(), configs, strict=True)
    ]
    return dictionaries, configs, list(described)


def _width(store: Store, site: str) -> int:
    return store.spec(site, store.kinds(site)[0]).channels


def _folders(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        inner = sorted(p.parent for p in path.glob("*/config.json"))
        if (path / "run.json").is_file() and inner:
            found += inner
        elif path.exists():
            found.append(path)
        else:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")])
            hint = f"; nearest in {path.parent}: {', '.join(near)}" if near else ""
            raise FileNotFoundError(f"no dictionary at {path}{hint}")
    return found


def eval_with_progress(config: Eval) -> int:
    """Run ``dictlearn eval``."""
    import actstore
    from dictlearn.evaluation import evaluate
    from dictlearn.formats import load

    console = Console()
    store = actstore.open(config.store)
    model: Any = None
    if config.model:
        import vitmodels

        described = store.manifest.model
        if described is None:
            raise ValueError(f"{store.url} was not harvested from a model; leave --model out")
        model = vitmodels.load(described["id"], weights=config.weights)
    reports: list[Report] = []
    with _progress(console) as progress:
        for folder in _folders(config.dictionaries):
            about = _about(folder)
            bar = progress.add_task(folder.name, total=None, note="")

            def show(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            trained_on = about.get("tokens")
            tokens = config.tokens or (",".join(trained_on) if trained_on else None)
            reports.append(
                evaluate(
                    load(folder),
                    store,
                    tokens=tokens,
                    items=_held_out(about, store) if config.held_out else None,
                    limit=config.limit,
                    model=model,
                    data=config.data,
                    images=config.images,
                    device=_device(config.device),
                    about={"name": folder.name, "path": str(folder)},
                    on_event=show,
                )
            )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([r.to_json() for r in reports], indent=1)
        config.out.write_text(text + "\n")
    console.print(markdown(reports), markup=False, highlight=False, soft_wrap=True)
    return 0


def _about(folder: Path) -> dict[str, Any]:
    """Return what a native dictionary says of its training; nothing for other formats."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    about = config.get("about") if config.get("format") == "dictlearn" else None
    return dict(about or {})


def _held_out(about: dict[str, Any], store: Store) -> Any:
    from actstore.selection import Split

    trained = about.get("train") or {}
    if not trained.get("holdout") or about.get("store") != store.fingerprint:
        return None
    return Split(half="validation", holdout=trained["holdout"], seed=trained["split_seed"])


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
