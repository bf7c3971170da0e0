"""``dictlearn eval``: evaluate dictionaries on a store, or compare reports side by side."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import tyro

from actstore.place import CachedPlace

if TYPE_CHECKING:
    from rich.console import Console

    from actstore.aligned import Aligned
    from actstore.selection import Split
    from actstore.store import Store
    from dictlearn.heads import Head
    from dictlearn.report import Report

HeadKind = Literal["model", "zero-shot", "probe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(CachedPlace):
    """Evaluate dictionaries on a store; several give a table to compare."""

    dictionaries: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of dictionaries, or of runs (every dictionary in them); with --compare also files of
    reports."""
    store: str | None = None
    """The store, or NAME=STORE,NAME=STORE of the same items; not needed to compare files of
    reports."""
    tokens: str | None = None
    """Token kinds; those each dictionary was trained on by default."""
    held_out: bool = True
    """Only items its training held out, where it held out any."""
    compare: bool = False
    """A column for each dictionary, a row for each figure, by kind and site too."""
    model: bool = False
    """Also measure the substitution loss with the model the store names: --head model."""
    head: tuple[HeadKind, ...] = ()
    """Substitution loss by these heads: the model's own classifier, a zero-shot classifier over the
    label names (at its trained scale and at 1), a linear probe fitted on items not evaluated."""
    probe_site: str | None = None
    """Where the probe reads: the last site stored by default."""
    weights: str | None = None
    """Local weights of that model."""
    data: str | None = None
    """The images, if they moved since the harvest."""
    images: int = 1000
    """Images of the substitution loss."""
    limit: int | None = None
    """Stop after about so many tokens."""
    out: Path | None = None
    """Write the reports here as JSON, and the table beside it as Markdown."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def eval_with_progress(config: Eval) -> int:
    """Run ``dictlearn eval``."""
    from rich.console import Console

    from dictlearn.compare import read_reports, side_by_side
    from dictlearn.report import markdown

    console = Console()
    reports: list[Report] = []
    folders: list[Path] = []
    for path in config.dictionaries:
        if config.compare and path.is_file() and path.suffix == ".json":
            reports += read_reports(path)
        else:
            folders += _folders([path])
    if folders:
        if config.store is None:
            raise ValueError(
                f"--store is needed to evaluate {folders[0]}; without it only files of reports "
                "(`dictlearn eval ... --out FILE.json`) can be compared"
            )
        reports += _evaluate(config, config.store, folders, console)
    text = side_by_side(reports) if config.compare else markdown(reports)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps([r.to_json() for r in reports], indent=1) + "\n")
        config.out.with_suffix(".md").write_text(text + "\n")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _evaluate(config: Eval, url: str, folders: Sequence[Path], console: Console) -> list[Report]:
    from actstore.aligned import open_aligned
    from actstore.harvester import choose_device
    from dictlearn.commands import progress_bars
    from dictlearn.evaluation import evaluate
    from dictlearn.formats import load

    store = open_aligned(url, **config.opening)
    heads = _Heads(config, store)
    reports = []
    with progress_bars(console) as progress:
        for folder in folders:
            about = _about(folder)
            bar = progress.add_task(folder.name, total=None, note="")

            def show(done: int, total: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done, total=total)

            trained_on = about.get("tokens")
            items = _held_out(about, store) if config.held_out else None
            note = _other_store(folder, about, store)
            if note:
                progress.console.print(note, markup=False, highlight=False, soft_wrap=True)
            dictionary = load(folder)
            items, chosen = heads.of(dictionary.config.sites, items)
            reports.append(
                evaluate(
                    dictionary,
                    store,
                    tokens=config.tokens or (",".join(trained_on) if trained_on else None),
                    items=items,
                    limit=config.limit,
                    model=heads.model,
                    heads=chosen,
                    data=config.data,
                    images=config.images,
                    device=choose_device(config.device),
                    about={"name": folder.name, "path": str(folder)}
                    | ({"trained_on": about["store"]} if about.get("store") else {}),
                    on_event=show,
                )
            )
    return reports


class _Heads:
    """The model and the heads a command asks for, each made once."""

    def __init__(self, config: Eval, store: Store | Aligned) -> None:
        self.kinds = list(dict.fromkeys([*(["model"] if config.model else []), *config.head]))
        self.config = config
        self.store = cast("Store", store)  # several stores name no model, and are refused below
        self.probes: dict[tuple[str, str, str], Head] = {}
        self.model: Any = self._model() if self.kinds else None

    def _model(self) -> Any:
        from dictlearn.substitution import store_model

        if self.store.manifest.model is None:
            raise ValueError(
                f"{self.store.url} was not harvested from a model; leave --model and --head out"
            )
        names = label_names(self.store) if "zero-shot" in self.kinds else None
        return store_model(self.store, self.config.weights, classes=names)

    def of(
        self, sites: Sequence[str], items: Split | None
    ) -> tuple[Split | None, list[Head] | None]:
        """Return the items to evaluate and the heads for a dictionary over some sites."""
        from actstore.selection import Split
        from dictlearn.heads import default_probe_site, fit_probe, model_heads

        if not self.kinds:
            return items, None
        heads = list(model_heads(self.model)) if set(self.kinds) - {"probe"} else []
        if "probe" in self.kinds:
            # nothing held out in training: hold a fifth out of the probe
            items = items or Split(half="validation", holdout=0.2)
            site, kind = default_probe_site(self.store, sites)
            if self.config.probe_site is not None:
                site = self.config.probe_site
                kind = "cls" if "cls" in self.store.kinds(site) else self.store.kinds(site)[0]
            key = (site, kind, str(items))
            if key not in self.probes:
                rest = dataclasses.replace(items, half="train")
                self.probes[key] = fit_probe(self.store, site, kind=kind, items=rest)
            heads.append(self.probes[key])
        return items, heads


def label_names(store: Store) -> list[str]:
    """Names of the labels of a store, in the order of their numbers.

    Raises
    ------
    ValueError
        Some number below the largest has no name.
    """
    table = store.table().select(["label", "label_name"]).group_by(["label", "label_name"])
    names = {row["label"]: row["label_name"] for row in table.aggregate([]).to_pylist()}
    count = 1 + max((n for n in names if n is not None), default=-1)
    if not count or any(not names.get(i) for i in range(count)):
        raise ValueError(
            f"a zero-shot head needs the name of every label; {store.url} has "
            f"{ {k: v for k, v in sorted(names.items(), key=str)[:5]} }"
        )
    return [str(names[i]) for i in range(count)]


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
            raise FileNotFoundError(
                f"no dictionary at {path}{hint}. `dictlearn train STORE --out {path}` makes some"
            )
    return found


def _about(folder: Path) -> dict[str, Any]:
    """Return what a native dictionary says of its training; nothing for other formats."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text())
    about = config.get("about") if config.get("format") == "dictlearn" else None
    return dict(about or {})


def _held_out(about: dict[str, Any], store: Store | Aligned) -> Split | None:
    from actstore.selection import Split

    trained = about.get("train") or {}
    if not trained.get("holdout") or about.get("store") != store.fingerprint:
        return None
    return Split(half="validation", holdout=trained["holdout"], seed=trained["split_seed"])


def _other_store(folder: Path, about: dict[str, Any], store: Store | Aligned) -> str:
    """Say that a dictionary was trained on another store, or on this one before it changed."""
    there = about.get("store")
    if not there or there == store.fingerprint:
        return ""
    return (
        f"note: {folder.name} was trained on the store with fingerprint {there[:16]}, {store.url} "
        f"has {store.fingerprint[:16]}: another store, or this one changed since. What was held "
        "out then is not known here, so every item counts"
    )
