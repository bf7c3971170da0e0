"""Pages of latents: one record each, in shards of a few dozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dictlearn.analysis import Sparsity
from dictlearn.viz.site.facts import Facts
from dictlearn.viz.site.gather import BINS, Gather, Gathered
from dictlearn.viz.site.shards import Shelf, short

SHARD = 32
"""Latents a data file."""

QUANTILES = 4
"""Groups into which the random items of a latent are cut by activation."""

COMPANIONS = 8
"""Co-firing latents listed."""

EFFECTS = 5
"""Classes listed that a latent raises most, and lowers most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Where the rows of each latent lie in an array sorted by latent."""

    start: Int[np.ndarray, " f_1"]
    """First row of each latent, and the end."""

    @staticmethod
    def of(latent: np.ndarray, f: int) -> Run:
        """Find them."""
        return Run(start=np.searchsorted(latent, np.arange(f + 1)))

    def __getitem__(self, latent: int) -> slice:
        return slice(int(self.start[latent]), int(self.start[latent + 1]))


class LatentPages:
    """Writes the records of the latents of one dictionary.

    Parameters
    ----------
    found, gathered, gather, facts
        Of its pass.
    position
        Store position of every readable item.
    labels
        Label index of every readable item.
    effects
        Change of every logit for a unit of each latent, or None.
    """

    def __init__(
        self,
        found: Sparsity,
        gathered: Gathered,
        gather: Gather,
        facts: Facts,
        *,
        position: Int[np.ndarray, " r"],
        labels: Int[np.ndarray, " r"],
        effects: Float[np.ndarray, "f c"] | None = None,
    ) -> None:
        self.found, self.facts, self.position, self.labels = found, facts, position, labels
        self.effects, self.gather = effects, gather
        f = gather.latents
        self.histogram, self.place = gathered.histogram, gathered.place
        self.bins = Run.of(self.histogram.key // BINS, f)
        self.places = Run.of(self.place.key // gather.width, f)
        self.best, self.best_of = gathered.best, Run.of(gathered.best["latent"], f)
        order = np.lexsort((-gathered.sample["value"], gathered.sample["latent"]))
        self.sample = gathered.sample[order]
        self.sample_of = Run.of(self.sample["latent"], f)
        cells = gathered.cells
        self.cells = cells[np.lexsort((cells["token"], cells["row"], cells["latent"]))]
        self.cells_of = Run.of(self.cells["latent"], f)
        self.sampled = gathered.sampled
        self._companions(gathered, f)

    def _companions(self, gathered: Gathered, f: int) -> None:
        """Keep the partners of largest cosine ``n_ab / sqrt(n_a n_b)`` of each latent."""
        alone_F = np.zeros(f)
        alone_F[gathered.alone.key] = gathered.alone.count
        a, b = np.divmod(gathered.together.key, f)
        often = gathered.together.count >= 2
        a, b, count = a[often], b[often], gathered.together.count[often]
        score = count / np.sqrt(alone_F[a] * alone_F[b])
        left, right = np.concatenate([a, b]), np.concatenate([b, a])
        score, count = np.tile(score, 2), np.tile(count, 2)
        order = np.lexsort((right, -score, left))
        self.partner, self.score, self.count = right[order], score[order], count[order]
        self.partners_of = Run.of(left[order], f)

    def write(self, shelf: Shelf, name: str) -> None:
        """Write all records: ``<name>/latents/<number of the shard>``."""
        f = self.gather.latents
        for start in range(0, f, SHARD):
            records = [self.record(latent) for latent in range(start, min(f, start + SHARD))]
            shelf.put(f"{name}/latents/{start // SHARD}", records)

    def record(self, latent: int) -> dict[str, Any]:
        """Return what one page shows."""
        sample = self.sample[self.sample_of[latent]]
        cells = self.cells[self.cells_of[latent]]
        bins, places = self.bins[latent], self.places[latent]
        partners = slice(*self.partners_of[latent].indices(len(self.partner))[:2])
        partners = slice(partners.start, min(partners.stop, partners.start + COMPANIONS))
        tokens = self.found.tokens
        return {
            "fired": [int(n) for n in self.found.fired[:, latent]],
            "rate": [
                short(n / max(1, t))
                for n, t in zip(self.found.fired[:, latent], tokens, strict=True)
            ],
            "density": short(self.facts.density[latent]),
            "mean": known(self.facts.mean[latent]),
            "max": known(self.facts.largest[latent]),
            "histogram": [
                (self.histogram.key[bins] % BINS).tolist(),
                self.histogram.count[bins].tolist(),
            ],
            "place": [
                (self.place.key[places] % self.gather.width).tolist(),
                self.place.count[places].tolist(),
            ],
            "best": [self._item(pair, cells) for pair in self.best[self.best_of[latent]]],
            "random": [
                [self._item(pair, cells) for pair in group]
                for group in np.array_split(sample, min(QUANTILES, max(1, len(sample))))
            ],
            "together": [
                [int(p), int(n), short(s)]
                for p, n, s in zip(
                    self.partner[partners], self.count[partners], self.score[partners], strict=True
                )
            ],
            "near": [
                [int(n), short(c)]
                for n, c in zip(self.facts.near[latent], self.facts.cosine[latent], strict=True)
                if n >= 0
            ],
            "effect": self._effect(latent),
        }

    def _item(self, pair: np.void, cells: np.ndarray) -> list[Any]:
        """Return [store position, label, best value, best token, tokens, values] of an item."""
        row = pair["row"]
        mine = cells[slice(*np.searchsorted(cells["row"], [row, row + 1]))]
        return [
            int(self.position[row]),
            int(self.labels[row]),
            short(pair["value"]),
            int(pair["token"]),
            mine["token"].tolist(),
            [short(v, 3) for v in mine["value"]],
        ]

    def _effect(self, latent: int) -> list[list[list[float]]] | None:
        if self.effects is None:
            return None
        row = self.effects[latent]
        order = np.argsort(-row, kind="stable")
        count = min(EFFECTS, len(row) // 2) or 1
        groups = (order[:count], order[::-1][:count])
        return [[[int(c), short(row[c])] for c in group] for group in groups]

    def appearances(self, most: int = 24) -> Mapping[int, list[list[float]]]:
        """Return by store position the [latent, value] for which an item is among the best."""
        seen: dict[int, list[list[float]]] = {}
        order = np.argsort(-self.best["value"], kind="stable")
        for pair in self.best[order]:
            rows = seen.setdefault(int(self.position[pair["row"]]), [])
            if len(rows) < most:
                rows.append([int(pair["latent"]), short(pair["value"])])
        return seen

    def strongest(self) -> Int[np.ndarray, " f"]:
        """Return the store position of the best item of each latent, -1 for none."""
        start, end = self.best_of.start[:-1], self.best_of.start[1:]
        out = np.full(len(start), -1)
        out[end > start] = self.position[self.best["row"][start[end > start]]]
        return out

    def shown(self) -> Int[np.ndarray, " n"]:
        """Return rows of the items on any page, those on most pages and at the top first."""
        rows = np.concatenate([self.best["row"], self.sample["row"]])
        row, count = np.unique(rows, return_counts=True)
        return row[np.argsort(-count, kind="stable")]


def known(value: float) -> float | None:
    """Round a number for JSON; None for NaN."""
    return short(value) if np.isfinite(value) else None
