"""Activation patching: give one run the values of another, place by place.

::

    denoise   the corrupted run, with a place's value of the clean run: what suffices
    noise     the clean run, with a place's value of the corrupted run: what is needed

Meng et al. 2022 (arXiv:2202.05262); Zhang and Nanda 2024 (arXiv:2309.16042) on the choices. Every
place is run exactly; many share a forward pass, see `dictlearn.circuits.stacked`.

Shape legend: B items (pairs of a clean and a corrupted one), C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.metrics import Metric, values_of
from dictlearn.circuits.places import (
    AXES,
    Place,
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
from vitmodels.taps import Edit

Direction = Literal["denoise", "noise"]


def activation_patching(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    sites: str | Sequence[str],
    metric: Metric,
    *,
    direction: Direction = "denoise",
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    rows: int = ROWS,
    per_item: bool = False,
) -> xr.Dataset:
    """Return the metric after patching every place of a grid, each alone.

    Parameters
    ----------
    model
        With a head.
    clean, corrupted
        Two batches of B inputs, pair by pair.
    sites
        Names or patterns, ``"blocks.*.resid_post"``.
    metric
        ``logits [B, C] -> [B]``, see `dictlearn.circuits.metrics`.
    direction
        ``denoise`` or ``noise``.
    over
        Cut sites along ``head`` and ``position``, where they have them.
    positions
        Only these tokens; or groups of tokens by name, each patched at once.
    rows
        Largest batch of one forward pass.
    per_item
        Keep a dimension item instead of the mean over items.

    Returns
    -------
    xarray.Dataset
        A variable a part of the sites, dimensions layer, head, position; attributes ``clean`` and
        ``corrupted``, the metric of the two runs. See `recovered` for shares.

    Raises
    ------
    ValueError
        No head, a site that is absent or read-only, batches that differ in shape, an unknown
        direction.
    """
    infos, places, base, other = between(model, clean, corrupted, sites, direction, over, positions)
    with torch.no_grad():
        source = model.run(other, list(infos))
    values = run_places(model, base, places, source, metric, infos=infos, rows=rows)
    found = dataset(places, values if per_item else values.mean(1), infos)
    return found.assign_attrs(
        clean=baseline(model, clean, metric),
        corrupted=baseline(model, corrupted, metric),
        direction=direction,
        model=model.spec.id,
    )


def patched_logits(
    model: VisionModel,
    x: Batch,
    source: Mapping[str, Tensor],
    *,
    positions: Positions | None = None,
) -> Tensor:
    """Return the logits ``[B, C]`` of one run patched at all given sites at once.

    Parameters
    ----------
    x
        B items.
    source
        Site -> value ``[B, *shape]``, ``[1, *shape]`` or ``[*shape]``.
    positions
        Only these tokens of every site.
    """
    infos = editable_sites(model, list(source))
    places = [
        place for place in grid_places(infos, (), None if positions is None else _flat(positions))
    ]
    values = {
        name: as_source(source[name], info, n_items(x), model.device, model.dtype)
        for name, info in infos.items()
    }

    def edit_of(name: str) -> Edit:
        place = next(p for p in places if p.site == name)
        index = place.index(infos[name].axes)

        def edit(value: Tensor) -> Tensor:
            value[index] = values[name][index]
            return value

        return edit

    with torch.no_grad(), model.editing({name: edit_of(name) for name in infos}):
        return model(x)


def _flat(positions: Positions) -> str | Sequence[int]:
    if isinstance(positions, Mapping):
        raise ValueError("give token numbers or one kind here, not named groups")
    return positions


def recovered(result: xr.Dataset) -> xr.Dataset:
    """Return the share of the way back: 0 at the corrupted run's metric, 1 at the clean run's.

    Raises
    ------
    ValueError
        The two runs have the same metric, so there is no way.
    """
    clean, corrupted = result.attrs["clean"], result.attrs["corrupted"]
    if np.isclose(clean, corrupted):
        raise ValueError(
            f"the clean and the corrupted run have the same metric ({clean:.4g}): choose another "
            "pair of inputs or another metric"
        )
    share: xr.Dataset = (result - corrupted) / (clean - corrupted)
    return share.assign_attrs(result.attrs | {"clean": 1.0, "corrupted": 0.0})


def agreement(exact: xr.Dataset, approximate: xr.Dataset) -> xr.Dataset:
    """Return Pearson and Spearman correlation of two results, by part and over ``all``.

    Parameters
    ----------
    exact, approximate
        Over the same grid: of `activation_patching` and of `attribution_patching`, say.
    """
    parts = [name for name in exact.data_vars if name in approximate.data_vars]
    if not parts:
        raise ValueError(
            f"the results share no part: {list(exact.data_vars)} and {list(approximate.data_vars)}"
        )
    pairs = {}
    for name in parts:
        left, right = xr.align(exact[name], approximate[name], join="exact")
        pairs[str(name)] = (left.values.ravel(), right.transpose(*left.dims).values.ravel())
    if len(pairs) > 1:
        both = list(pairs.values())
        pairs["all"] = (np.concatenate([a for a, _ in both]), np.concatenate([b for _, b in both]))
    pearson = [_correlation(a, b) for a, b in pairs.values()]
    spearman = [_correlation(_ranks(a), _ranks(b)) for a, b in pairs.values()]
    return xr.Dataset(
        {"pearson": ("part", pearson), "spearman": ("part", spearman)},
        coords={"part": list(pairs), "cells": ("part", [len(a) for a, _ in pairs.values()])},
    )


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; ties share the mean of theirs."""
    _, which, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: np.ndarray = np.cumsum(count) - (count + 1) / 2
    return mean[which]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep] - a[keep].mean(), b[keep] - b[keep].mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale else float("nan")


def baseline(model: VisionModel, x: Batch, metric: Metric) -> float:
    """Return the mean metric of a plain run."""
    with torch.no_grad():
        return float(values_of(metric, model(x)).mean())


def ends(clean: Batch, corrupted: Batch, direction: str) -> tuple[Batch, Batch]:
    """Return (the run that is patched, the run whose values are patched in)."""
    if direction not in ("denoise", "noise"):
        raise ValueError(
            f"direction={direction!r} is unknown: 'denoise' patches clean values into the "
            "corrupted run, 'noise' corrupted values into the clean run"
        )
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def between(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    sites: str | Sequence[str],
    direction: str,
    over: Sequence[str],
    positions: Positions | None,
) -> tuple[dict[str, SiteInfo], list[Place], Batch, Batch]:
    """Check what `activation_patching` is given; return sites, places, and the two `ends`."""
    require_logits(model)
    check_pair(clean, corrupted)
    infos = editable_sites(model, sites)
    return infos, grid_places(infos, over, positions), *ends(clean, corrupted, direction)


def check_pair(clean: Batch, corrupted: Batch) -> None:
    """Check that two batches are of the same shape."""
    if isinstance(clean, Tensor) and isinstance(corrupted, Tensor):
        shapes = [list(clean.shape), list(corrupted.shape)]
    else:
        shapes = [[n_items(clean)], [n_items(corrupted)]]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"clean is {shapes[0]} and corrupted {shapes[1]}: patching needs pairs of one shape"
        )
