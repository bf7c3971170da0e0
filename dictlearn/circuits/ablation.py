"""Ablation: what the metric is without a place, its value being zero, a mean, or another input's.

::

    zero       0
    mean       over the items of a reference batch, token by token; or over a store, kind by kind
    resample   the value of another item of the reference batch (Chan et al. 2022)

Shape legend: B items, C classes, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.metrics import Metric
from dictlearn.circuits.patching import baseline
from dictlearn.circuits.places import (
    AXES,
    Positions,
    as_source,
    dataset,
    editable_sites,
    grid_places,
    require_logits,
)
from dictlearn.circuits.stacked import ROWS, Batch, n_items, run_places
from vitmodels.model import VisionModel
from vitmodels.spec import SiteInfo

if TYPE_CHECKING:
    from actstore.store import Store

Mode = Literal["zero", "mean", "resample"]


def ablate(
    model: VisionModel,
    x: Batch,
    sites: str | Sequence[str],
    metric: Metric,
    *,
    mode: Mode = "mean",
    reference: Batch | Store | None = None,
    seed: int = 0,
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    rows: int = ROWS,
    per_item: bool = False,
) -> xr.Dataset:
    """Return the metric after ablating every place of a grid, each alone.

    Parameters
    ----------
    model, sites, metric, over, positions, rows, per_item
        As in `dictlearn.circuits.activation_patching`.
    x
        B items.
    mode
        ``zero``, ``mean`` or ``resample``.
    reference
        Where means and other values come from: a batch (by default `x`), or for means a store
        harvested from this model.
    seed
        Of the items drawn by ``resample``; none is given its own value where the reference is `x`.

    Returns
    -------
    xarray.Dataset
        As `activation_patching`, with the metric of the plain run in the attribute ``clean``.

    Raises
    ------
    ValueError
        An unknown mode, a store that cannot serve, or as `activation_patching`.
    """
    require_logits(model)
    infos = editable_sites(model, sites)
    places = grid_places(infos, over, positions)
    source = ablated_values(model, x, infos, mode=mode, reference=reference, seed=seed)
    values = run_places(model, x, places, source, metric, infos=infos, rows=rows)
    found = dataset(places, values if per_item else values.mean(1), infos)
    return found.assign_attrs(clean=baseline(model, x, metric), ablation=mode, model=model.spec.id)


def ablated_values(
    model: VisionModel,
    x: Batch,
    infos: Mapping[str, SiteInfo],
    *,
    mode: Mode,
    reference: Batch | Store | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return what `ablate` puts in place of every site, ``[B, *shape]``."""
    if mode not in ("zero", "mean", "resample"):
        raise ValueError(f"mode={mode!r} is unknown: ablate by zero, mean or resample")
    items = n_items(x)
    if mode == "zero":
        zero = torch.zeros((), device=model.device, dtype=model.dtype)
        return {name: zero.expand(items, *info.shape) for name, info in infos.items()}
    if reference is not None and not isinstance(reference, Tensor | Mapping):
        if mode != "mean":
            raise ValueError(
                "a store gives means only; resample from a batch: reference=<batch of inputs>"
            )
        means = store_means(model, reference, infos)
        return {
            name: as_source(means[name], info, items, model.device, model.dtype)
            for name, info in infos.items()
        }
    with torch.no_grad():
        found = model.run(x if reference is None else reference, list(infos))
    if mode == "mean":
        return {
            name: value.mean(0, keepdim=True).expand(items, *value.shape[1:])
            for name, value in found.items()
        }
    rows = _others(n_items(x if reference is None else reference), items, reference is None, seed)
    return {name: value[rows.to(value.device)] for name, value in found.items()}


def store_means(
    model: VisionModel, store: Store, infos: Mapping[str, SiteInfo]
) -> dict[str, Tensor]:
    """Return the store's mean of every site as a value ``[*shape]``: one mean a token kind.

    Raises
    ------
    ValueError
        The store is of another model.
    KeyError
        It does not hold a site, or not all of its token kinds.
    """
    from actstore.verify import check_model

    check_model(store, model)
    means = {}
    for name, info in infos.items():
        held = store.kinds(name)
        if absent := [kind for kind in info.kinds if kind not in held]:
            raise KeyError(
                f"{store.url} holds no {absent[0]} tokens of {name} (it has {', '.join(held)}), "
                "so there is no mean of them; give a batch as reference="
            )
        rows = [torch.from_numpy(store.stats(name, kind).mean).float() for kind in info.kinds]
        if info.token_axis is None or info.grid is None:
            means[name] = rows[0].reshape(info.shape)
            continue
        counts = torch.tensor([info.grid.count(kind) for kind in info.kinds])
        mean_Td = torch.stack(rows).repeat_interleave(counts, dim=0)
        rest = [n for axis, n in enumerate(info.shape) if axis != info.token_axis]
        means[name] = mean_Td.reshape(-1, *rest).movedim(0, info.token_axis)
    return means


def _others(available: int, wanted: int, not_self: bool, seed: int) -> Tensor:
    """Items to resample from; a cyclic order of a random permutation gives none its own."""
    generator = torch.Generator().manual_seed(seed)
    if not not_self:
        return torch.randint(available, (wanted,), generator=generator)
    if available < 2:
        raise ValueError("resample needs at least two items, or a batch to take from: reference=")
    order = torch.randperm(available, generator=generator)
    rows = torch.empty_like(order)
    rows[order] = order.roll(1)
    return rows
