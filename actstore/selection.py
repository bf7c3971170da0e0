"""What of a store is read together: sites side by side, token kinds, positions, items.

Sites are aligned: row r of every site belongs to the same item and token. A *column* is a run of
tokens whose stripes every site can be read in whole; for equal stripe widths it is one stripe.
"""

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int32, Int64

from actstore.layout import storage_dtype
from actstore.manifest import ArraySpec
from actstore.sampling import held_out

if TYPE_CHECKING:
    from actstore.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A share of the items, keyed by the item's place in the store.

    The two halves of one (`holdout`, `seed`) have no item in common and leave none out. They
    do not change while a harvest adds parts, and cost nothing to plan.
    """

    half: str
    """``train`` or ``validation``."""
    holdout: float = 0.1
    """Fraction of the items in the validation half."""
    seed: int = 0
    """Key of the split."""

    def __post_init__(self) -> None:
        if self.half not in ("train", "validation"):
            raise ValueError(f"half must be 'train' or 'validation', not {self.half!r}")
        if not 0 <= self.holdout <= 1:
            raise ValueError(f"holdout must be a fraction in [0, 1], not {self.holdout!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stripe:
    """One inner chunk that a column reads."""

    site: int
    """Index into the sites of the selection."""
    array: ArraySpec
    """Its array."""
    index: int
    """Number of the inner chunk in its shard."""
    tokens: tuple[int, ...]
    """Tokens taken, counted in the stripe."""
    slots: tuple[int, ...]
    """Where each of them goes among the tokens of the column."""
    width: int
    """Tokens of the column."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Column:
    """Tokens that are read together."""

    token: Int32[np.ndarray, " width"]
    """Number of each token in the site's full token order."""
    stripes: tuple[Stripe, ...]
    """What holds them, site by site."""

    @property
    def width(self) -> int:
        """Number of tokens."""
        return len(self.token)


