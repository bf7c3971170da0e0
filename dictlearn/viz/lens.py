"""Figures of the logit lens; each draws into the Axes it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dictlearn.viz.patching import patch_grid_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def lens_by_layer(axes: Axes, lens: xr.Dataset, *, item: int = 0, count: int = 5) -> None:
    """Draw the probability of the classes that end up highest, layer by layer.

    Parameters
    ----------
    axes
        Where to draw.
    lens
        Of `dictlearn.circuits.logit_lens`.
    item
        Number of the item.
    count
        Classes drawn.
    """
    logit = lens["logit"].isel(item=item).transpose("layer", "class")
    share = _softmax(logit.values)
    order = np.argsort(-share[-1], kind="stable")[:count]
    for number in order:
        axes.plot(
            logit["layer"].values,
            share[:, number],
            marker="o",
            label=str(logit["class"].values[number]),
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("probability")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)


def lens_by_patch(
    axes: Axes,
    lens: xr.Dataset,
    *,
    layer: int,
    which: Any,
    item: int = 0,
    picture: Any = None,
    frame: int = 0,
) -> AxesImage:
    """Draw the logit of one class at every patch of one layer, less its mean over classes.

    Parameters
    ----------
    axes
        Where to draw.
    lens
        Of `dictlearn.circuits.logit_lens` with tokens.
    layer
        Layer as in the coordinate.
    which
        Class as in the coordinate (a name, or a number).
    item, picture, frame
        See `dictlearn.viz.patching.patch_grid_map`.
    """
    token = lens["token"].isel(item=item).sel(layer=layer)
    values = token.sel({"class": which}) - token.mean("class")
    return patch_grid_map(axes, values, picture, frame=frame)


def _softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(-1, keepdims=True))
    share: np.ndarray = shifted / shifted.sum(-1, keepdims=True)
    return share
