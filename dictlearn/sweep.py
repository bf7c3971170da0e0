"""Many dictionaries from one pass over a store, and the table that compares them.

A sweep is `train` with a list: every batch is read once and given to every dictionary; one whose
loss is not finite stops alone. Afterwards each is evaluated on the held-out items, and the results
are written as ``results.parquet``, ``results.md`` and ``pareto.png``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from actstore.selection import Split
from dictlearn.config import DictionaryConfig, Input, Matryoshka, Sparsify
from dictlearn.dictionary import Dictionary
from dictlearn.distributed import Ranks
from dictlearn.evaluation import evaluate
from dictlearn.report import Report
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import Trained, TrainEvent, train

if TYPE_CHECKING:
    from actstore.aligned import Aligned
    from actstore.store import Store


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One dictionary of a sweep."""

    reads: Mapping[str, int]
    """Sites read and their widths."""
    writes: Mapping[str, int] | None = None
    """Sites written; those read by default."""
    latents: int
    """F."""
    sparsify: Sparsify
    """Which latents are active."""
    skip: bool = False
    """Linear path past the latents."""
    matryoshka: Matryoshka | None = None
    """Prefixes of the training loss."""
    seed: int = 0
    """Of the initial weights."""
    lr: float | None = None
    """Peak learning rate, instead of the configuration's."""

    @property
    def name(self) -> str:
        """Folder name: wiring, kind, its size, width, seed."""
        reads, writes = list(self.reads), list(self.writes or self.reads)
        wiring = "+".join(reads) if reads == writes else f"{'+'.join(reads)}-to-{'+'.join(writes)}"
        if len(wiring) > 80:
            wiring = f"{reads[0]}..{writes[-1]}-{len(set(reads + writes))}-sites"
        parts = [wiring, type(self.sparsify).__name__, *_settings(self.sparsify)]
        parts += [f"F{self.latents}"]
        parts += ["skip"] if self.skip else []
        if self.matryoshka:
            parts += ["matryoshka" + ".".join(map(str, self.matryoshka.prefixes))]
        parts += [f"lr{self.lr:g}"] if self.lr else []
        return "-".join([*parts, f"s{self.seed}"])

    def config(self) -> DictionaryConfig:
        """Return the description of the dictionary; refuses what does not fit."""
        writes = self.reads if self.writes is None else self.writes
        same = list(self.reads.items()) == list(writes.items())
        return DictionaryConfig(
            reads=dict(self.reads),
            writes=dict(writes),
            latents=self.latents,
            sparsify=self.sparsify,
            skip=self.skip,
            input=Input(center="b_dec" if same else "b_in"),
            matryoshka=self.matryoshka,
        )

    def build(self) -> Dictionary:
        """Return the dictionary, untrained."""
        return Dictionary(
            self.reads,
            self.writes,
            latents=self.latents,
            sparsify=self.sparsify,
            skip=self.skip,
            matryoshka=self.matryoshka,
            seed=self.seed,
        )


def _settings(sparsify: Sparsify) -> list[str]:
    """Words for a folder name: what sets the sparsity, then every field that is not the default."""
    values = {f.name: getattr(sparsify, f.name) for f in fields(sparsify)}
    main = next(name for name in ("k", "l0", "l1") if values.get(name) is not None)
    others = [f for f in fields(sparsify) if f.name != main and values[f.name] != f.default]
    return [f"{name}{_short(values[name])}" for name in (main, *(f.name for f in others))]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def grid(
    wirings: Sequence[tuple[Mapping[str, int], Mapping[str, int] | None]],
    sparsify: Sequence[Sparsify],
    *,
    expansions: Sequence[int] = (8,),
    seeds: Sequence[int] = (0,),
    lrs: Sequence[float | None] = (None,),
) -> list[Candidate]:
    """Every combination of wirings (reads, writes), strategies, widths, seeds and rates."""
    return [
        Candidate(
            reads=reads,
            writes=writes,
            latents=expansion * max(reads.values()),
            sparsify=kind,
            seed=seed,
            lr=lr,
        )
        for (reads, writes), kind, expansion, seed, lr in itertools.product(
            wirings, sparsify, expansions, seeds, lrs
        )
    ]


