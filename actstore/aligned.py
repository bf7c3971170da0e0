"""Stores of the same items side by side: what several models made of one data set.

Two harvests of the same data under the same seed and with the same items per part hold item i at
the same place, so one order of batches serves both and a row of one has its counterpart in the
other. Sites carry the name of their store: ``a.blocks.7.resid_post``. Widths, dtypes, codecs and
media may differ. Nothing is copied: each store has its own reader, and batches are joined.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore import reader
from actstore.batching import Batch
from actstore.manifest import ArraySpec
from actstore.selection import Selection

if TYPE_CHECKING:
    from actstore.stats import ChannelStats
    from actstore.store import Store


@dataclasses.dataclass(frozen=True)
class _Words:
    """What of a manifest is asked of several stores."""

    model: None = None


class Aligned:
    """Several stores as one, for reading, training and evaluation.

    Parameters
    ----------
    stores
        By name; names become prefixes of the sites.

    Raises
    ------
    ValueError
        The stores do not hold the same items in the same places; the message names what differs.
    """

    def __init__(self, stores: Mapping[str, "Store"]) -> None:
        if len(stores) < 2:
            raise ValueError(f"expected at least two stores to align, got {list(stores)}")
        if bad := [name for name in stores if not name.isidentifier()]:
            raise ValueError(f"names of stores must be identifiers such as 'clip', got {bad[0]!r}")
        self.stores = dict(stores)
        self.url = ", ".join(f"{name}={store.url}" for name, store in stores.items())
        words = "|".join(f"{name}={store.fingerprint}" for name, store in stores.items())
        self.fingerprint = hashlib.sha256(words.encode()).hexdigest()
        self.manifest = _Words()
        first, *others = stores.values()
        for other in others:
            _check_same_items(first, other)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of all stores, each under the name of its store."""
        return tuple(f"{name}.{s}" for name, store in self.stores.items() for s in store.sites)

    @property
    def n_items(self) -> int:
        """Items of each store."""
        return next(iter(self.stores.values())).n_items

    def home(self, site: str) -> tuple["Store", str]:
        """Return the store of a site, and its name there; KeyError names what there is."""
        name, _, inner = site.partition(".")
        if name in self.stores and inner in self.stores[name].sites:
            return self.stores[name], inner
        near = difflib.get_close_matches(site, self.sites, n=3, cutoff=0.3)
        raise KeyError(f"{self.url} have no site {site!r}; nearest: {', '.join(near) or 'none'}")

    def kinds(self, site: str) -> tuple[str, ...]:
        """Return the token kinds stored of a site."""
        store, inner = self.home(site)
        return store.kinds(inner)

    def spec(self, site: str, kind: str) -> ArraySpec:
        """Return the description of one array."""
        store, inner = self.home(site)
        return store.spec(inner, kind)

    def stats(self, site: str, kind: str) -> "ChannelStats":
        """Return the statistics of one array."""
        store, inner = self.home(site)
        return store.stats(inner, kind)

    def split(
        self, sites: Sequence[str], tokens: str | Sequence[str] | None
    ) -> dict[str, list[str]]:
        """Return the sites to read of each store, after checking that their tokens correspond.

        Raises
        ------
        ValueError
            The token grids differ in the kinds asked for.
        """
        out: dict[str, list[str]] = {}
        for site in sites:
            self.home(site)
            name, _, inner = site.partition(".")
            out.setdefault(name, []).append(inner)
        found: dict[str, list[tuple[int, ...]]] = {}
        for name, inner_sites in out.items():
            selection = Selection(self.stores[name], inner_sites, tokens=tokens)
            found[name] = [tuple(column.token.tolist()) for column in selection.columns]
        first, *others = out
        for name in others:
            if found[name] != found[first]:
                a, b = (f"{n}: {sum(map(len, found[n]))} tokens" for n in (first, name))
                wide = {n: max(map(len, found[n])) for n in (first, name)}
                hint = (
                    f"they were stored with stripes of {wide[first]} and {wide[name]} tokens; "
                    "harvest again with equal stripes"
                    if sum(found[name], ()) == sum(found[first], ())
                    else "ask for a kind in which they agree, such as tokens='cls'"
                )
                raise ValueError(
                    f"the tokens of {out[first][0]} ({a}) and {out[name][0]} ({b}) do not "
                    f"correspond one to one; {hint}"
                )
        return out

    def __repr__(self) -> str:
        return f"<Aligned {self.url}: {self.n_items} items, {len(self.sites)} sites>"


