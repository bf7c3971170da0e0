"""Figures of patching, ablation and attribution results; each draws into the Axes it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def patching_map(axes: Axes, values: xr.DataArray, *, middle: float | None = None) -> AxesImage:
    """Draw a result over two dimensions, layers upwards.

    Parameters
    ----------
    axes
        Where to draw.
    values
        One part of a result with two dimensions: (layer, position), (layer, head) ...
    middle
        Value drawn white; by default that of the run that is patched, or 0.

    Raises
    ------
    ValueError
        Another number of dimensions.
    """
    array = values.transpose("layer", ...) if "layer" in values.dims else values
    if array.ndim != 2:
        raise ValueError(
            f"a map has two dimensions, this result has {values.dims}; take .sel(...), .max(...) "
            "or .mean(...) along the others"
        )
    vertical, horizontal = (str(d) for d in array.dims)
    centre = 0.0 if middle is None else middle
    reach = float(np.nanmax(np.abs(array.values - centre))) or 1.0
    image = axes.imshow(
        array.values,
        origin="lower",
        aspect="auto",
        cmap="RdBu_r",
        vmin=centre - reach,
        vmax=centre + reach,
        interpolation="nearest",
    )
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.set_yticks(range(array.sizes[vertical]), _labels(array, vertical))
    names = _labels(array, horizontal)
    step = max(1, len(names) // 12)
    axes.set_xticks(range(0, len(names), step), names[::step])
    return image


def patch_grid_map(
    axes: Axes, values: xr.DataArray, picture: Any = None, *, frame: int = 0
) -> AxesImage:
    """Draw values of patches as a map over the picture; other tokens are left out.

    Parameters
    ----------
    axes
        Where to draw.
    values
        [position], with the coordinates ``row`` and ``column`` (and ``time``) of a result.
    picture
        What matplotlib can draw, beneath the map; None for the map alone.
    frame
        Which frame of a clip.

    Raises
    ------
    ValueError
        Not [position], or without places.
    """
    if values.dims != ("position",) or "row" not in values.coords:
        raise ValueError(
            f"expected [position] with rows and columns, got {values.dims}; choose a layer, and "
            "patch tokens one by one, not in groups"
        )
    row, column = values["row"].values, values["column"].values
    mine = row >= 0
    if "time" in values.coords:
        mine &= values["time"].values == frame
    if not mine.any():
        raise ValueError(f"no patches to draw (frame {frame})")
    grid = np.full((row.max() + 1, column.max() + 1), np.nan)
    grid[row[mine], column[mine]] = values.values[mine]
    reach = float(np.nanmax(np.abs(grid))) or 1.0
    where = (0.0, 1.0, 1.0, 0.0)
    if picture is not None:
        axes.imshow(np.asarray(picture), cmap="gray", extent=where)
    image = axes.imshow(
        grid,
        cmap="RdBu_r",
        vmin=-reach,
        vmax=reach,
        extent=where,
        alpha=1.0 if picture is None else 0.55,
        interpolation="nearest",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def agreement_scatter(axes: Axes, exact: xr.Dataset, approximate: xr.Dataset) -> None:
    """Draw an estimate against exact patching, a point a cell, a colour a part.

    Parameters
    ----------
    axes
        Where to draw.
    exact, approximate
        Over the same grid.
    """
    for name in exact.data_vars:
        if name in approximate.data_vars:
            left, right = xr.align(exact[name], approximate[name], join="exact")
            flat = right.transpose(*left.dims).values.ravel()
            axes.plot(left.values.ravel(), flat, ".", markersize=3, label=str(name), alpha=0.7)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="0.6", lw=0.8, zorder=0)
    axes.set_xlabel("exact patching")
    axes.set_ylabel("estimate")
    axes.legend(frameon=False, fontsize=8)


def logit_parts(axes: Axes, parts: xr.Dataset, *, item: int = 0, which: int = 0) -> None:
    """Draw the parts of one logit as bars, layer by layer, with the sum.

    Parameters
    ----------
    axes
        Where to draw.
    parts
        Of `dictlearn.circuits.attribute_logits`.
    item, which
        Number of the item, and of the class along the dimension class.
    """
    one = parts.isel({"item": item, "class": which})
    names: list[str] = []
    values: list[float] = []
    for name in one.data_vars:
        part = one[name].sum([d for d in one[name].dims if d != "layer"])
        for layer, value in zip(_layers(part), np.atleast_1d(part.values), strict=True):
            names.append(str(name) if layer is None else f"{name} {layer}")
            values.append(float(value))
    names.append("logit")
    values.append(float(one["logit"]))
    colours = ["tab:red" if v < 0 else "tab:blue" for v in values[:-1]] + ["0.3"]
    axes.barh(range(len(values)), values, color=colours)
    axes.set_yticks(range(len(values)), names, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", lw=0.8)
    axes.set_xlabel(f"share of the logit of class {one['class'].item()}")


def _layers(part: xr.DataArray) -> Sequence[int | None]:
    return part["layer"].values.tolist() if "layer" in part.dims else [None]


def _labels(array: xr.DataArray, dim: str) -> list[str]:
    if dim in array.coords:
        return [str(v) for v in array[dim].values]
    return [str(n) for n in range(array.sizes[dim])]
