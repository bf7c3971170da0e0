"""One row a latent: the numbers of the table, from the pass and from the weights.

Shapes: F latents, T patch tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from dictlearn.analysis import Sparsity
from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.gather import Gathered
from dictlearn.viz.site.shards import column, numbers

NEAREST = 6
"""Neighbours listed of each latent."""

MIXED = 0.5
"""A latent is of no one kind when its second highest rate is at least so much of the highest."""

_BLOCK = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What the table says of every latent; NaN or -1 where there is nothing to say."""

    kinds: tuple[str, ...]
    """Names that `kind` counts: the token kinds, ``mixed``, ``dead``."""
    density: Float[np.ndarray, " f"]
    """Share of all tokens on which it is active."""
    mean: Float[np.ndarray, " f"]
    """Mean activation where active."""
    largest: Float[np.ndarray, " f"]
    """Largest activation."""
    kind: Int[np.ndarray, " f"]
    """Token kind of the highest firing rate."""
    entropy: Float[np.ndarray, " f"]
    """Entropy of the patch position where it is active, over its largest possible value."""
    purity: Float[np.ndarray, " f"]
    """Share of its best items that have their most frequent label."""
    label: Int[np.ndarray, " f"]
    """That label."""
    near: Int[np.ndarray, "f n"]
    """Latents of the most similar decoder rows, nearest first."""
    cosine: Float[np.ndarray, "f n"]
    """Cosines of these rows."""

    def columns(self) -> dict[str, dict[str, Any]]:
        """Return the packed columns of the table."""
        return {
            "density": column(self.density, log=True),
            "mean": column(self.mean, log=True),
            "kind": numbers(self.kind),
            "entropy": column(self.entropy, steps=255),
            "purity": column(self.purity, steps=241, span=(0.0, 1.0)),  # sixteenths are exact
            "label": numbers(self.label),
            "near": numbers(self.near[:, 0]),
            "cosine": column(self.cosine[:, 0], steps=255),
        }

    def summary(self) -> dict[str, Any]:
        """Return medians and quartiles, for reports."""

        def quartiles(x: np.ndarray) -> list[float]:
            x = x[np.isfinite(x)]
            return [float(q) for q in np.quantile(x, (0.25, 0.5, 0.75))] if len(x) else []

        return {
            "latents": len(self.density),
            "dead": float((self.kind == len(self.kinds) - 1).mean()),
            "purity": quartiles(self.purity),
            "entropy": quartiles(self.entropy),
        }


def facts(
    found: Sparsity,
    gathered: Gathered,
    dictionary: Dictionary,
    *,
    patches: tuple[int, int],
    width: int,
    labels: Int[np.ndarray, " r"],
) -> Facts:
    """Put together what is known of every latent.

    Parameters
    ----------
    found, gathered
        Of one pass.
    dictionary
        For the decoder rows.
    patches
        First patch token and one more than the last; an empty range where there are none.
    width
        T of the keys of ``gathered.place``.
    labels
        Label of every readable item as an index of label names, -1 for none.
    """
    f = dictionary.latents
    fired_F = found.fired.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_F = np.where(fired_F > 0, found.total.sum(0) / fired_F, np.nan)
    purity_F, label_F = _purity(gathered.best, labels, f)
    near_FN, cosine_FN = neighbours(dictionary)
    return Facts(
        kinds=(*found.kinds, "mixed", "dead"),
        density=found.rate,
        mean=mean_F,
        largest=np.where(fired_F > 0, found.largest.max(0), np.nan),
        kind=_kind(found),
        entropy=_entropy(gathered, patches, width, f),
        purity=purity_F,
        label=label_F,
        near=near_FN,
        cosine=cosine_FN,
    )