def align(**stores: "Store") -> Aligned:
    """Join stores of the same items: ``align(clip=store_a, dino=store_b)``; see `Aligned`."""
    return Aligned(stores)


def open_aligned(text: str, **options: Any) -> "Store | Aligned":
    """Open a store, or ``clip=URL,dino=URL`` as stores of the same items.

    `options` are those of `actstore.open`.
    """
    from actstore.store import open_store

    pieces = [piece.partition("=") for piece in text.split(",")]
    if len(pieces) < 2 or not all(name.isidentifier() and url for name, _, url in pieces):
        return open_store(text, **options)
    return Aligned({name: open_store(url, **options) for name, _, url in pieces})


def _check_same_items(first: "Store", other: "Store") -> None:
    a, b = first.manifest, other.manifest
    pairs: dict[str, tuple[Any, Any]] = {
        "data": (_data(first), _data(other)),
        "order of the items": (dict(a.order), dict(b.order)),
        "items": (a.items, b.items),
        "items per part": (a.items_per_part, b.items_per_part),
        "committed parts": (_done(first), _done(other)),
    }
    differing = [f"{k}: {x} and {y}" for k, (x, y) in pairs.items() if x != y]
    if not differing:
        columns = ["position", "source", "key"]
        one, two = (store.table().select(columns) for store in (first, other))
        if not one.equals(two):
            differing = ["index: different items at the same positions"]
    if differing:
        raise ValueError(
            f"{first.url} and {other.url} do not hold the same items in the same places; these "
            f"differ: {'; '.join(differing)}. Harvest both from the same data, with the same "
            f"--seed and --items-per-part {a.items_per_part}"
        )


def _data(store: "Store") -> dict[str, Any]:
    """Return what identifies the data set; arrays written directly are told apart by the index."""
    data = store.manifest.data
    keys = ("kind",) if data.get("kind") == "arrays" else ("kind", "fingerprint")
    return {key: data.get(key) for key in keys}


def _done(store: "Store") -> str:
    counts = store.part_items
    if (counts >= 0).all():
        return f"all {len(counts)} with {int(counts.sum())} items"
    return f"{hashlib.sha256(counts.tobytes()).hexdigest()[:8]}, missing {store.missing_parts}"


def join(batches: Sequence[Batch], names: Sequence[str], stack: Any) -> Batch:
    """Return one batch of the rows of several; `stack` joins the activations by channel."""
    slices: dict[str, slice] = {}
    start = 0
    for name, batch in zip(names, batches, strict=True):
        slices |= {
            f"{name}.{site}": slice(start + s.start, start + s.stop)
            for site, s in batch.slices.items()
        }
        start += batch.acts.shape[1]
    first = batches[0]
    acts = stack([batch.acts for batch in batches])
    return Batch(acts=acts, item=first.item, token=first.token, slices=slices)


def sequential(
    store: "Store | Aligned", sites: str | Sequence[str], batch_size: int, **options: Any
) -> Iterator[Batch]:
    """As `actstore.reader.sequential`, of one store or of aligned ones."""
    if not isinstance(store, Aligned):
        yield from reader.sequential(store, sites, batch_size, **options)
        return
    names = sites.split(",") if isinstance(sites, str) else list(sites)
    parts = store.split(names, options.get("tokens"))
    readers = [
        reader.sequential(store.stores[name], inner, batch_size, **options)
        for name, inner in parts.items()
    ]
    try:
        for batches in zip(*readers, strict=True):
            yield join(batches, list(parts), lambda acts: np.concatenate(acts, axis=1))
    finally:
        for one in readers:
            one.close()  # type: ignore[attr-defined]
