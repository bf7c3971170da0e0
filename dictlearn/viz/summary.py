"""One look at the dictionaries of several layers: L0, firing rates, what some latents fire on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dictlearn.analysis import Sparsity
    from dictlearn.report import Report

_RATE_EDGES = np.linspace(-5, 0, 26)


def l0_by_layer(axes: Axes, reports: Mapping[str, Report]) -> None:
    """Draw L0 of every token kind against the layer.

    Parameters
    ----------
    axes
        Where to draw.
    reports
        Name of a layer -> its report, in order.
    """
    kinds = list(dict.fromkeys(kind for r in reports.values() for kind in r.l0_by_kind))
    for kind in kinds:
        values = [r.l0_by_kind.get(kind, np.nan) for r in reports.values()]
        axes.plot(range(len(values)), values, marker="o", label=kind)
    axes.set_xticks(range(len(reports)), list(reports))
    axes.set_ylabel("active latents a token (L0)")
    axes.set_ylim(0, 1.25 * max(r.l0 for r in reports.values()))
    axes.set_xlabel("layer")
    axes.legend(frameon=False, loc="lower right")


def firing_rates(axes: Axes, found: Mapping[str, Sparsity]) -> None:
    """Draw the distribution of log10 firing rates, a line a layer, and tell the dead share.

    Parameters
    ----------
    axes
        Where to draw.
    found
        Name of a layer -> its sparsity, in order.
    """
    for name, sparsity in found.items():
        alive = sparsity.rate[sparsity.rate > 0]
        count, _ = np.histogram(np.log10(alive).clip(_RATE_EDGES[0]), bins=_RATE_EDGES)
        middle = (_RATE_EDGES[:-1] + _RATE_EDGES[1:]) / 2
        axes.plot(
            middle, count, drawstyle="steps-mid", label=f"layer {name}, {sparsity.dead:.0%} dead"
        )
    axes.set_xlabel("log10 of the share of tokens a latent fires on")
    axes.set_ylabel("latents")
    axes.legend(frameon=False, fontsize=8)


def latents_to_show(sparsity: Sparsity, count: int) -> Int[np.ndarray, " n"]:
    """Return the `count` latents of largest activation among those that are selective.

    Selective ones fire on at least 20 and at most 2 % of the patches (of all tokens, where there
    are no patches).
    """
    kind = sparsity.kinds.index("patch") if "patch" in sparsity.kinds else 0
    fired, tokens = sparsity.fired[kind], int(sparsity.tokens[kind])
    fits = (fired >= 20) & (fired <= 0.02 * tokens)
    if not fits.any():
        fits = fired > 0
    order = np.argsort(-np.where(fits, sparsity.largest[kind], -np.inf), kind="stable")
    shown: np.ndarray = order[: min(count, int(fits.sum()))]
    return shown


def top_patches(
    axes: Sequence[Axes],
    sparsity: Sparsity,
    latent: int,
    *,
    image: Callable[[int], Any],
    box: Callable[[int], tuple[float, float, float, float] | None],
) -> None:
    """Draw the best items of one latent, its token outlined.

    Parameters
    ----------
    axes
        One for each item drawn.
    sparsity
        Computed with ``top`` at least the number of axes.
    latent
        Number of the latent.
    image
        Item of the store -> picture that matplotlib can draw.
    box
        Token -> (left, top, width, height) as fractions of the picture; None for tokens, such as
        CLS, that lie nowhere.
    """
    from matplotlib.patches import Rectangle

    columns = {name: np.asarray(sparsity.top[name]) for name in sparsity.top.column_names}
    rows = np.flatnonzero(columns["latent"] == latent)
    rows = rows[np.argsort(columns["rank"][rows])]
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
    for ax, row in zip(axes, rows.tolist(), strict=False):
        picture = np.asarray(image(int(columns["position"][row])))
        ax.imshow(picture, cmap="gray", extent=(0, 1, 1, 0))
        where = box(int(columns["token"][row]))
        ax.set_title(f"{columns['value'][row]:.1f}" + ("" if where else " cls"), fontsize=6, pad=1)
        if where:
            left, top, width, height = where
            frame = Rectangle((left, top), width, height, fill=False, color="tab:red", lw=1.2)
            ax.add_patch(frame)
    if len(axes):
        axes[0].set_ylabel(f"{latent}", rotation=0, ha="right", va="center", fontsize=7)


def patch_box(
    first: int, grid: Sequence[int]
) -> Callable[[int], tuple[float, float, float, float] | None]:
    """Return the `box` of `top_patches` for patches (height, width) that start at token `first`."""
    height, width = grid[-2:]

    def box(token: int) -> tuple[float, float, float, float] | None:
        place = token - first
        if not 0 <= place < height * width:
            return None
        row, column = divmod(place, width)
        return column / width, row / height, 1 / width, 1 / height

    return box


def summary(
    reports: Mapping[str, Report],
    found: Mapping[str, Sparsity],
    *,
    layer: str,
    image: Callable[[int], Any],
    box: Callable[[int], tuple[float, float, float, float] | None],
    latents: int = 6,
    items: int = 10,
) -> Figure:
    """Return a figure of L0 and firing rates by layer, and the best patches of some latents.

    Parameters
    ----------
    reports, found
        Name of a layer -> its report and its sparsity, in the same order.
    layer
        Layer whose latents are shown.
    image, box
        See `top_patches`.
    latents, items
        How many latents, and how many items of each.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4 + 0.75 * latents), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=(3.0, 0.75 * latents))
    upper, lower = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    left, right = upper.subplots(1, 2)
    l0_by_layer(left, reports)
    firing_rates(right, found)
    lower.suptitle(
        f"what latents of layer {layer} fire on most, and how strongly; its number is at the left"
    )
    chosen = latents_to_show(found[layer], latents)
    grid = lower.subplots(max(1, len(chosen)), items, squeeze=False)
    for axes, latent in zip(grid, chosen.tolist(), strict=False):
        top_patches(list(axes), found[layer], latent, image=image, box=box)
    return figure
