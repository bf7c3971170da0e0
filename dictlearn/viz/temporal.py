"""Latents over time, drawn from what `dictlearn.circuits.temporal` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def profile(axes: Axes, found: xr.Dataset, latents: Sequence[int], *, what: str = "rate") -> None:
    """Draw ``rate`` or ``onset`` of some latents against the frame.

    Parameters
    ----------
    axes
        Where to draw.
    found
        Of `dictlearn.circuits.temporal.over_time`.
    latents
        Their numbers.
    what
        ``rate`` or ``onset``.
    """
    for latent in latents:
        values = found[what].sel(latent=latent)
        axes.plot(found["time"].values, values.values, marker="o", ms=3, label=str(latent))
    axes.set_xlabel("frame")
    words = {"rate": "share of tracks active", "onset": "share of tracks that begin"}
    axes.set_ylabel(words.get(what, what))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, title="latent")


def persistence(axes: Axes, found: xr.Dataset, *, most_labels: int = 8) -> None:
    """Draw P(active in the next frame | active in this) against chance, a point a latent.

    Parameters
    ----------
    axes
        Where to draw.
    found
        Of `dictlearn.circuits.temporal.over_time`.
    most_labels
        Name so many latents, those farthest above chance by the logarithm of the ratio.
    """
    chance, stays = found["chance"].values, found["persistence"].values
    shown = np.isfinite(stays) & (chance > 0)
    axes.scatter(chance[shown], stays[shown], s=6, linewidths=0)
    low = float(chance[shown].min()) if shown.any() else 1e-4
    axes.plot([low, 1], [low, 1], lw=0.8, color="gray", ls="--")
    axes.set_xscale("log")
    axes.set_xlabel("share of frames active (chance)")
    axes.set_ylabel("active in the next frame, given active")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(shown & (stays > 0), np.log(stays / chance), -np.inf)
    for latent in np.argsort(-ratio, kind="stable")[: min(most_labels, int(shown.sum()))].tolist():
        axes.annotate(
            str(int(found["latent"].values[latent])),
            (chance[latent], stays[latent]),
            fontsize=6,
            xytext=(2, 2),
            textcoords="offset points",
        )


def raster(
    axes: Axes, acts_TF: Float[np.ndarray, "time latent"], latents: Sequence[int]
) -> AxesImage:
    """Draw the activations of some latents over the frames of one clip, a row a latent.

    Parameters
    ----------
    axes
        Where to draw.
    acts_TF
        Activations, every frame and latent (the largest or the mean over places).
    latents
        Rows, from above.
    """
    image = axes.imshow(acts_TF[:, list(latents)].T, aspect="auto", cmap="magma")
    axes.set_yticks(range(len(latents)), [str(n) for n in latents], fontsize=6)
    axes.set_xlabel("frame")
    axes.set_ylabel("latent")
    return image


def transition_matrix(axes: Axes, found: xr.Dataset, *, lag: int = 1) -> AxesImage:
    """Draw the lift of every pair of latents at one lag, on a logarithmic scale.

    Parameters
    ----------
    axes
        Where to draw.
    found
        Of `dictlearn.circuits.temporal.transitions`.
    lag
        One of its lags.
    """
    lift = found["lift"].sel(lag=lag).transpose("source", "target").values
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.log2(lift)
    limit = float(np.abs(shown[np.isfinite(shown)]).max(initial=1.0))
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for name, ticks in (("source", axes.set_yticks), ("target", axes.set_xticks)):
        ticks(range(found.sizes[name]), [str(n) for n in found[name].values])
    axes.set_ylabel("active")
    axes.set_xlabel(f"{lag} frames later: log2 of the lift")
    axes.tick_params(labelsize=6)
    return image
