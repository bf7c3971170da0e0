"""Build a site: one pass over the store, then the pictures and the pages of some items."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.facts import label_names
from dictlearn.viz.site.graphs import Graphs
from dictlearn.viz.site.inside import Inside
from dictlearn.viz.site.items import ItemPages
from dictlearn.viz.site.origin import check_dictionary, open_data, trained_on
from dictlearn.viz.site.passes import Pass, look
from dictlearn.viz.site.pictures import Pictures
from dictlearn.viz.site.shards import Shelf, short

if TYPE_CHECKING:
    from actstore.store import Store

log = logging.getLogger(__name__)

MARK = "data/site.js"
"""File by which a folder is known to be a site."""

EFFECT_INPUTS = 8
"""Items over which the gradient of the logits is averaged."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """What goes into a site."""

    items: int = 24
    """Items with a page of their own: attention, logit lens, active latents of every patch."""
    top: int = 16
    """Best items shown of each latent."""
    thumbs: int = 20_000
    """Pictures written at most; items beyond are shown as maps of positions."""
    seed: int = 0
    """Of the random items of each latent."""
    tokens: str | None = None
    """Token kinds, ``cls,patch``; None for those each dictionary was trained on."""
    classes: tuple[str, ...] = ()
    """Names of the model's classes; taken from the store's labels where they fit."""
    other_store: bool = False
    """Accept dictionaries that were trained on another store of the same model."""

    def __post_init__(self) -> None:
        if self.items < 0 or self.top < 1 or self.thumbs < 0:
            raise ValueError(f"items and thumbs must not be negative, top at least 1: {self}")


@dataclass(kw_only=True)
class Built:
    """What was built."""

    folder: Path
    """The site; open index.html in it."""
    bytes: int = 0
    """Size of all its files."""
    files: int = 0
    """Their number."""
    notes: list[str] = field(default_factory=list)
    """What is not in the site, and why."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by stage."""
    summaries: dict[str, Any] = field(default_factory=dict)
    """Quartiles of the table, by dictionary."""


def build(
    store: Store,
    dictionaries: Mapping[str, tuple[Dictionary, Path]],
    out: str | Path,
    options: SiteOptions | None = None,
    *,
    model: Any = None,
    why_no_model: str = "",
    data: Any = None,
    graphs: Sequence[str | Path] = (),
    on_event: Progress | None = None,
) -> Built:
    """Build the site of some dictionaries over a store.

    The folder appears when it is complete: a build that is killed leaves none, or the old one.

    Parameters
    ----------
    store
        The store.
    dictionaries
        Name -> dictionary and where it came from.
    out
        Folder of the site. A site that is there is replaced, anything else is not.
    options
        See `SiteOptions`.
    model
        The loaded model of the store, for what is computed inside of it; None leaves that out.
    why_no_model
        What the pages say then.
    data
        The data set, if it moved since the harvest.
    graphs
        Files of attribution graphs.
    on_event
        Called with (stage, done, total).

    Raises
    ------
    ValueError, KeyError, FileNotFoundError
        Something does not belong to the store, or the folder holds something else.
    """
    options = options or SiteOptions()
    tell = on_event or (lambda stage, done, total: None)
    final = Path(out)
    check_folder(final)
    if not dictionaries:
        raise ValueError("a site needs at least one dictionary")
    for dictionary, path in dictionaries.values():
        check_dictionary(dictionary, path, store, other_store=options.other_store)
    if model is not None:
        from actstore.verify import check_model

        check_model(store, model)
    read = Graphs.read(graphs, {n: (d, p) for n, (d, p) in dictionaries.items()})
    source, why_no_data = open_data(store, data)
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        built = _Build(store, options, Shelf(temporary), tell).run(
            dictionaries, source, why_no_data, model, why_no_model, read
        )
        publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    built.folder = final
    return built


def check_folder(final: Path) -> None:
    """Refuse a folder that holds something other than a site.

    Raises
    ------
    ValueError
        It does.
    """
    if final.is_file() or (final.is_dir() and any(final.iterdir()) and not (final / MARK).exists()):
        raise ValueError(
            f"--out {final} holds something that is no site of `dictlearn view`; it would be "
            "replaced. Choose another folder"
        )


