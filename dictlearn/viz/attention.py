"""Figures of attention; each draws into the Axes it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dictlearn.viz.patching import patching_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def attention_row(
    axes: Axes, patterns: xr.DataArray, *, query: int = 0, picture: Any = None, frame: int = 0
) -> AxesImage:
    """Draw what one query attends to, over the picture; keys that are no patches are left out.

    Parameters
    ----------
    axes
        Where to draw.
    patterns
        [query, key] of `attention_patterns` (one item, layer and head) or of `rollout`.
    query
        Token that attends; 0 is CLS in most models.
    picture
        What matplotlib can draw, beneath.
    frame
        Which frame of a clip.

    Raises
    ------
    ValueError
        More dimensions than [query, key].
    """
    if set(patterns.dims) != {"query", "key"}:
        raise ValueError(
            f"expected [query, key], got {patterns.dims}; choose one item, layer and head by .isel"
        )
    row, column = patterns["row"].values, patterns["column"].values
    mine = row >= 0
    if "time" in patterns.coords:
        mine &= patterns["time"].values == frame
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row[mine], column[mine]] = patterns.sel(query=query).values[mine]
    where = (0.0, 1.0, 1.0, 0.0)
    if picture is not None:
        axes.imshow(np.asarray(picture), cmap="gray", extent=where)
    image = axes.imshow(
        grid,
        cmap="viridis",
        vmin=0,
        extent=where,
        alpha=1.0 if picture is None else 0.55,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def head_scores(axes: Axes, statistics: xr.Dataset, score: str) -> AxesImage:
    """Draw one score of `head_statistics` over layers and heads, white where a uniform one is.

    Parameters
    ----------
    axes
        Where to draw.
    statistics
        Of `dictlearn.circuits.head_statistics`.
    score
        One of its variables.

    Raises
    ------
    KeyError
        There is no such score.
    """
    if score not in statistics.data_vars:
        raise KeyError(f"no score {score!r}; there are {', '.join(map(str, statistics.data_vars))}")
    values = statistics[score]
    image = patching_map(axes, values, middle=values.attrs.get("uniform"))
    axes.set_title(score)
    return image
