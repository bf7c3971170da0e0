"""Attention: patterns by head, rollout, and what each head attends to, as measured numbers.

With P[q, k] the pattern of a head (rows sum to 1) and means over items and the queries named::

    entropy          - sum_k P ln P, in nats; all queries
    distance         sum_k P |q - k| / sum_k P over patches k, in patches; patch queries
    cls, register    attention of patches to tokens of that kind
    corner, edge     attention of patches to the 4 corners, to the border
    itself           attention of patches to themselves
    left, right, above, below
                     attention of patches to that neighbour, over patches that have it
    fixed            share of the variance of P that its mean over items explains: 1 for a head
                     that attends by position alone, 0 for one that attends by content alone

and for clips also ``time_distance``, ``same_frame``, ``previous_frame`` and ``next_frame`` (the
same place in it), and ``induction`` (see `head_statistics`). Shares that a uniform pattern would
have are in the attribute ``uniform`` of each variable. Dosovitskiy et al. 2021 (distance), Abnar
and Zuidema 2020 (arXiv:2005.00928, rollout), Olsson et al. 2022 (induction).

Shape legend: B items, L layers, H heads, Q queries, K keys, N patches, S scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.attention_masks import masks, patch_distances, successors
from dictlearn.circuits.places import position_coords
from dictlearn.circuits.stacked import Batch, n_items
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.spec import SiteInfo, TokenGrid, expand_sites

ITEMS_AT_ONCE = 8
_TINY = 1e-12


def attention_patterns(
    model: VisionModel, x: Batch, sites: str | Sequence[str] = "blocks.*.pattern"
) -> xr.DataArray:
    """Return patterns [item, layer, head, query, key].

    Parameters
    ----------
    model
        With sites ``pattern``.
    x
        B inputs.
    sites
        Which of them.

    Returns
    -------
    xarray.DataArray
        With the kind and the place of queries as coordinates ``kind``, ``row``, ``column``.

    Raises
    ------
    ValueError
        No such sites (the message says why), or layers that differ in tokens or heads.
    """
    infos = _pattern_sites(model, sites)
    grid = _grid(model, infos)
    with torch.no_grad():
        found = model.run(x, list(infos))
    stacked_BLHQK = torch.stack(list(found.values()), dim=1).float().cpu().numpy()
    tokens = list(range(grid.n_tokens))
    at = {name: ("query", value[1]) for name, value in position_coords(grid, tokens).items()}
    return xr.DataArray(
        stacked_BLHQK,
        dims=("item", "layer", "head", "query", "key"),
        coords={
            "layer": [Site.parse(name).layer for name in infos],
            "query": tokens,
            "key": tokens,
            **at,
        },
        name="pattern",
        attrs={"model": model.spec.id, "grid": list(grid.patch)},
    )


def rollout(
    patterns: xr.DataArray,
    *,
    heads: Literal["mean", "max", "min"] = "mean",
    residual: float = 0.5,
) -> xr.DataArray:
    """Return how much each query at the last layer comes from each input token.

    ``A_l = (1 - residual) * fuse_h P_l + residual * I``, rows rescaled to sum to 1, then
    ``A_L ... A_1``: attention as if it only moved tokens, which it does not.

    Parameters
    ----------
    patterns
        Of `attention_patterns`, all layers.
    heads
        How heads are fused.
    residual
        Weight of the stream that goes past attention.

    Returns
    -------
    xarray.DataArray
        [item, query, key], rows sum to 1.
    """
    if heads not in ("mean", "max", "min"):
        raise ValueError(f"heads={heads!r} is unknown: fuse them by mean, max or min")
    if not 0 <= residual < 1:
        raise ValueError(f"residual must be in [0, 1), not {residual}")
    fused = getattr(patterns, heads)("head").transpose("layer", "item", "query", "key")
    values = (1 - residual) * fused.values + residual * np.eye(patterns.sizes["key"])
    values = values / values.sum(-1, keepdims=True)
    total = values[0]
    for layer in values[1:]:
        total = layer @ total
    kept = {n: c for n, c in fused.coords.items() if "layer" not in c.dims}
    return xr.DataArray(total, dims=("item", "query", "key"), coords=kept, name="rollout")


def head_statistics(
    model: VisionModel,
    x: Batch,
    sites: str | Sequence[str] = "blocks.*.pattern",
    *,
    similarity: str | None = None,
) -> xr.Dataset:
    """Return scores of every head, [layer, head], as the module defines them.

    For clips of three frames or more, ``induction`` looks for copying by analogy in time: for a
    patch at frame t, the most similar patch (cosine at the site `similarity`) of frames up to t - 2
    is found at (t', p'), and the attention to what followed it there, (t' + 1, p'), is measured.
    ``induction_chance`` is the mean attention to all places that could have been what followed.

    Parameters
    ----------
    model, sites
        As in `attention_patterns`.
    x
        A batch; run eight at a time.
    similarity
        Site for ``induction``: by default ``patch_embed``, or else ``embed``.

    Returns
    -------
    xarray.Dataset
        One variable a score. What cannot be measured (neighbours in a grid of one column,
        ``fixed`` of one item) is left out.

    Raises
    ------
    ValueError
        As `attention_patterns`.
    """
    infos = _pattern_sites(model, sites)
    grid = _grid(model, infos)
    clip = len(grid.patch) == 3 and grid.patch[0] > 2
    content = _content_site(model, similarity) if clip else None
    chosen = masks(grid)
    items = n_items(x)
    totals: dict[str, list[Tensor]] = {}
    mean_P = [torch.zeros(1) for _ in infos]
    square = [torch.zeros(1) for _ in infos]
    for start in range(0, items, ITEMS_AT_ONCE):
        some = _rows(x, start, start + ITEMS_AT_ONCE)
        with torch.no_grad():
            found = model.run(some, [*([content] if content else []), *infos])
            after = None
            if content is not None:
                after = successors(_patches(found[content], model.sites()[content], grid), grid)
            for number, name in enumerate(infos):
                pattern = found[name].float()
                for score, value_H in _scores(pattern, grid, chosen, after).items():
                    row = totals.setdefault(score, [torch.zeros(())] * len(infos))
                    row[number] = row[number] + value_H.cpu()
                mean_P[number] = mean_P[number] + pattern.sum(0) / items
                square[number] = square[number] + pattern.square().sum((0, 2, 3)) / items
    variables = {
        score: xr.DataArray(torch.stack(row).numpy() / items, dims=("layer", "head"))
        for score, row in totals.items()
    }
    if items > 1:
        variables["fixed"] = _fixed(mean_P, square)
    for name, mask_QK in chosen.items():
        variables[name].attrs["uniform"] = float(mask_QK.sum()) / grid.n_tokens
    variables["entropy"].attrs["uniform"] = math.log(grid.n_tokens)
    heads = next(iter(infos.values())).shape[0]
    coords = {"layer": [Site.parse(n).layer for n in infos], "head": list(range(heads))}
    return xr.Dataset(variables, coords=coords, attrs={"model": model.spec.id, "items": items})


def _scores(
    pattern: Tensor, grid: TokenGrid, chosen: dict[str, Tensor], after: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """Sum over items of every score ``[H]``."""
    result = {"entropy": -(pattern * (pattern + _TINY).log()).sum(-1).mean(-1).sum(0)}
    patches = grid.slice("patch")
    if grid.count("patch"):
        inner = pattern[:, :, patches, patches]
        weight = inner / inner.sum(-1, keepdim=True).clamp_min(_TINY)
        for name, distance_NN in patch_distances(grid).items():
            near = (weight * distance_NN.to(weight)).sum(-1)
            result[name] = near.mean(-1).sum(0)
    for name, mask_QK in chosen.items():
        result[name] = torch.einsum("bhqk,qk->h", pattern, mask_QK.to(pattern))
    if after is not None:
        inner = pattern[:, :, patches, patches]
        target_BN, allowed_NN = after[0].to(inner.device), after[1].to(inner)
        usable = allowed_NN.any(-1)
        at = target_BN[:, None, :, None].expand(-1, inner.shape[1], -1, -1)
        hit = inner.gather(-1, at)[..., 0][..., usable]
        chance = (inner * allowed_NN).sum(-1) / allowed_NN.sum(-1).clamp_min(1)
        result["induction"] = hit.mean(-1).sum(0)
        result["induction_chance"] = chance[..., usable].mean(-1).sum(0)
    return result


def _fixed(mean_P: Sequence[Tensor], square: Sequence[Tensor]) -> xr.DataArray:
    shares = []
    for mean_HQK, square_H in zip(mean_P, square, strict=True):
        about = mean_HQK.shape[1] / mean_HQK.shape[2]  # of a uniform pattern, summed squares
        explained = mean_HQK.square().sum((1, 2)) - about
        shares.append((explained / (square_H - about).clamp_min(_TINY)).clamp(0, 1).cpu())
    return xr.DataArray(torch.stack(shares).numpy(), dims=("layer", "head"))


def _pattern_sites(model: VisionModel, sites: str | Sequence[str]) -> dict[str, SiteInfo]:
    if not any(name.endswith("pattern") for name in model.anatomy.taps):
        raise ValueError(
            f"{model.spec.id} (family {model.spec.family}) has no attention patterns between "
            "tokens to read: it has no sites 'blocks.*.pattern'"
        )
    infos = model.sites()
    names = expand_sites(sites, model.anatomy.taps)
    if other := [n for n in names if infos[n].axes != ("head", "query", "key")]:
        raise ValueError(f"{other[0]} is no pattern; ask for 'blocks.*.pattern'")
    return {name: infos[name] for name in names}


def _grid(model: VisionModel, infos: dict[str, SiteInfo]) -> TokenGrid:
    first, info = next(iter(infos.items()))
    for name, other in infos.items():
        if other.shape != info.shape:
            raise ValueError(
                f"{name} is {list(other.shape)} and {first} {list(info.shape)}: ask for layers of "
                "one shape, stage by stage"
            )
    heads, queries, keys = info.shape
    if queries != keys or info.grid is None or info.grid.n_tokens != queries:
        raise ValueError(
            f"{first} of {model.spec.id} goes from {queries} queries to {keys} keys in {heads} "
            "heads: attention within windows or frames has no one grid of keys to measure on"
        )
    return info.grid


def _content_site(model: VisionModel, similarity: str | None) -> str:
    if similarity is not None:
        return expand_sites(similarity, model.anatomy.taps)[0]
    return "patch_embed" if "patch_embed" in model.anatomy.taps else "embed"


def _patches(value: Tensor, info: SiteInfo, grid: TokenGrid) -> Tensor:
    """Content of the patches ``[B, N, d]``."""
    rows = value.flatten(2)
    if rows.shape[1] == grid.count("patch"):
        return rows
    if info.grid is None or info.grid.count("patch") != grid.count("patch"):
        raise ValueError(f"site {info.name} has no patches like those of the pattern")
    return rows[:, info.grid.slice("patch")]


def _rows(x: Batch, start: int, stop: int) -> Batch:
    if isinstance(x, Tensor):
        return x[start:stop]
    return {key: value[start:stop] for key, value in x.items()}
