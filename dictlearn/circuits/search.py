"""The smallest set of places that, patched together, reach a goal.

All sets of one size are tried before any of the next, exactly. Where there would be too many, only
the best places by themselves are combined, and the answer says so.

Shape legend: B items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dictlearn.circuits.metrics import Metric
from dictlearn.circuits.patching import Direction, between
from dictlearn.circuits.places import (
    AXES,
    Place,
    Positions,
)
from dictlearn.circuits.stacked import Batch, run_sets
from vitmodels.model import VisionModel

ROWS = 256


@dataclass(frozen=True, kw_only=True)
class PatchedSet:
    """What a search found."""

    places: tuple[Place, ...]
    """The best set of its size."""
    value: float
    """Mean metric with it patched."""
    reached: bool
    """Whether that is the goal."""
    equals: int
    """Sets of this size that reach the goal."""
    tried: int
    """Sets that were run."""
    exhaustive: bool
    """Whether every set of up to this size was run, so that none smaller reaches the goal."""
    best: dict[int, float] = field(default_factory=dict)
    """Best value by size."""


def smallest_set(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    sites: str | Sequence[str],
    metric: Metric,
    goal: float,
    *,
    direction: Direction = "denoise",
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    largest: int = 3,
    budget: int = 5000,
    rows: int = ROWS,
) -> PatchedSet:
    """Return the smallest set of places whose patching brings the mean metric to the goal.

    Parameters
    ----------
    model, clean, corrupted, sites, metric, direction, over, positions, rows
        As in `dictlearn.circuits.activation_patching`; the metric is to grow.
    goal
        Mean metric to reach.
    largest
        Largest size tried.
    budget
        Most sets of one size that are run.

    Raises
    ------
    ValueError
        As `activation_patching`, and for sizes or budgets below 1.
    """
    if largest < 1 or budget < 1:
        raise ValueError(f"largest={largest} and budget={budget} must be at least 1")
    infos, places, base, other = between(model, clean, corrupted, sites, direction, over, positions)
    with torch.no_grad():
        source = model.run(other, list(infos))
    order, exhaustive, tried = list(range(len(places))), True, 0
    best: dict[int, float] = {}
    top: tuple[Place, ...] = ()
    for size in range(1, min(largest, len(places)) + 1):
        while math.comb(len(order), size) > budget:
            order, exhaustive = order[:-1], False
        sets = [tuple(places[n] for n in some) for some in itertools.combinations(order, size)]
        values = run_sets(model, base, sets, source, metric, infos=infos, rows=rows)
        mean = values.mean(1).cpu().numpy()
        tried += len(sets)
        leader = int(mean.argmax())
        best[size], top = float(mean[leader]), sets[leader]
        if size == 1:
            order = [order[n] for n in np.argsort(-mean, kind="stable")]
        if best[size] >= goal:
            break
    return PatchedSet(
        places=top,
        value=best[len(top)],
        reached=best[len(top)] >= goal,
        equals=int((mean >= goal).sum()),
        tried=tried,
        exhaustive=exhaustive,
        best=best,
    )