class Selection:
    """What to read of the parts that are committed.

    Parameters
    ----------
    store
        The store.
    sites
        One name, several separated by commas, or a sequence of names; the order of channels.
    tokens
        Kinds, ``"cls,patch"`` or a sequence; None means every kind the first site has.
    positions
        Token numbers in the site's full token order to keep; None keeps all of `tokens`.
    items
        A `Split`, store positions, a mask over store positions, or None for all.

    Raises
    ------
    KeyError
        For a site or kind the store does not have.
    ValueError
        When sites cannot be aligned, or nothing is left to read.
    """

    def __init__(
        self,
        store: "Store",
        sites: str | Sequence[str],
        *,
        tokens: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        items: "Split | np.ndarray | Sequence[int] | None" = None,
    ) -> None:
        self.store = store
        self.sites = _names(sites, "site")
        self.kinds = _kinds(store, self.sites[0], tokens)
        _check_aligned(store, self.sites, self.kinds)
        self.columns = _columns(store, self.sites, self.kinds, positions)
        first = [store.spec(site, self.kinds[0]) for site in self.sites]
        edges = np.cumsum([0, *(spec.channels for spec in first)]).tolist()
        self.slices = {s: slice(edges[i], edges[i + 1]) for i, s in enumerate(self.sites)}
        """Channels of each site in the joined row."""
        self.width = int(edges[-1])
        """Channels of all sites together."""
        self._split = items if isinstance(items, Split) else None
        self._rows: dict[int, np.ndarray] = {}
        self.parts, self.counts = self._count(items)

    def _count(
        self, items: "Split | np.ndarray | Sequence[int] | None"
    ) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, " P"]]:
        """Return the parts with something to read, and how many items of each."""
        size = self.store.manifest.items_per_part
        valid = self.store.part_items.clip(min=0)
        counts = valid.copy()
        if self._split is not None:
            edge = np.arange(len(valid), dtype=np.int64) * size
            share = self._split.holdout
            held = (share * (edge + valid)).astype(np.int64) - (share * edge).astype(np.int64)
            counts = held if self._split.half == "validation" else valid - held
        elif items is not None:
            chosen = _positions(items, self.store)
            part, row = np.divmod(chosen, size)
            bad = row >= valid[part]
            if bad.any():
                raise ValueError(
                    f"{self.store.url}: {int(bad.sum())} of the items asked for are not in the "
                    f"store, position {chosen[bad][0]} is the first: it was skipped or its part "
                    "is not committed; take positions from `store.table()`"
                )
            counts = np.bincount(part, minlength=len(valid)).astype(np.int64)
            edges = np.cumsum(counts)
            self._rows = {
                int(p): row[edges[p] - counts[p] : edges[p]]
                for p in np.flatnonzero((counts > 0) & (counts < valid))
            }
        parts = np.flatnonzero(counts)
        if not parts.size:
            raise ValueError(
                f"{self.store.url}: nothing to read: {self.store.n_items} items are committed in "
                f"{int((self.store.part_items >= 0).sum())} of {len(valid)} parts"
                + (", and none of them is among the items asked for" if items is not None else "")
                + f"; `actstore info {self.store.url}` shows the state"
            )
        return parts, counts[parts]

    @property
    def filtered(self) -> bool:
        """Whether some part is read in part only."""
        return self._split is not None or bool(self._rows)

    def rows(self, part: int) -> Int64[np.ndarray, " rows"] | None:
        """Return which rows of a part are read, ascending; None for all that are valid."""
        if self._split is None:
            return self._rows.get(part)
        n = int(self.store.part_items[part])
        start = part * self.store.manifest.items_per_part
        held = held_out(part, n, start=start, fraction=self._split.holdout, seed=self._split.seed)
        if self._split.half == "validation":
            return held
        keep: Bool[np.ndarray, " n"] = np.ones(n, dtype=bool)
        keep[held] = False
        return np.flatnonzero(keep)

    @property
    def digest(self) -> str:
        """Fingerprint of which parts, items and tokens are read."""
        digest = hashlib.sha256()
        for column in self.columns:
            digest.update(column.token.tobytes() + b"|")
        digest.update(self.parts.tobytes() + self.counts.tobytes())
        for part, rows in sorted(self._rows.items()):
            digest.update(np.int64(part).tobytes() + rows.tobytes())
        digest.update(repr(self._split).encode())
        return digest.hexdigest()[:16]

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored token over all sites."""
        return self.width * storage_dtype(self.store.manifest.dtype).itemsize


def _names(value: str | Sequence[str], what: str) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else list(value)
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one {what}, each once; got {value!r}")
    return tuple(names)


def _kinds(store: "Store", site: str, tokens: str | Sequence[str] | None) -> tuple[str, ...]:
    stored = store.kinds(site)
    if tokens is None:
        return stored
    kinds = _names(tokens, "token kind")
    for kind in kinds:
        if kind not in stored:
            near = difflib.get_close_matches(kind, stored, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise KeyError(
                f"site {site} of {store.url} has no tokens of kind {kind!r}; {hint}stored are "
                f"{', '.join(stored)}"
            )
    return tuple(kind for kind in stored if kind in kinds)


def _check_aligned(store: "Store", sites: Sequence[str], kinds: Sequence[str]) -> None:
    """Refuse sites whose tokens do not correspond."""

    def grid(site: str) -> dict[str, tuple[int, int]]:
        return {k: (store.spec(site, k).first, store.spec(site, k).tokens) for k in kinds}

    def described(site: str) -> object:
        return store.manifest.sites.get(site, {}).get("grid")

    for site in sites[1:]:
        if lacking := [k for k in kinds if k not in store.kinds(site)]:
            raise ValueError(
                f"{store.url}: sites {sites[0]} and {site} cannot be read together: {site} has "
                f"no {', '.join(lacking)} tokens; restrict tokens= to a kind both have"
            )
        if grid(site) != grid(sites[0]) or described(site) != described(sites[0]):
            raise ValueError(
                f"{store.url}: sites {sites[0]} and {site} cannot be read together: their token "
                f"grids differ ((first token, tokens) {grid(sites[0])} and {grid(site)}), so that "
                "a row of one has no counterpart in the other; read them one by one"
            )
    for site in sites:
        if len({store.spec(site, k).channels for k in kinds}) > 1:
            raise ValueError(f"{store.url}: the kinds of site {site} differ in width")


def _columns(
    store: "Store", sites: Sequence[str], kinds: Sequence[str], positions: Sequence[int] | None
) -> tuple[Column, ...]:
    wanted = None if positions is None else {int(p) for p in positions}
    columns = []
    known: set[int] = set()
    for kind in kinds:
        specs = [store.spec(site, kind) for site in sites]
        width = math.lcm(*(spec.stripe_tokens for spec in specs))
        first, tokens = specs[0].first, specs[0].tokens
        if wanted is not None and specs[0].of:
            raise ValueError(
                f"{store.url} keeps {tokens} of {specs[0].of} {kind} tokens of each item, others "
                "for every item: positions= cannot choose among them; drop rows by `Batch.token`"
            )
        known.update(range(first, first + tokens))
        for start in range(0, tokens, width):
            chosen = [
                t for t in range(start, start + width) if wanted is None or first + t in wanted
            ]
            if not chosen:
                continue
            stripes = []
            for i, spec in enumerate(specs):
                for index in sorted({t // spec.stripe_tokens for t in chosen}):
                    mine = [t for t in chosen if t // spec.stripe_tokens == index]
                    stripes.append(
                        Stripe(
                            site=i,
                            array=spec,
                            index=index,
                            tokens=tuple(t % spec.stripe_tokens for t in mine),
                            slots=tuple(chosen.index(t) for t in mine),
                            width=len(chosen),
                        )
                    )
            token = np.array([first + t for t in chosen], dtype=np.int32)
            columns.append(Column(token=token, stripes=tuple(stripes)))
    if wanted is not None and (unknown := sorted(wanted - known)):
        raise ValueError(
            f"{store.url}: positions {unknown[:5]} are not tokens of {', '.join(kinds)} at "
            f"{sites[0]}; these lie in {min(known)}..{max(known)}"
        )
    if not columns:
        raise ValueError(f"{store.url}: no token position is left to read")
    return tuple(columns)


def _positions(
    items: "np.ndarray | Sequence[int] | Split", store: "Store"
) -> Int64[np.ndarray, " n"]:
    """Return store positions, ascending and distinct, from positions or a mask."""
    planned = store.manifest.items
    value = np.asarray(items)
    if value.dtype == np.bool_:
        if value.shape != (planned,):
            raise ValueError(
                f"{store.url}: a mask of items needs one entry per planned item, "
                f"[{planned}]; got {list(value.shape)}"
            )
        return np.flatnonzero(value)
    if value.ndim != 1 or (value.size and value.dtype.kind not in "iu"):
        raise ValueError(
            f"{store.url}: items must be a Split, integer store positions or a boolean mask; got "
            f"{value.dtype} {list(value.shape)}"
        )
    value = np.unique(value.astype(np.int64))
    if value.size and (value[0] < 0 or value[-1] >= planned):
        raise ValueError(
            f"{store.url}: items must be store positions in 0..{planned - 1}; got "
            f"{value[0]}..{value[-1]}"
        )
    return value
