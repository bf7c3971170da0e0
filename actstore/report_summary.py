"""What `actstore stats` shows: a table, a figure, and everything as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actstore.store import open_store
from actstore.summary import ArraySummary, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from actstore.cli import Stats


def summary_table(found: Sequence[ArraySummary]) -> Table:
    """Return a row an array."""
    table = Table(
        "site", "kind", "norm", "median", "largest", "outlier channels", "outlier tokens", "at"
    )
    quantised = any(one.saturated is not None for one in found)
    if quantised:
        table.add_column("FVU of int8")
        table.add_column("saturated")
    for one in found:
        lost = ("-" if one.fvu is None else f"{one.fvu:.1e}", f"{one.saturated or 0:,}")
        channels = ", ".join(map(str, one.outlier_channels[:4])) or "-"
        more = len(one.outlier_channels) - 4
        top = one.top[0]
        table.add_row(
            one.site,
            one.kind,
            f"{one.norm:.3g}",
            f"{one.median_norm:.3g}",
            f"{one.absmax.max():.3g}",
            channels + (f" +{more}" if more > 0 else ""),
            f"{one.outlier_tokens:,}" + (" (massive)" if top["massive"] else ""),
            f"item {top['item']} token {top['token']}",
            *(lost if quantised else ()),
        )
    return table


def summary_figure(found: Sequence[ArraySummary]) -> "Figure":
    """Draw norms by site and kind, rms of the channels by site, norms by position."""
    from matplotlib.figure import Figure

    sites = list(dict.fromkeys(one.site for one in found))
    kinds = list(dict.fromkeys(one.kind for one in found))
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    norms, channels, positions = figure.subplots(1, 3)
    for kind in kinds:
        some = [one for one in found if one.kind == kind]
        at = [sites.index(one.site) for one in some]
        norms.plot(at, [one.norm for one in some], marker="o", label=kind)
        norms.plot(at, [max(one.absmax.max(), 1e-9) for one in some], ls=":", marker=".")
        ratios = [one.rms / max(float(np.median(one.rms)), 1e-30) for one in some]
        channels.plot(at, [max(float(r.max()), 1e-3) for r in ratios], marker="o", label=kind)
    norms.set(yscale="log", ylabel="norm (rms); dotted: largest value")
    channels.set(yscale="log", ylabel="rms of the largest channel / median channel")
    channels.axhline(6, color="grey", lw=0.8, ls="--")
    for axes in (norms, channels):
        axes.set_xticks(range(len(sites)), sites, rotation=90, fontsize=7)
        axes.legend(frameon=False)
    widest = max(kinds, key=lambda k: max(len(o.position_norm) for o in found if o.kind == k))
    some = [one for one in found if one.kind == widest]
    width = max(len(one.position_norm) for one in some)
    rows = np.full((len(some), width), np.nan)
    for row, one in zip(rows, some, strict=True):
        row[: len(one.position_norm)] = one.position_norm / max(one.norm, 1e-30)
    image = positions.imshow(rows, aspect="auto", interpolation="nearest")
    positions.set_yticks(range(len(some)), [one.site for one in some], fontsize=7)
    positions.set(xlabel=f"{widest} position", title="norm by position / norm")
    figure.colorbar(image, ax=positions)
    return figure


def print_stats(config: "Stats") -> int:
    """Summarise a store, print a table, write a figure and JSON where asked for."""
    from vitmodels.spec import expand_sites

    store = open_store(config.url, config.storage_options)
    sites = expand_sites(config.sites, store.sites) if config.sites else None
    scheduler: Any = None
    if config.scheduler is not None:
        from actstore.scheduler import connect

        scheduler = connect(config.scheduler)
    try:
        found = summarise(store, sites, scheduler=scheduler)
    finally:
        if scheduler is not None:
            scheduler.close()
    console = Console()
    console.print(summary_table(found))
    console.print(f"{store.n_items:,} items of {store.manifest.items:,}", markup=False)
    if config.png is not None:
        summary_figure(found).savefig(config.png, dpi=120)
        console.print(f"figure: {config.png}", markup=False, soft_wrap=True)
    if config.json is not None:
        value = {
            "fingerprint": store.fingerprint,
            "items": store.n_items,
            "arrays": [one.to_json() for one in found],
        }
        Path(config.json).write_text(json.dumps(value, indent=1) + "\n")
        console.print(f"values: {config.json}", markup=False, soft_wrap=True)
    return 0
