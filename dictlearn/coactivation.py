"""Which latents are active together: pair counts over a store, in the pass of `sparsity`.

Shapes: N entries, M chosen latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dictlearn.analysis import sparsity
from dictlearn.dictionary import Dictionary

if TYPE_CHECKING:
    from actstore.store import Store


@dataclass(frozen=True)
class Together:
    """Collector for `sparsity`: tokens on which each pair of chosen latents is active.

    Gathers a sparse matrix [M, M], symmetric, with each latent's own count on the diagonal.
    """

    latents: tuple[int, ...]
    """Chosen, ascending."""

    def part(self, found: np.ndarray) -> Any:
        """Count the entries of some whole items."""
        from scipy.sparse import csr_array

        latents = np.asarray(self.latents)
        at_N = np.searchsorted(latents, found["latent"])
        at_N[at_N == len(latents)] = 0
        mine = latents[at_N] == found["latent"]
        found, at_N = found[mine], at_N[mine]
        keys = np.stack([found["row"], found["kind"], found["t"]], axis=1)
        token_N = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
        shape = (int(token_N.max()) + 1 if len(token_N) else 0, len(latents))
        on = csr_array((np.ones(len(at_N), np.int64), (token_N, at_N)), shape=shape)
        return on.T @ on

    def add(self, gathered: Sequence[Any]) -> Any:
        """Add counts."""
        total = gathered[0]
        for one in gathered[1:]:
            total = total + one
        return total


@dataclass(frozen=True, kw_only=True, eq=False)
class Coactivation:
    """Pairs of latents that are active on the same tokens."""

    tokens: int
    """Tokens seen."""
    pairs: pa.Table
    """A row for each pair seen together: first, second, together, alone_first, alone_second,
    jaccard, phi."""

    def save(self, path: str | Path) -> Path:
        """Write ``pairs`` as parquet, the number of tokens in its metadata."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        extra = {**(self.pairs.schema.metadata or {}), b"tokens": str(self.tokens).encode()}
        pq.write_table(self.pairs.replace_schema_metadata(extra), file)
        return file


def coactivation(
    store: Store,
    dictionary: Dictionary,
    latents: Sequence[int] | None = None,
    *,
    tokens: str | None = None,
    scheduler: str | None = None,
) -> Coactivation:
    """Count tokens on which two latents are both active, over every readable item of a store.

    With n11 tokens on which both are active, n10, n01 and n00 likewise: Jaccard index
    ``n11 / (n11 + n10 + n01)`` and ``phi = (n11 n00 - n10 n01) / sqrt(n1. n0. n.1 n.0)``, the
    correlation of the two indicators (nan where one is active on every token).

    Parameters
    ----------
    store, dictionary, tokens, scheduler
        As for `sparsity`.
    latents
        Chosen ones; all by default. Pairs never seen together take no memory.

    Raises
    ------
    KeyError, ValueError
        A latent is not there, or as for `sparsity`.
    """
    chosen = sorted(set(range(dictionary.latents) if latents is None else map(int, latents)))
    if len(chosen) < 2 or chosen[0] < 0 or chosen[-1] >= dictionary.latents:
        raise ValueError(
            f"co-activation needs two latents at least, of 0 to {dictionary.latents - 1}; got "
            f"{chosen[:5]}{' ...' if len(chosen) > 5 else ''}"
        )
    collector = Together(tuple(chosen))
    found = sparsity(store, dictionary, tokens=tokens, also=(collector,), scheduler=scheduler)
    n = int(found.tokens.sum())
    return Coactivation(tokens=n, pairs=_pairs(found.also[0].tocoo(), np.asarray(chosen), n))


def _pairs(counts: Any, chosen: np.ndarray, n: int) -> pa.Table:
    own = np.zeros(len(chosen), np.int64)
    diagonal = counts.row == counts.col
    own[counts.row[diagonal]] = counts.data[diagonal]
    upper = counts.row < counts.col
    a, b, n11 = counts.row[upper], counts.col[upper], counts.data[upper].astype(np.int64)
    order = np.lexsort((b, a))
    a, b, n11 = a[order], b[order], n11[order]
    n10, n01 = own[a] - n11, own[b] - n11
    n00 = n - n11 - n10 - n01
    f = [v.astype(np.float64) for v in (n11, n10, n01, n00)]
    spread = np.sqrt((f[0] + f[1]) * (f[2] + f[3]) * (f[0] + f[2]) * (f[1] + f[3]))
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(spread > 0, (f[0] * f[3] - f[1] * f[2]) / spread, np.nan)
    return pa.table(
        {
            "first": chosen[a],
            "second": chosen[b],
            "together": n11,
            "alone_first": n10,
            "alone_second": n01,
            "jaccard": n11 / np.maximum(1, n11 + n10 + n01),
            "phi": phi,
        }
    )