def sweep(
    store: Store | Aligned,
    candidates: Sequence[Candidate],
    config: TrainConfig,
    *,
    out: str | Path,
    model: Any = None,
    images: int | None = 500,
    limit: int | None = 200_000,
    device: str | torch.device = "cpu",
    on_event: Callable[[TrainEvent], None] | None = None,
    workers: int = 1,
    log_to: Sequence[str] = (),
) -> pa.Table:
    """Train all candidates in one pass, evaluate each, write the tables; returns the results.

    Parameters
    ----------
    store
        Holds every site.
    candidates
        What to train; see `grid`.
    config
        For all; each candidate may have its own learning rate.
    out
        Folder of the run and its results; the same call goes on where it was.
    model
        For the substitution loss: a `VisionModel`, True for the one of the manifest, or None.
    images, limit
        Images of the substitution loss, tokens of the evaluation.
    device
        Where to train.
    on_event
        Called with progress.
    workers
        Threads that share the dictionaries; see `train`.
    log_to
        Trackers; see `train`.
    """
    folder, ranks = Path(out), Ranks.current()
    if not candidates:
        raise ValueError("a sweep needs at least one candidate")
    names = [c.name for c in candidates]
    if doubles := {n for n in names if names.count(n) > 1}:
        raise ValueError(f"candidates must differ, these are there twice: {sorted(doubles)}")
    configs = [replace(config, lr=c.lr) if c.lr else config for c in candidates]
    done = train(
        store,
        [c.build() for c in candidates],
        configs,
        out=folder,
        names=names,
        device=device,
        on_event=on_event,
        workers=workers,
        log_to=log_to,
    )
    if ranks.rank:
        shared: pa.Table = ranks.same(None)
        return shared
    half = Split(half="validation", holdout=config.holdout, seed=config.split_seed)
    options: dict[str, Any] = {
        "tokens": config.tokens,
        "items": half if config.holdout else None,
        "limit": limit,
        "model": model,
        "images": images,
        "device": device,
    }
    reports = [None if one.failed else _report(one, store, options) for one in done]
    table = results(candidates, done, reports)
    write_results(table, folder)
    ranks.same(table)
    return table


def _report(one: Trained, store: Store | Aligned, options: Mapping[str, Any]) -> Report:
    """Evaluate a dictionary, or read what was found before the sweep was interrupted."""
    asked = {k: repr(options[k]) for k in ("tokens", "items", "limit", "images")}
    asked["model"] = str(getattr(getattr(options["model"], "spec", None), "id", options["model"]))
    file = Path(one.path or "") / "report.json"
    if file.is_file():
        there: dict[str, Any] = json.loads(file.read_text())
        if there["store"] == store.fingerprint and there["about"].get("asked") == asked:
            return Report.from_json(there)
    about = {"name": one.name, "asked": asked}
    report = evaluate(one.dictionary, store, about=about, **options)
    temporary = file.with_suffix(".tmp")
    report.save(temporary)
    temporary.replace(file)
    return report


def results(
    candidates: Sequence[Candidate], done: Sequence[Trained], reports: Sequence[Report | None]
) -> pa.Table:
    """One row a dictionary; numbers of a failed one are null."""
    rows = []
    for candidate, one, report in zip(candidates, done, reports, strict=True):
        row: dict[str, Any] = {
            "name": one.name,
            "reads": "+".join(candidate.reads),
            "writes": "+".join(candidate.writes or candidate.reads),
            "kind": type(candidate.sparsify).__name__,
            "latents": candidate.latents,
            "seed": candidate.seed,
            "failed": one.failed,
        }
        numbers: dict[str, float] = {}
        if report is not None:
            numbers = {"l0": report.l0, "fvu": report.fvu, "cosine": report.cosine}
            numbers |= {f"l0_{kind}": value for kind, value in report.l0_by_kind.items()}
            numbers |= {"dead": report.dead, "dense": report.dense}
            if report.substitution is not None:
                s = report.substitution
                numbers |= {f"ce_{k}": v for k, v in s.ce.items()}
                numbers |= {f"top1_{k}": v for k, v in s.top1.items()}
        rows.append(row | numbers)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return pa.table({key: [row.get(key) for row in rows] for key in keys})


def write_results(table: pa.Table, folder: Path) -> None:
    """Write ``results.parquet``, ``results.md`` and ``pareto.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "results.parquet")
    (folder / "results.md").write_text(markdown(table))
    _pareto(table, folder / "pareto.png")


def markdown(table: pa.Table) -> str:
    """Return a results table as Markdown."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = table.column_names
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(text(row[c]) for c in columns) + " |" for row in table.to_pylist()]
    return "\n".join(lines) + "\n"


def _pareto(table: pa.Table, path: Path) -> None:
    """FVU against L0, one line for each wiring and kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in table.to_pylist() if row.get("fvu") is not None]
    for reads, writes, kind in dict.fromkeys((r["reads"], r["writes"], r["kind"]) for r in rows):
        mine = [r for r in rows if (r["reads"], r["writes"], r["kind"]) == (reads, writes, kind)]
        mine.sort(key=lambda r: r["l0"])
        label = reads if reads == writes else f"{reads} to {writes}"
        l0, fvu = [r["l0"] for r in mine], [r["fvu"] for r in mine]
        axes.plot(l0, fvu, marker="o", linewidth=1, label=f"{kind} {label}"[:60])
    axes.set(xlabel="L0", ylabel="FVU on held-out items", xscale="log")
    if len(axes.lines) <= 12:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