def _kind(found: Sparsity) -> Int[np.ndarray, " f"]:
    rate_KF = found.fired / np.maximum(1, found.tokens)[:, None]
    order_KF = np.argsort(-rate_KF, axis=0, kind="stable")
    kind_F: np.ndarray = order_KF[0].copy()
    if len(rate_KF) > 1:
        first_F = np.take_along_axis(rate_KF, order_KF[:1], 0)[0]
        second_F = np.take_along_axis(rate_KF, order_KF[1:2], 0)[0]
        kind_F[second_F >= MIXED * first_F] = len(found.kinds)
    kind_F[found.fired.sum(0) == 0] = len(found.kinds) + 1
    return kind_F


def _entropy(
    gathered: Gathered, patches: tuple[int, int], width: int, f: int
) -> Float[np.ndarray, " f"]:
    """Entropy of positions over ``log(min(T, times active))``; NaN below two activations."""
    latent_N, token_N = np.divmod(gathered.place.key, width)
    inside_N = (token_N >= patches[0]) & (token_N < patches[1])
    latent_N, count_N = latent_N[inside_N], gathered.place.count[inside_N].astype(np.float64)
    total_F = np.bincount(latent_N, weights=count_N, minlength=f)
    share_N = count_N / total_F[latent_N]
    sum_F = np.bincount(latent_N, weights=-share_N * np.log(share_N), minlength=f)
    most_F = np.log(np.minimum(max(1, patches[1] - patches[0]), np.maximum(1, total_F)))
    entropy_F: np.ndarray = np.where(most_F > 0, sum_F / np.where(most_F > 0, most_F, 1), np.nan)
    clipped_F: np.ndarray = np.clip(entropy_F, 0, 1)
    return clipped_F


def _purity(
    best: np.ndarray, labels: Int[np.ndarray, " r"], f: int
) -> tuple[Float[np.ndarray, " f"], Int[np.ndarray, " f"]]:
    """Share and name of the most frequent label among the best items; NaN below two items."""
    purity_F, label_F = np.full(f, np.nan), np.full(f, -1)
    label_N = labels[best["row"]]
    latent_N, label_N = best["latent"][label_N >= 0], label_N[label_N >= 0]
    if not len(latent_N):
        return purity_F, label_F
    size = int(label_N.max()) + 1
    key, count = np.unique(latent_N.astype(np.int64) * size + label_N, return_counts=True)
    total_F = np.bincount(latent_N, minlength=f)
    order = np.argsort(count, kind="stable")  # the last write of a latent is its largest count
    latent, label = np.divmod(key[order], size)
    purity_F[latent], label_F[latent] = count[order] / total_F[latent], label
    few_F = total_F < 2
    purity_F[few_F], label_F[few_F] = np.nan, -1
    return purity_F, label_F


@torch.no_grad()
def neighbours(
    dictionary: Dictionary, count: int = NEAREST
) -> tuple[Int[np.ndarray, "f n"], Float[np.ndarray, "f n"]]:
    """Return the latents of the largest decoder cosines, without oneself, and the cosines."""
    rows_Fw = F.normalize(dictionary.W_dec.detach().float(), dim=1)
    f = len(rows_Fw)
    count = min(count, f - 1)
    if count < 1:
        return np.full((f, 1), -1), np.full((f, 1), np.nan)
    near, cosine = [], []
    for start in range(0, f, _BLOCK):
        block_BF = rows_Fw[start : start + _BLOCK] @ rows_Fw.T
        own = torch.arange(len(block_BF))
        block_BF[own, own + start] = -2.0
        best = block_BF.topk(count, dim=1)
        near.append(best.indices)
        cosine.append(best.values)
    return torch.cat(near).cpu().numpy(), torch.cat(cosine).cpu().numpy().astype(np.float64)


def label_names(rows: Sequence[dict[str, Any]]) -> tuple[list[str], Int[np.ndarray, " r"]]:
    """Return the label names of the index, and the number of each row's (-1 for none)."""
    names: dict[str, int] = {}
    index = []
    for row in rows:
        name, label = row.get("label_name"), row.get("label")
        if name is None and label is None:
            index.append(-1)
            continue
        text = str(name) if name is not None else f"label {label}"
        index.append(names.setdefault(text, len(names)))
    return list(names), np.array(index, np.int64)
