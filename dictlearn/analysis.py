"""How sparse a dictionary is over a store, by dask: one part at a time, never the whole store.

Every part becomes one task: its block of each site is encoded in chunks of rows and reduced to
counts (and to the best items of each latent); the counts are then added in a tree. Memory is about
one part a thread plus the counts, whatever the size of the store.

Shapes: S items of a part, T tokens of a kind, d channels, F latents, N active entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int

from dictlearn.dictionary import Dictionary
from dictlearn.scaling import check_sites

if TYPE_CHECKING:
    from actstore.store import Store

_FAN_IN = 8
_CHUNK_BYTES = 24 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparsity:
    """Firing of every latent by token kind, L0 by position, and the best items of each latent."""

    kinds: tuple[str, ...]
    """Token kinds, in token order."""
    tokens: Int[np.ndarray, " kind"]
    """Tokens seen of each kind."""
    fired: Int[np.ndarray, "kind f"]
    """Tokens on which each latent was active."""
    total: Float[np.ndarray, "kind f"]
    """Sum of each latent's activations."""
    largest: Float[np.ndarray, "kind f"]
    """Largest activation of each latent."""
    position: Int[np.ndarray, " t"]
    """Token numbers in the site's full token order."""
    position_kind: Int[np.ndarray, " t"]
    """Kind of each, as an index into `kinds`."""
    position_l0: Float[np.ndarray, " t"]
    """Mean number of active latents of each."""
    top: pa.Table
    """Best items of each latent: latent, rank, position (of the item in the store), token, value;
    no rows unless asked for."""
    also: tuple[Any, ...] = ()
    """What every further collector gathered, in the order given."""

    @property
    def rate(self) -> Float[np.ndarray, " f"]:
        """Share of all tokens on which each latent is active."""
        rate: np.ndarray = self.fired.sum(0) / max(1, int(self.tokens.sum()))
        return rate

    @property
    def l0(self) -> float:
        """Mean number of active latents of a token."""
        return float(self.fired.sum() / max(1, int(self.tokens.sum())))

    @property
    def l0_by_kind(self) -> dict[str, float]:
        """The same by token kind."""
        l0 = self.fired.sum(1) / np.maximum(1, self.tokens)
        return {kind: float(value) for kind, value in zip(self.kinds, l0, strict=True)}

    @property
    def dead(self) -> float:
        """Share of latents that are never active."""
        return float((self.fired.sum(0) == 0).mean())

    def latents(self) -> pa.Table:
        """Table with a row for each latent and kind: rate, mean activation when active, largest."""
        kinds, f = self.fired.shape
        safe = np.maximum(1, self.fired)
        return pa.table(
            {
                "latent": np.tile(np.arange(f), kinds),
                "kind": np.repeat(np.array(self.kinds), f),
                "fired": self.fired.ravel(),
                "rate": (self.fired / np.maximum(1, self.tokens)[:, None]).ravel(),
                "mean": (self.total / safe).ravel(),
                "max": self.largest.ravel(),
            }
        )

    def positions(self) -> pa.Table:
        """Table with a row for each token position: kind and L0."""
        return pa.table(
            {
                "token": self.position,
                "kind": np.array(self.kinds)[self.position_kind],
                "l0": self.position_l0,
            }
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``latents.parquet``, ``positions.parquet`` and ``top.parquet``."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.latents(), path / "latents.parquet")
        pq.write_table(self.positions(), path / "positions.parquet")
        pq.write_table(self.top, path / "top.parquet")
        return path


class Collector(Protocol):
    """Something more to gather in the same pass; travels to every task, so it must pickle."""

    def part(self, found: np.ndarray) -> Any:
        """Reduce the active entries of some whole items, fields latent, value, row, kind, t."""

    def add(self, gathered: Sequence[Any]) -> Any:
        """Merge what `part` or `add` returned; in any order, at least one."""


def sparsity(
    store: Store,
    dictionary: Dictionary,
    *,
    tokens: str | None = None,
    top: int = 0,
    also: Sequence[Collector] = (),
    scheduler: str | None = None,
) -> Sparsity:
    """Compute firing rates and L0 over every readable item of a store.

    Parameters
    ----------
    store
        Holds the sites the dictionary reads.
    dictionary
        In raw units.
    tokens
        Token kinds, ``cls,patch``; every kind stored by default.
    top
        Also keep so many best items of each latent (the best token of each item).
    also
        Collectors that see every active entry of the same read.
    scheduler
        Of dask (``threads``, ``synchronous``); the active client's, or threads, by default.

    Raises
    ------
    KeyError, ValueError
        A site or kind is not in the store, or the widths differ.
    """
    from dask.base import compute
    from dask.delayed import delayed

    check_sites(dictionary, store)
    reads = list(dictionary.config.reads)
    stored = store.kinds(reads[0])
    wanted = None if tokens is None else {t.strip() for t in tokens.split(",")}
    kinds = tuple(k for k in stored if wanted is None or k in wanted)
    for kind in wanted or ():
        store.spec(reads[0], kind)
    specs = [store.spec(reads[0], kind) for kind in kinds]
    if chosen := [f"{a.tokens} of {a.of} {a.kind}" for a in specs if a.of]:
        raise ValueError(
            f"{store.url} keeps {', '.join(chosen)} tokens of each item: places of latents need "
            "all of them; harvest without --tokens-per-item, or take `dictlearn eval`"
        )
    model = delayed(dictionary.to("cpu"), pure=True)
    task = delayed(_part)
    parts: list[Any] = []
    for index, kind in enumerate(kinds):
        arrays = [store.dask(site, kind) for site in reads]
        columns = [a.to_delayed().ravel() for a in arrays]
        starts = np.cumsum([0, *arrays[0].chunks[0]])
        for i, blocks in enumerate(zip(*columns, strict=True)):
            parts.append(task(model, list(blocks), index, len(kinds), int(starts[i]), top, also))
    add = delayed(_add)
    while len(parts) > 1:
        groups = [parts[i : i + _FAN_IN] for i in range(0, len(parts), _FAN_IN)]
        parts = [add(group, top, also) for group in groups]
    options = {} if scheduler is None else {"scheduler": scheduler}
    (counts,) = compute(parts[0], **options)  # type: ignore[no-untyped-call]
    return _finish(store, kinds, specs, counts)


@dataclass(kw_only=True, eq=False)
class _Counts:
    tokens: np.ndarray
    fired: np.ndarray
    total: np.ndarray
    largest: np.ndarray
    l0: dict[int, np.ndarray]
    items: dict[int, int]
    best: np.ndarray
    also: list[Any]


_BEST = np.dtype(
    [("latent", "<i4"), ("value", "<f4"), ("row", "<i8"), ("kind", "<i4"), ("t", "<i4")]
)


@torch.no_grad()
def _part(
    dictionary: Dictionary,
    blocks: Sequence[Float[np.ndarray, "S T d"]],
    kind: int,
    kinds: int,
    start: int,
    top: int,
    also: Sequence[Collector] = (),
) -> _Counts:
    """Count one kind of one part, whose first item is row `start` of the table."""
    items, n_tokens = blocks[0].shape[:2]
    f = dictionary.latents
    fired, total, largest = (
        np.zeros((kinds, f), np.int64),
        np.zeros((kinds, f)),
        np.zeros((kinds, f)),
    )
    l0_T = np.zeros(n_tokens, np.int64)
    best = np.zeros(0, _BEST)
    gathered: list[Any] = []
    step = max(1, _CHUNK_BYTES // (4 * f * n_tokens))
    for at in range(0, items, step):
        cut = [torch.from_numpy(np.ascontiguousarray(b[at : at + step])) for b in blocks]
        x_Br = torch.cat([c.float().flatten(0, 1) for c in cut], dim=1)
        entries = dictionary.encode_entries(x_Br)
        active = entries.value != 0
        latent_N = entries.latent[active].numpy()
        value_N = entries.value[active].numpy()
        item_N, t_N = np.divmod(entries.row[active].numpy(), n_tokens)
        fired[kind] += np.bincount(latent_N, minlength=f)
        total[kind] += np.bincount(latent_N, weights=value_N, minlength=f)
        np.maximum.at(largest[kind], latent_N, value_N)
        l0_T += np.bincount(t_N, minlength=n_tokens)
        if top or also:
            found = np.zeros(len(latent_N), _BEST)
            found["latent"], found["value"], found["t"] = latent_N, value_N, t_N
            found["row"], found["kind"] = item_N + at + start, kind
            if top:
                best = _best(np.concatenate([best, found]), top)
            new = [collector.part(found) for collector in also]
            pairs = zip(also, gathered, new, strict=True) if gathered else ()
            gathered = [c.add([old, one]) for c, old, one in pairs] or new
    tokens = np.zeros(kinds, np.int64)
    tokens[kind] = items * n_tokens
    return _Counts(
        tokens=tokens,
        fired=fired,
        total=total,
        largest=largest,
        l0={kind: l0_T},
        items={kind: items},
        best=best,
        also=gathered,
    )


def _best(found: np.ndarray, top: int) -> np.ndarray:
    """Keep the best token of each (latent, item), and of those the `top` best of each latent."""
    order = np.lexsort((found["t"], found["kind"], -found["value"], found["row"], found["latent"]))
    found = found[order]
    same = (found["latent"][1:] == found["latent"][:-1]) & (found["row"][1:] == found["row"][:-1])
    found = found[np.concatenate([[True], ~same])[: len(found)]]
    found = found[np.lexsort((found["row"], -found["value"], found["latent"]))]
    return found[_rank(found["latent"]) < top]


def _rank(sorted_keys: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal keys."""
    n = len(sorted_keys)
    new = np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]])[:n]
    first = np.maximum.accumulate(np.where(new, np.arange(n), 0))
    rank: np.ndarray = np.arange(n) - first
    return rank


def _add(counts: Sequence[_Counts], top: int, also: Sequence[Collector] = ()) -> _Counts:
    out = counts[0]
    for other in counts[1:]:
        l0, items = dict(out.l0), dict(out.items)
        for kind, value in other.l0.items():
            l0[kind] = l0.get(kind, 0) + value
            items[kind] = items.get(kind, 0) + other.items[kind]
        out = _Counts(
            tokens=out.tokens + other.tokens,
            fired=out.fired + other.fired,
            total=out.total + other.total,
            largest=np.maximum(out.largest, other.largest),
            l0=l0,
            items=items,
            best=np.concatenate([out.best, other.best]),
            also=out.also,
        )
    if top:
        out.best = _best(out.best, top)
    out.also = [c.add([one.also[i] for one in counts]) for i, c in enumerate(also)]
    return out


def _finish(
    store: Store, kinds: tuple[str, ...], specs: Sequence[Any], counts: _Counts
) -> Sparsity:
    first = np.array([spec.first for spec in specs])
    position = [np.arange(s.first, s.first + s.tokens) for s in specs]
    l0 = [counts.l0[i] / max(1, counts.items[i]) for i in range(len(kinds))]
    best = counts.best
    stored = store.table()["position"].to_numpy()
    return Sparsity(
        kinds=kinds,
        tokens=counts.tokens,
        fired=counts.fired,
        total=counts.total,
        largest=counts.largest,
        position=np.concatenate(position),
        position_kind=np.repeat(np.arange(len(kinds)), [len(p) for p in position]),
        position_l0=np.concatenate(l0),
        also=tuple(counts.also),
        top=pa.table(
            {
                "latent": best["latent"],
                "rank": _rank(best["latent"]),
                "position": stored[best["row"]],
                "token": first[best["kind"]] + best["t"],
                "value": best["value"],
            }
        ),
    )
