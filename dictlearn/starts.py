"""Dictionaries that start from data: rows at points, KMeans centroids, NMF parts; hulls of points.

Shapes: N tokens drawn, P points, F latents, r = width read, w = width written.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from actstore.aligned_loader import AlignedLoader
from actstore.loader import TokenLoader
from dictlearn.dictionary import Dictionary

if TYPE_CHECKING:
    from dictlearn.learner import Learner

TOKENS_PER_CENTROID = 16
"""Tokens drawn for each KMeans centroid, where an epoch has so many."""


def start_from_data(learners: Sequence[Learner], loader: TokenLoader | AlignedLoader) -> None:
    """Set the weights of those learners whose configuration asks for data.

    ``init_decoder="points"``: decoder rows are tokens minus b_dec, at norm 1; ``"kmeans"``: KMeans
    centroids of tokens of what is written. The encoder row is the same vector where a dictionary
    reads what it writes, otherwise the input of the same token (or the mean input of the cluster),
    centred, at norm 1. ``"nmf"``: parts of `parts`, the same way. With ``archetypes``
    these are the points of the hull.

    Parameters
    ----------
    learners
        Before their first step.
    loader
        In training units; all ranks of a run give the same.

    Raises
    ------
    ValueError
        More points are asked for than an epoch has tokens, or scikit-learn is missing.
    """
    asked = {
        i: learner.config.archetypes or learner.dictionary.latents
        for i, learner in enumerate(learners)
        if learner.config.archetypes or learner.config.init_decoder != "random"
    }
    if not asked:
        return
    there = min(loader.rows, len(loader) * loader.batch_size)
    most = 0
    for i, count in asked.items():
        if count > there:
            raise ValueError(
                f"{learners[i].name!r} asks for {count} data points "
                f"({'archetypes' if learners[i].config.archetypes else 'one a latent'}), "
                f"an epoch of the training items has {there} tokens in whole batches; ask for fewer"
            )
        clustered = learners[i].config.init_decoder in ("kmeans", "nmf")
        most = max(most, min(there, count * TOKENS_PER_CENTROID) if clustered else count)
    acts = draw(loader, most)
    for i, count in asked.items():
        _start(learners[i], acts, loader.slices, count)


def draw(loader: TokenLoader | AlignedLoader, count: int) -> Float[Tensor, "n _"]:
    """Return the first tokens of the shuffled batches: a uniform sample without replacement."""
    parts: list[Tensor] = []
    left = count
    with closing(iter(loader)) as batches:  # type: ignore[type-var]
        while left > 0:
            acts = next(batches).acts[:left].clone()
            parts.append(acts)
            left -= len(acts)
    return torch.cat(parts)


@torch.no_grad()
def _start(
    learner: Learner, acts: Float[Tensor, "n _"], slices: Mapping[str, slice], count: int
) -> None:
    d, config = learner.dictionary, learner.config
    x_Pr, target_Pw = d.gather(acts, slices), d.gather(acts, slices, write=True)
    if config.init_decoder == "kmeans":
        drawn = min(len(acts), count * TOKENS_PER_CENTROID)
        x_Pr, target_Pw = centroids(x_Pr[:drawn], target_Pw[:drawn], count, seed=config.seed)
    if config.init_decoder == "nmf":
        drawn = min(len(acts), count * TOKENS_PER_CENTROID)
        x_Pr, target_Pw = parts(
            x_Pr[:drawn], target_Pw[:drawn], d.b_dec.detach(), count, seed=config.seed
        )
    x_Pr, target_Pw = x_Pr[:count].contiguous(), target_Pw[:count].contiguous()
    learner.ranks.spread([x_Pr, target_Pw])
    if learner.hull is None:
        d.W_dec.copy_(F.normalize(target_Pw - d.b_dec, dim=1))
        _encoder(d, d.W_dec if _same(d) else _centred(d, x_Pr))
        return
    learner.hull.begin(target_Pw, d.b_dec, learner.generator)
    share_FP = learner.hull.share_FP
    _encoder(d, d.W_dec if _same(d) else share_FP @ _centred(d, x_Pr))


def _encoder(d: Dictionary, row_Fr: Float[Tensor, "f r"]) -> None:
    d.W_enc.copy_(F.normalize(row_Fr, dim=1).T)


def _centred(d: Dictionary, x_Pr: Float[Tensor, "p r"]) -> Float[Tensor, "p r"]:
    center_r = d.center()
    return x_Pr if center_r is None else x_Pr - center_r


def _same(d: Dictionary) -> bool:
    return list(d.config.reads) == list(d.config.writes)


def centroids(
    x_Nr: Float[Tensor, "n r"], target_Nw: Float[Tensor, "n w"], count: int, *, seed: int = 0
) -> tuple[Float[Tensor, "p r"], Float[Tensor, "p w"]]:
    """Mean input and output of each of `count` clusters of outputs.

    Clusters by mini-batch KMeans (Sculley 2010, "Web-scale k-means clustering") of scikit-learn. A
    cluster that ends empty keeps its centroid and takes the input of the nearest token.

    Raises
    ------
    ValueError
        scikit-learn is not installed, or there are fewer tokens than clusters.
    """
    if count > len(target_Nw):
        raise ValueError(f"{count} clusters are asked for of {len(target_Nw)} tokens")
    cluster = scikit("cluster", "KMeans")
    model = cluster.MiniBatchKMeans(
        count, batch_size=4096, max_iter=20, n_init=1, random_state=seed, compute_labels=False
    )
    target = np.ascontiguousarray(target_Nw.float().cpu().numpy())
    model.fit(target)
    found_Pw = torch.from_numpy(np.asarray(model.cluster_centers_, np.float32))
    of_N = torch.from_numpy(model.predict(target).astype(np.int64))
    size_P = torch.bincount(of_N, minlength=count)
    x_cpu_Nr = x_Nr.float().cpu()
    mean_Pr = torch.zeros(count, x_Nr.shape[1]).index_add_(0, of_N, x_cpu_Nr)
    mean_Pr /= size_P.clamp(min=1)[:, None]
    empty = (size_P == 0).nonzero().flatten()
    if len(empty):
        nearest = torch.cdist(found_Pw[empty], target_Nw.float().cpu()).argmin(1)
        mean_Pr[empty] = x_cpu_Nr[nearest]
    return mean_Pr.to(x_Nr), found_Pw.to(target_Nw)


def parts(
    x_Nr: Float[Tensor, "n r"],
    target_Nw: Float[Tensor, "n w"],
    center_w: Float[Tensor, " w"],
    count: int,
    *,
    seed: int = 0,
) -> tuple[Float[Tensor, "p r"], Float[Tensor, "p w"]]:
    """Directions of `count` parts of a non-negative factorisation of the outputs.

    Activations have signs and NMF (Lee and Seung 1999) has none, so the centred outputs are split::

        [relu(t - c), relu(c - t)] = W H       W [n, P] >= 0, H [P, 2 w] >= 0
        part p = c + H[p, :w] - H[p, w:]       input p = sum_n W[n, p] x_n / sum_n W[n, p]

    by mini-batch updates (Lefevre et al. 2011, "Online algorithms for nonnegative matrix
    factorization with the Itakura-Saito divergence") of scikit-learn. A part that is never used
    starts at the token of its number.

    Raises
    ------
    ValueError
        scikit-learn is not installed, or there are fewer tokens than parts.
    """
    if count > len(target_Nw):
        raise ValueError(f"{count} parts are asked for of {len(target_Nw)} tokens")
    decomposition = scikit("decomposition", "NMF")
    passes = max(20, -(-300 // -(-len(target_Nw) // 4096)))  # at least 300 updates
    model = decomposition.MiniBatchNMF(
        count, init="random", batch_size=4096, max_iter=passes, random_state=seed, tol=0.0
    )
    centred_Nw = (target_Nw - center_w).float().cpu()
    split = torch.cat([centred_Nw.relu(), (-centred_Nw).relu()], dim=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")  # it may not have converged
        weight_NP = torch.from_numpy(np.asarray(model.fit_transform(split.numpy()), np.float32))
    found_P2w = torch.from_numpy(np.asarray(model.components_, np.float32))
    width = centred_Nw.shape[1]
    part_Pw = found_P2w[:, :width] - found_P2w[:, width:]
    total_P = weight_NP.sum(0)
    mean_Pr = (weight_NP.T @ x_Nr.float().cpu()) / total_P.clamp(min=1e-12)[:, None]
    unused = ((total_P <= 0) | (part_Pw.norm(dim=1) <= 0)).nonzero().flatten()
    mean_Pr[unused] = x_Nr.float().cpu()[unused]
    part_Pw[unused] = centred_Nw[unused]
    return mean_Pr.to(x_Nr), part_Pw.to(target_Nw) + center_w


def scikit(module: str, what: str) -> Any:
    """Import a module of scikit-learn, or say how to get it."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} needs scikit-learn, which is not installed: `pip install 'actstore[classic]'`"
        ) from error
