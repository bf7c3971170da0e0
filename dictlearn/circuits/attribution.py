"""Attribution patching: all of activation patching from one gradient, or from a path of them.

::

    first order    m(base) + sum over the cell of  grad m(base) . (other - base)
    integrated     the same with the gradient averaged over base + a (other - base) at the site,
                   a = (s + 1/2) / steps; the cells of a site then sum to what the site as a whole
                   changes, up to the error of the sum over steps

Both estimate what `activation_patching` measures, in the same units, so that the two compare cell
by cell (`dictlearn.circuits.patching.agreement`). Nanda 2023; Syed et al. 2023 (arXiv:2310.10348);
integrated gradients: Sundararajan et al. 2017 (arXiv:1703.01365), applied at inner sites as in
Hanna et al. 2024 (arXiv:2403.17806).

Shape legend: B items, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.metrics import Metric, values_of
from dictlearn.circuits.patching import Direction, baseline, between
from dictlearn.circuits.places import (
    AXES,
    Place,
    Positions,
    dataset,
)
from dictlearn.circuits.stacked import ROWS, Batch, copies_of, n_items, stacked
from vitmodels.model import VisionModel
from vitmodels.spec import SiteInfo
from vitmodels.taps import Edit


def attribution_patching(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    sites: str | Sequence[str],
    metric: Metric,
    *,
    direction: Direction = "denoise",
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    per_item: bool = False,
) -> xr.Dataset:
    """Estimate `activation_patching` by two forward passes and one backward pass.

    Parameters are those of `activation_patching`; the metric must be differentiable.

    Returns
    -------
    xarray.Dataset
        As `activation_patching`: the estimated metric after each patch.

    Raises
    ------
    ValueError
        As `activation_patching`, and for a metric without a gradient.
    """
    infos, places, base, other = between(model, clean, corrupted, sites, direction, over, positions)
    start_B: list[Tensor] = []

    def target(logits_BC: Tensor) -> Tensor:
        values_B = _differentiable(metric, logits_BC)
        start_B.append(values_B.detach())
        return values_B.sum()

    there = model.run(base, list(infos), grad_of=target)
    with torch.no_grad():
        source = model.run(other, list(infos))
    products = {s: there[f"{s}.grad"] * (source[s] - there[s]) for s in infos}
    values = start_B[0] + _cells(places, products, infos)
    return _result(model, clean, corrupted, metric, direction, places, values, infos, per_item)


def integrated_gradients(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    sites: str | Sequence[str],
    metric: Metric,
    *,
    steps: int = 8,
    direction: Direction = "denoise",
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    rows: int = ROWS,
    per_item: bool = False,
) -> xr.Dataset:
    """Estimate `activation_patching` by gradients along the way from one run to the other.

    Every site is led from one value to the other by itself, as a whole: `steps` passes a site, as
    many of them at once as `rows` allows. Other parameters are those of `activation_patching`.

    Raises
    ------
    ValueError
        As `attribution_patching`, and for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"integrated gradients need at least one step, not steps={steps}")
    infos, places, base, other = between(model, clean, corrupted, sites, direction, over, positions)
    with torch.no_grad():
        from_, to = model.run(base, list(infos)), model.run(other, list(infos))
        start_B = values_of(metric, model(base))
    at_once = max(1, rows // n_items(base))
    products = {}
    for site in infos:
        difference = to[site] - from_[site]
        share = [(step + 0.5) / steps for step in range(steps)]
        grad = torch.zeros_like(difference)
        for begin in range(0, steps, at_once):
            grad += _gradients(
                model, base, site, from_[site], difference, share[begin : begin + at_once], metric
            )
        products[site] = grad / steps * difference
    values = start_B + _cells(places, products, infos)
    return _result(model, clean, corrupted, metric, direction, places, values, infos, per_item)


def _gradients(
    model: VisionModel,
    x: Batch,
    site: str,
    start: Tensor,
    difference: Tensor,
    shares: Sequence[float],
    metric: Metric,
) -> Tensor:
    """Sum of the gradients at ``start + share * difference``."""
    count = len(shares)
    way = torch.stack([start + share * difference for share in shares]).flatten(0, 1)

    def edit(_value: Tensor) -> Tensor:
        return way

    def target(logits: Tensor) -> Tensor:
        copies = copies_of(logits, count)
        return torch.stack([_differentiable(metric, copy).sum() for copy in copies]).sum()

    edits: dict[str, Edit] = {site: edit}
    with stacked(model, x, count, site, edits) as batch:
        found = model.run(batch, [site], grad_of=target)
    return copies_of(found[f"{site}.grad"], count).sum(0)


def _differentiable(metric: Metric, logits_BC: Tensor) -> Tensor:
    values_B = values_of(metric, logits_BC)
    if not values_B.requires_grad:
        raise ValueError(
            "this metric has no gradient (accuracy, or a value detached from the logits), so it "
            "cannot be attributed; use logit_difference, or activation_patching"
        )
    return values_B


def _cells(
    places: Sequence[Place], products: Mapping[str, Tensor], infos: Mapping[str, SiteInfo]
) -> Tensor:
    """Sum of the products over each place, ``[places, B]``; places are ordered site by site."""
    parts = []
    for site, info in infos.items():
        mine = [place for place in places if place.site == site]
        heads = list(dict.fromkeys(place.head for place in mine))
        groups = mine[: len(mine) // len(heads)]  # head by head, the same tokens
        value_BHT = _reduced(products[site], info)
        if heads == [None]:
            value_BHT = value_BHT.sum(1, keepdim=True)
        single = [place.tokens[0] for place in groups if place.tokens and len(place.tokens) == 1]
        if len(single) == len(groups):
            cells_BHG = value_BHT[:, :, single]
        else:
            cells_BHG = torch.stack(
                [
                    value_BHT[:, :, list(g.tokens)].sum(-1) if g.tokens else value_BHT.sum(-1)
                    for g in groups
                ],
                dim=-1,
            )
        parts.append(cells_BHG.flatten(1).T)
    return torch.cat(parts)


def _reduced(value: Tensor, info: SiteInfo) -> Tensor:
    """``[B, *shape]`` summed to ``[B, heads or 1, tokens or 1]``."""
    token, head = info.token_axis, info.axes.index("head") if "head" in info.axes else None
    kept = [axis for axis in (head, token) if axis is not None]
    drop = [1 + axis for axis in range(len(info.axes)) if axis not in kept]
    value = value.sum(drop) if drop else value
    if head is None:
        return value.reshape(len(value), 1, -1)
    if token is None:
        return value[..., None]
    return value if head < token else value.transpose(1, 2)


def _result(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    metric: Metric,
    direction: str,
    places: Sequence[Place],
    values: Tensor,
    infos: Mapping[str, SiteInfo],
    per_item: bool,
) -> xr.Dataset:
    found = dataset(places, values if per_item else values.mean(1), infos)
    return found.assign_attrs(
        clean=baseline(model, clean, metric),
        corrupted=baseline(model, corrupted, metric),
        direction=direction,
        model=model.spec.id,
    )