def publish(temporary: Path, final: Path) -> None:
    """Put a complete site in place of the one that is there."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.replace(old)
    temporary.replace(final)
    shutil.rmtree(old, ignore_errors=True)


class _Build:
    def __init__(self, store: Store, options: SiteOptions, shelf: Shelf, tell: Progress) -> None:
        self.store, self.options, self.shelf, self.tell = store, options, shelf, tell
        self.rows: list[dict[str, Any]] = store.table().to_pylist()
        if not self.rows:
            raise ValueError(f"{store.url} holds no items yet: harvest first")
        self.labels, self.label_R = label_names(self.rows)
        self.built = Built(folder=shelf.folder)

    def run(
        self,
        dictionaries: Mapping[str, tuple[Dictionary, Path]],
        source: Any,
        why_no_data: str,
        model: Any,
        why_no_model: str,
        graphs: Graphs,
    ) -> Built:
        store, shelf = self.store, self.shelf
        write_assets(shelf)
        passes: list[Pass] = []
        for n, (name, (dictionary, path)) in enumerate(dictionaries.items()):
            self.tell("read the store", n, len(dictionaries))
            with self._timed("pass"):
                passes.append(
                    look(
                        store,
                        dictionary,
                        name=name,
                        folder=f"d{n}",
                        labels=self.label_R,
                        tokens=self.options.tokens or trained_on(path, store, dictionary),
                        top=self.options.top,
                        seed=self.options.seed,
                    )
                )
        self.tell("read the store", len(passes), len(passes))
        if source is None:
            self.built.notes.append(f"no pictures: {why_no_data}")
        described = (store.manifest.model or {}).get("transform")
        transform = None if model is None else model.transform
        pictures = None if source is None else Pictures(source, transform, described)
        inside = None
        if model is not None and pictures is not None:
            inside = Inside(model, {p.folder: (p.dictionary, p.kinds) for p in passes})
        elif model is not None:
            why_no_model = "the data set is away, so the model has no input"
        if inside is None:
            self.built.notes.append(f"nothing of the model: {why_no_model or 'none was given'}")
        with self._timed("items"):
            items = ItemPages(
                store, self.rows, self.label_R, passes, pictures, inside, self.options
            )
            described_items = items.write(shelf, self.tell)
        effects = self._effects(items, inside, passes, pictures)
        with self._timed("latents"):
            for n, one in enumerate(passes):
                self.tell("write latents", n, len(passes))
                one.write(shelf, *effects[one.folder])
            self.tell("write latents", len(passes), len(passes))
        for number, graph in enumerate(graphs.content):
            shelf.put(f"graphs/{number}", graph)
        shelf.put("labels", self.labels)
        if self.classes(inside):
            shelf.put("classes", self.classes(inside))
        self.built.notes += items.notes
        shelf.put(
            "site",
            {
                "store": {
                    "url": store.url,
                    "fingerprint": store.fingerprint[:12],
                    "items": store.n_items,
                    "data": str(store.manifest.data.get("url", store.manifest.data.get("kind"))),
                    "labels": len(self.labels),
                },
                "model": _model_words(store, inside, why_no_model),
                "dictionaries": [one.words() for one in passes],
                "items": described_items,
                "noPictures": why_no_data if source is None else "",
                "graphs": graphs.titles,
                "classes": bool(self.classes(inside)),
            },
        )
        self.built.bytes, self.built.files = shelf.bytes, shelf.files
        self.built.summaries = {one.name: one.facts.summary() for one in passes}
        return self.built

    def _effects(
        self, items: ItemPages, inside: Inside | None, passes: Sequence[Pass], pictures: Any
    ) -> dict[str, tuple[np.ndarray | None, str]]:
        if inside is None or pictures is None:
            return {one.folder: (None, "the model was not loaded") for one in passes}
        inputs = []
        with self._timed("effects"):
            for row in self.rows[: 4 * EFFECT_INPUTS]:
                try:
                    inputs.append(pictures.input(row["source"]))
                except ValueError:
                    continue
                if len(inputs) == EFFECT_INPUTS:
                    break
            return {one.folder: inside.logit_effects(one.dictionary, inputs) for one in passes}

    def classes(self, inside: Inside | None) -> list[str]:
        """Return class names: those given, or the store's labels where they are the classes."""
        if self.options.classes:
            return list(self.options.classes)
        n = inside.classes if inside else 0
        names = {row.get("label"): row.get("label_name") for row in self.rows}
        names.pop(None, None)
        if n and set(names) == set(range(n)):
            return [str(names[i] if names[i] is not None else i) for i in range(n)]
        return []

    def _timed(self, stage: str) -> Any:
        return _Timed(self.built.seconds, stage)


class _Timed:
    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self.seconds, self.stage = seconds, stage

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.start
        self.seconds[self.stage] = short(self.seconds.get(self.stage, 0.0) + spent)


def write_assets(shelf: Shelf) -> None:
    """Copy the page and its scripts."""
    folder = files("dictlearn.viz.site") / "assets"
    for asset in sorted(folder.iterdir(), key=lambda a: a.name):
        if asset.is_file():
            path = asset.name if asset.name == "index.html" else f"assets/{asset.name}"
            shelf.write(path, asset.read_bytes())


def _model_words(store: Store, inside: Inside | None, why_not: str) -> dict[str, Any]:
    described = store.manifest.model or {}
    words: dict[str, Any] = {
        "id": str(described.get("id", "unknown model")),
        "loaded": bool(inside),
    }
    if inside is None:
        return {**words, "reason": why_not or "it was not loaded when this site was built"}
    return {
        **words,
        "layers": sorted(inside.patterns),
        "heads": inside.model.spec.n_heads,
        "head": inside.has_head,
        "noAttention": inside.without_attention(),
        "noHead": "" if inside.has_head else f"{inside.model.spec.id} has no classification head",
    }
