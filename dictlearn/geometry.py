"""Directions of latents: how close they lie within a dictionary, and between two of them.

Memory is a few blocks of rows, never F x F, unless an exact matching of small dictionaries asks for
it. Shapes: F, G latents of two dictionaries, w = width written, r = width read, K nearest kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dictlearn.dictionary import Dictionary

COSINE_EDGES = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Edges of the histogram of each latent's largest cosine."""

_BLOCK_BYTES = 64 << 20
_EXACT = 4096
_NEAREST = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Cosines:
    """Each latent's nearest other latent of the same dictionary, by its decoder row."""

    largest_F: Float[np.ndarray, " f"]
    """Cosine with it."""
    nearest_F: Int[np.ndarray, " f"]
    """Which it is."""
    duplicates: Int[np.ndarray, "n 2"]
    """Pairs closer than `threshold`, the smaller number first."""
    threshold: float
    """Cosine above which two latents count as near duplicates."""

    @property
    def histogram(self) -> tuple[int, ...]:
        """Latents by `largest_F` between `COSINE_EDGES`."""
        counts = np.histogram(np.clip(self.largest_F, -1, 1), bins=COSINE_EDGES)[0]
        return tuple(int(c) for c in counts)

    def table(self) -> pa.Table:
        """Table with a row for each latent."""
        f = len(self.largest_F)
        columns = {"latent": np.arange(f), "nearest": self.nearest_F, "cosine": self.largest_F}
        return pa.table(columns)


