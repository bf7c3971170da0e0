"""What the pages of latents show, gathered in the one pass of `dictlearn.analysis.sparsity`.

Everything is bounded by latents, not by the store: counts, the best items of each latent, a keyed
uniform sample of the items it is active in, and the maps of just these items.

Shapes: N active entries, F latents, T tokens of an item, R readable items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

BINS = 128
"""Bins of the histogram of a latent's activations."""

PER_OCTAVE = 8
"""Bins for a factor of two; they end at `Gather.ceiling`."""

PAIR = np.dtype(
    [("latent", "<i4"), ("row", "<i8"), ("value", "<f4"), ("token", "<i4"), ("lot", "<u8")]
)
"""An item in which a latent is active: its row, best value and token, and its lot in the draw."""

CELL = np.dtype([("latent", "<i4"), ("row", "<i8"), ("token", "<i4"), ("value", "<f4")])
"""One activation of a kept pair."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tally:
    """Counts of keys: sorted, each once."""

    key: Int[np.ndarray, " n"]
    """Keys, ascending."""
    count: Int[np.ndarray, " n"]
    """How often each was seen."""

    @staticmethod
    def of(keys: Int[np.ndarray, " n"]) -> Tally:
        """Count keys."""
        key, count = np.unique(keys, return_counts=True)
        return Tally(key=key, count=count)

    @staticmethod
    def sum(tallies: Sequence[Tally]) -> Tally:
        """Add several."""
        key, where = np.unique(np.concatenate([t.key for t in tallies]), return_inverse=True)
        count = np.zeros(len(key), np.int64)
        np.add.at(count, where, np.concatenate([t.count for t in tallies]))
        return Tally(key=key, count=count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """What `Gather` has seen."""

    histogram: Tally
    """Keys ``latent * BINS + bin``."""
    place: Tally
    """Keys ``latent * T + token``."""
    best: np.ndarray
    """`PAIR` rows: the items with the largest activations of each latent, best first."""
    sample: np.ndarray
    """`PAIR` rows: a uniform draw of the items each latent is active in."""
    cells: np.ndarray
    """`CELL` rows: every activation of the pairs above."""
    together: Tally
    """Keys ``a * F + b``, a < b: sampled tokens on which both are active."""
    alone: Tally
    """Sampled tokens on which each latent is active."""
    sampled: int
    """Tokens sampled for the two above."""


@dataclass(frozen=True, kw_only=True)
class Gather:
    """Collector of what a latent's page shows (`dictlearn.analysis.Collector`)."""

    latents: int
    """F."""
    first: tuple[int, ...]
    """Number of the first token of each kind in the site's token order."""
    width: int
    """T: one more than the largest token number."""
    tokens: int
    """Tokens of the whole pass."""
    ceiling: float
    """Upper end of the last bin of the histogram; larger activations fall into that bin."""
    top: int = 16
    """Best items kept of each latent."""
    drawn: int = 32
    """Random items kept of each latent."""
    pairs: int = 24_000_000
    """Pairs of latents counted, about: decides how many tokens are sampled for co-firing."""
    seed: int = 0
    """Of the draws."""

    def part(self, found: np.ndarray) -> Gathered:
        """Reduce the active entries of some items."""
        latent_N = found["latent"].astype(np.int64)
        row_N, value_N = found["row"], found["value"]
        token_N = np.asarray(self.first, np.int64)[found["kind"]] + found["t"]
        pairs, pair_N = self._pairs(latent_N, row_N, value_N, token_N)
        best, sample = self._best(pairs), self._sample(pairs)
        kept = np.zeros(len(pairs), bool)
        kept[best] = kept[sample] = True
        inside_N = kept[pair_N]
        cells = np.zeros(int(inside_N.sum()), CELL)
        for name, column in (("latent", latent_N), ("row", row_N), ("token", token_N)):
            cells[name] = column[inside_N]
        cells["value"] = value_N[inside_N]
        together, alone, sampled = self._together(latent_N, row_N, token_N)
        return Gathered(
            histogram=Tally.of(latent_N * BINS + self.bins(value_N)),
            place=Tally.of(latent_N * self.width + token_N),
            best=pairs[best],
            sample=pairs[sample],
            cells=cells,
            together=together,
            alone=alone,
            sampled=sampled,
        )

    def add(self, gathered: Sequence[Gathered]) -> Gathered:
        """Merge."""
        if len(gathered) == 1:
            return gathered[0]
        best = _once(np.concatenate([g.best for g in gathered]))
        best = best[self._best(best)]
        sample = _once(np.concatenate([g.sample for g in gathered]))
        sample = sample[self._sample(sample)]
        cells = np.concatenate([g.cells for g in gathered])
        rows = int(max(cells["row"].max(initial=0), 0)) + 1
        wanted = [p["latent"].astype(np.int64) * rows + p["row"] for p in (best, sample)]
        keys = cells["latent"].astype(np.int64) * rows + cells["row"]
        return Gathered(
            histogram=Tally.sum([g.histogram for g in gathered]),
            place=Tally.sum([g.place for g in gathered]),
            best=best,
            sample=sample,
            cells=cells[np.isin(keys, np.concatenate(wanted))],
            together=Tally.sum([g.together for g in gathered]),
            alone=Tally.sum([g.alone for g in gathered]),
            sampled=sum(g.sampled for g in gathered),
        )

    def bins(self, value_N: np.ndarray) -> Int[np.ndarray, " n"]:
        """Bin of each activation: ``BINS + floor(PER_OCTAVE * log2(|value| / ceiling))``."""
        safe_N = np.maximum(np.abs(value_N).astype(np.float64), 1e-30)
        bin_N = BINS + np.floor(PER_OCTAVE * np.log2(safe_N / self.ceiling)).astype(np.int64)
        clipped_N: np.ndarray = np.clip(bin_N, 0, BINS - 1)
        return clipped_N

    def edges(self) -> np.ndarray:
        """Return the ``BINS + 1`` edges of the histogram; the first bin also holds all below."""
        edges: np.ndarray = self.ceiling * 2.0 ** (np.arange(-BINS, 1) / PER_OCTAVE)
        return edges

    def _pairs(
        self, latent_N: np.ndarray, row_N: np.ndarray, value_N: np.ndarray, token_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a `PAIR` for each (latent, row), and the pair that each entry belongs to."""
        low = row_N.min(initial=0)
        key_N = latent_N * (row_N.max(initial=0) - low + 1) + row_N - low
        order_N = np.lexsort((-value_N, key_N))
        new_N = np.concatenate([[True], np.diff(key_N[order_N]) != 0])[: len(order_N)]
        chosen = order_N[new_N]
        pairs = np.zeros(len(chosen), PAIR)
        pairs["latent"], pairs["row"] = latent_N[chosen], row_N[chosen]
        pairs["value"], pairs["token"] = value_N[chosen], token_N[chosen]
        pairs["lot"] = lots(pairs["latent"], pairs["row"], self.seed)
        pair_N = np.empty(len(order_N), np.int64)
        pair_N[order_N] = np.cumsum(new_N) - 1
        return pairs, pair_N

    def _best(self, pairs: np.ndarray) -> Int[np.ndarray, " n"]:
        order = np.lexsort((pairs["row"], -pairs["value"], pairs["latent"]))
        return order[_rank(pairs["latent"][order]) < self.top]

    def _sample(self, pairs: np.ndarray) -> Int[np.ndarray, " n"]:
        order = np.lexsort((pairs["lot"], pairs["latent"]))
        return order[_rank(pairs["latent"][order]) < self.drawn]

    def _together(
        self, latent_N: np.ndarray, row_N: np.ndarray, token_N: np.ndarray
    ) -> tuple[Tally, Tally, int]:
        """Count pairs of latents on tokens drawn by lot, as many as this share may cost."""
        token_key_N = row_N * self.width + token_N
        key, first, size = np.unique(token_key_N, return_index=True, return_counts=True)
        # entries of a token follow each other: they come from one row of codes
        share = self.pairs * (len(key) / max(1, self.tokens))
        by_lot = np.argsort(lots(key, key, self.seed + 1), kind="stable")
        fits = np.cumsum(size[by_lot].astype(np.int64) ** 2) <= max(share, 1)
        chosen = by_lot[fits]
        first, size = first[chosen], size[chosen]
        entry = np.repeat(first - np.concatenate([[0], np.cumsum(size)[:-1]]), size)
        entry = (entry + np.arange(int(size.sum())))[: int(size.sum())]
        mine = latent_N[entry]
        left = np.repeat(mine, np.repeat(size, size))
        start = np.repeat(np.repeat(first, size), np.repeat(size, size))
        inner = np.arange(len(left)) - np.repeat(
            np.concatenate([[0], np.cumsum(np.repeat(size, size))[:-1]])[: len(mine)],
            np.repeat(size, size),
        )
        right = latent_N[start + inner] if len(left) else left
        below = left < right
        keys = left[below] * self.latents + right[below]
        return Tally.of(keys), Tally.of(mine), len(chosen)


def lots(a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
    """Return a keyed pseudo-random uint64 of each pair of numbers (splitmix64 of Steele 2014)."""
    with np.errstate(over="ignore"):
        z = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + b.astype(np.uint64)
        z += np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def _once(pairs: np.ndarray) -> np.ndarray:
    """Keep the best of the kinds where a (latent, row) occurs under several."""
    pairs = pairs[np.lexsort((-pairs["value"], pairs["row"], pairs["latent"]))]
    same = (np.diff(pairs["latent"]) == 0) & (np.diff(pairs["row"]) == 0)
    kept: np.ndarray = pairs[np.concatenate([[True], ~same])[: len(pairs)]]
    return kept


def _rank(sorted_keys: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal keys."""
    n = len(sorted_keys)
    new = np.concatenate([[True], np.diff(sorted_keys) != 0])[:n]
    rank: np.ndarray = np.arange(n) - np.maximum.accumulate(np.where(new, np.arange(n), 0))
    return rank
