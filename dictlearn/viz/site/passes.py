"""One dictionary's pass over the store, and the files that come of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from dictlearn.analysis import Sparsity, sparsity
from dictlearn.dictionary import Dictionary
from dictlearn.formats.card import kind as kind_of
from dictlearn.viz.site.facts import Facts, facts
from dictlearn.viz.site.gather import Gather, Gathered
from dictlearn.viz.site.latents import SHARD, LatentPages
from dictlearn.viz.site.shards import Shelf, column, numbers, short

if TYPE_CHECKING:
    from actstore.store import Store

HEADROOM = 4.0
"""The histogram ends at so many times the root mean square length of a token read."""


@dataclass(kw_only=True, eq=False)
class Pass:
    """What one read of the store says of one dictionary."""

    name: str
    """For people."""
    folder: str
    """Of its data files: ``d0``."""
    dictionary: Dictionary
    """In raw units."""
    kinds: tuple[str, ...]
    """Token kinds it was looked at on."""
    first: dict[str, tuple[int, int]]
    """First token of each kind stored and one more than its last."""
    grid: tuple[int, ...]
    """Patches as (height, width) or (time, height, width); empty where unknown."""
    found: Sparsity
    gather: Gather
    gathered: Gathered
    facts: Facts
    pages: LatentPages
    has_effect: bool = False
    why_no_effect: str = ""

    def write(self, shelf: Shelf, effects: np.ndarray | None, why_not: str) -> None:
        """Write the columns of the table and the records of the latents."""
        self.pages.effects, self.why_no_effect = effects, why_not
        self.has_effect = effects is not None
        columns = self.facts.columns()
        columns["best"] = numbers(self.pages.strongest())
        if effects is not None:
            strongest = effects.argmax(1)
            columns["class"] = numbers(strongest)
            columns["effect"] = column(
                np.take_along_axis(effects, strongest[:, None], 1)[:, 0], steps=255
            )
        for name, packed in columns.items():
            shelf.put(f"{self.folder}/{name}", packed)
        self.pages.write(shelf, self.folder)

    def words(self) -> dict[str, Any]:
        """Return what the page needs to know before any latent."""
        config = self.dictionary.config
        return {
            "name": self.name,
            "folder": self.folder,
            "what": kind_of(config),
            "reads": list(config.reads),
            "writes": list(config.writes),
            "sparsify": str(config.sparsify),
            "latents": self.dictionary.latents,
            "shard": SHARD,
            "top": self.gather.top,
            "kinds": list(self.facts.kinds),
            "tokens": dict(zip(self.found.kinds, self.found.tokens.tolist(), strict=True)),
            "l0": {k: short(v) for k, v in self.found.l0_by_kind.items()},
            "first": {k: list(v) for k, v in self.first.items()},
            "grid": list(self.grid),
            "edges": [short(e, 6) for e in self.gather.edges()],
            "dead": short(self.found.dead),
            "sampled": self.gathered.sampled,
            "effect": self.has_effect,
            "noEffect": self.why_no_effect,
        }


def look(
    store: Store,
    dictionary: Dictionary,
    *,
    name: str,
    folder: str,
    labels: Int[np.ndarray, " r"],
    tokens: str | None,
    top: int,
    seed: int,
) -> Pass:
    """Read the store once, for one dictionary.

    Parameters
    ----------
    store, dictionary
        Whose sites were checked.
    name, folder
        See `Pass`.
    labels
        Label index of every readable item.
    tokens, top, seed
        See `dictlearn.viz.site.build.SiteOptions`.
    """
    site = next(iter(dictionary.config.reads))
    wanted = None if tokens is None else {t.strip() for t in tokens.split(",")}
    specs = {kind: store.spec(site, kind) for kind in store.kinds(site)}
    kinds = tuple(kind for kind in specs if wanted is None or kind in wanted)
    spans = {kind: (spec.first, spec.first + spec.tokens) for kind, spec in specs.items()}
    grid = store.grid(site).patch if "patch" in specs and _has_grid(store, site) else ()
    if "patch" in specs and grid and math.prod(grid) != specs["patch"].tokens:
        grid = ()
    gather = Gather(
        latents=dictionary.latents,
        first=tuple(specs[kind].first for kind in kinds),
        width=max(end for _, end in spans.values()),
        tokens=store.n_items * sum(specs[kind].tokens for kind in kinds),
        ceiling=_ceiling(store, dictionary, kinds),
        top=top,
        seed=seed,
    )
    found = sparsity(store, dictionary, tokens=tokens, also=(gather,))
    gathered: Gathered = found.also[0]
    known = facts(
        found,
        gathered,
        dictionary,
        patches=spans.get("patch", (0, 0)),
        width=gather.width,
        labels=labels,
    )
    position = store.table()["position"].to_numpy()
    pages = LatentPages(found, gathered, gather, known, position=position, labels=labels)
    return Pass(
        name=name,
        folder=folder,
        dictionary=dictionary,
        kinds=kinds,
        first=spans,
        grid=tuple(grid),
        found=found,
        gather=gather,
        gathered=gathered,
        facts=known,
        pages=pages,
    )


def _has_grid(store: Store, site: str) -> bool:
    return bool(store.manifest.sites.get(site, {}).get("grid"))


def _ceiling(store: Store, dictionary: Dictionary, kinds: tuple[str, ...]) -> float:
    """`HEADROOM` times the root mean square length of what is read, of the longest kind."""
    longest = 0.0
    for kind in kinds:
        stats = [store.stats(site, kind) for site in dictionary.config.reads]
        longest = max(longest, sum(float((s.var + s.mean**2).sum()) for s in stats))
    return HEADROOM * math.sqrt(longest) or 1.0