@torch.no_grad()
def decoder_cosines(dictionary: Dictionary, *, threshold: float = 0.9) -> Cosines:
    """Compare every decoder row with every other, in blocks of rows.

    Rows of length 0 have cosine 0 with everything.

    Raises
    ------
    ValueError
        There is one latent only.
    """
    if dictionary.latents < 2:
        raise ValueError("cosines between latents need two latents at least")
    row_Fw = F.normalize(dictionary.W_dec.float(), dim=1)
    largest, nearest, pairs = [], [], []
    for start, cosine_CF in _blocks(row_Fw, row_Fw):
        here = torch.arange(len(cosine_CF))
        cosine_CF[here, start + here] = -torch.inf
        best = cosine_CF.max(1)
        largest.append(best.values)
        nearest.append(best.indices)
        found = (cosine_CF > threshold).nonzero()
        found[:, 0] += start
        pairs.append(found[found[:, 0] < found[:, 1]])
    return Cosines(
        largest_F=torch.cat(largest).cpu().numpy(),
        nearest_F=torch.cat(nearest).cpu().numpy(),
        duplicates=torch.cat(pairs).cpu().numpy(),
        threshold=threshold,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Matching:
    """Latents of one dictionary matched one to one with those of another."""

    first_N: Int[np.ndarray, " n"]
    """Latents of the first; those left without a partner are not in it."""
    second_N: Int[np.ndarray, " n"]
    """Partner of each in the second."""
    decoder_N: Float[np.ndarray, " n"]
    """Cosine of their decoder rows."""
    encoder_N: Float[np.ndarray, " n"]
    """Cosine of their encoder rows."""
    candidates: int
    """Latents of the first that could have been matched."""
    exact: bool
    """Whether every pair was considered, not only each latent's nearest."""
    shared_above: float = field(default=0.7)
    """Mean of the two cosines above which a pair counts as the same feature."""

    @property
    def stability(self) -> float:
        """Mean decoder cosine over the candidates; one without a partner counts 0."""
        return float(self.decoder_N.sum()) / max(1, self.candidates)

    @property
    def shared(self) -> float:
        """Share of the candidates whose pair has mean encoder and decoder cosine above 0.7."""
        both_N = (self.decoder_N + self.encoder_N) / 2
        return float((both_N > self.shared_above).sum()) / max(1, self.candidates)

    def table(self) -> pa.Table:
        """Table with a row for each pair."""
        columns: dict[str, Any] = {"first": self.first_N, "second": self.second_N}
        return pa.table(columns | {"decoder": self.decoder_N, "encoder": self.encoder_N})


@torch.no_grad()
def match(
    first: Dictionary,
    second: Dictionary,
    *,
    alive_F: Bool[np.ndarray, " f"] | None = None,
    alive_G: Bool[np.ndarray, " g"] | None = None,
    exact: bool | None = None,
) -> Matching:
    """Match latents so that the sum of decoder cosines is largest (the Hungarian method).

    Of two dictionaries trained on the same data with different seeds, the share of features that
    both have is a measure of how far they can be trusted (Paulo and Belrose 2025,
    arXiv:2501.16615, section 3).

    Parameters
    ----------
    first, second
        Over the same sites.
    alive_F, alive_G
        Latents to consider, for instance those that fire; all by default. Dead ones keep the
        directions they were made with and only lower the result.
    exact
        Consider all pairs (F x G float64, cubic time) instead of the 32 nearest of each latent in
        either direction; by default up to 4,096 latents. Pairs left out have small cosines, so
        `shared` hardly moves and `stability` is a lower bound.

    Raises
    ------
    ValueError
        The dictionaries write different sites or widths.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = first.config, second.config
    if a.writes != b.writes or a.reads != b.reads:
        raise ValueError(
            "latents can be matched between dictionaries over the same sites and widths; these "
            f"read {a.reads} and {b.reads} and write {a.writes} and {b.writes}"
        )
    index_F, index_G = _chosen(first.latents, alive_F), _chosen(second.latents, alive_G)
    row_Fw = F.normalize(first.W_dec.float()[index_F], dim=1).cpu()
    row_Gw = F.normalize(second.W_dec.float()[index_G], dim=1).cpu()
    exact = max(len(index_F), len(index_G)) <= _EXACT if exact is None else exact
    if exact:
        at_F, at_G = linear_sum_assignment((row_Fw @ row_Gw.T).numpy(), maximize=True)
    else:
        at_F, at_G = _sparse_assignment(row_Fw, row_Gw)
    enc_Fr = F.normalize(first.W_enc.T.float()[index_F][at_F], dim=1).cpu()
    enc_Gr = F.normalize(second.W_enc.T.float()[index_G][at_G], dim=1).cpu()
    return Matching(
        first_N=index_F[at_F],
        second_N=index_G[at_G],
        decoder_N=(row_Fw[at_F] * row_Gw[at_G]).sum(1).numpy(),
        encoder_N=(enc_Fr * enc_Gr).sum(1).numpy(),
        candidates=len(index_F),
        exact=exact,
    )


def _chosen(latents: int, alive_F: Bool[np.ndarray, " f"] | None) -> Int[np.ndarray, " n"]:
    if alive_F is None:
        return np.arange(latents)
    if len(alive_F) != latents:
        raise ValueError(f"the mask of living latents has {len(alive_F)} entries, not {latents}")
    return np.asarray(alive_F).nonzero()[0]


def _sparse_assignment(
    row_Fw: Float[Tensor, "f w"], row_Gw: Float[Tensor, "g w"]
) -> tuple[np.ndarray, np.ndarray]:
    """Best matching over each latent's nearest, both ways; a latent may stay alone, at cosine 0.

    A private dummy partner for every row keeps the sparse problem feasible whatever the pairs are.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    f, g = len(row_Fw), len(row_Gw)
    to_G, to_F = _nearest(row_Fw, row_Gw), _nearest(row_Gw, row_Fw)
    pairs = np.concatenate(
        [
            np.stack([np.repeat(np.arange(f), to_G.shape[1]), to_G.ravel()], 1),
            np.stack([to_F.ravel(), np.repeat(np.arange(g), to_F.shape[1])], 1),
        ]
    )
    pairs = np.unique(pairs, axis=0)
    cosine = np.concatenate(
        [
            (row_Fw[chunk[:, 0]] * row_Gw[chunk[:, 1]]).sum(1).numpy()
            for chunk in np.array_split(pairs, 1 + len(pairs) // 65536)
        ]
    )
    kept = cosine > 0
    pairs, cosine = pairs[kept], cosine[kept].astype(np.float64)
    row = np.concatenate([pairs[:, 0], np.arange(f)])
    column = np.concatenate([pairs[:, 1], g + np.arange(f)])
    weight = np.concatenate([2.0 - cosine, np.full(f, 2.0)])  # none may be 0, which means no edge
    graph = coo_matrix((weight, (row, column)), shape=(f, g + f)).tocsr()
    at_F, at_G = min_weight_full_bipartite_matching(graph)
    real = at_G < g
    return at_F[real], at_G[real]


def _nearest(row_Fw: Tensor, row_Gw: Tensor) -> Int[np.ndarray, "f k"]:
    k = min(_NEAREST, len(row_Gw))
    return np.concatenate([c.topk(k, dim=1).indices.numpy() for _, c in _blocks(row_Fw, row_Gw)])


def _blocks(row_Fw: Tensor, row_Gw: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, cosines of a block of rows with all of the second)."""
    step = max(1, _BLOCK_BYTES // (4 * max(1, len(row_Gw))))
    for start in range(0, len(row_Fw), step):
        yield start, row_Fw[start : start + step] @ row_Gw.T
