"""Training units: what a store's statistics say about each site, and how dictionaries use it.

A site is divided by ``sqrt(mean over channels of the variance)``, so that a mean squared error is a
fraction of the site's variance, whatever its scale. Shapes: d = channels of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from dictlearn.dictionary import Dictionary

if TYPE_CHECKING:
    from actstore.aligned import Aligned
    from actstore.store import Store


@dataclass(frozen=True, kw_only=True)
class SiteScale:
    """Factor and mean of one site."""

    factor: float
    """What activations are multiplied by in training."""
    mean_d: Float[np.ndarray, " d"]
    """Mean of the raw activations."""
    variance: float
    """Mean over channels of the variance of the raw activations."""


def site_scales(
    store: Store | Aligned, sites: Sequence[str], kinds: Sequence[str], normalize: str = "scale"
) -> dict[str, SiteScale]:
    """Merge the statistics of `kinds` for every site.

    Raises
    ------
    ValueError
        A site never varies, or its statistics are not finite.
    """
    scales = {}
    for site in sites:
        stats = reduce(lambda a, b: a.merge(b), (store.stats(site, kind) for kind in kinds))
        variance = float(stats.var.mean())
        if not np.isfinite(variance) or variance <= 0:
            raise ValueError(
                f"{site} of {store.url} has mean channel variance {variance} over its "
                f"{', '.join(kinds)} tokens: nothing can be learned from it. Check the store with "
                f"`actstore verify {store.url}`"
            )
        factor = variance**-0.5 if normalize == "scale" else 1.0
        scales[site] = SiteScale(factor=factor, mean_d=stats.mean, variance=variance)
    return scales


@torch.no_grad()
def init_from(dictionary: Dictionary, scales: Mapping[str, SiteScale]) -> None:
    """Set b_dec (and b_in) to the sites' means, in training units."""

    def mean(sites: Mapping[str, int]) -> torch.Tensor:
        parts = [torch.from_numpy(scales[s].mean_d * scales[s].factor) for s in sites]
        return torch.cat(parts).float()

    dictionary.b_dec.copy_(mean(dictionary.config.writes))
    if dictionary.config.input.center == "b_in":
        dictionary.b_in.copy_(mean(dictionary.config.reads))


def check_sites(dictionary: Dictionary, store: Store | Aligned) -> None:
    """Refuse a dictionary whose sites the store lacks, or holds in another width.

    Raises
    ------
    KeyError
        A site is not in the store; the message is the store's and names the nearest.
    ValueError
        The widths differ.
    """
    config = dictionary.config
    for site, width in {**config.reads, **config.writes}.items():
        kind = store.kinds(site)[0]
        found = store.spec(site, kind).channels
        if found != width:
            raise ValueError(
                f"the dictionary has {width} channels at {site!r}, {store.url} stores {found}"
            )


def factors(scales: Mapping[str, SiteScale]) -> dict[str, float]:
    """Return the factors alone, as `Dictionary.rescale_sites` takes them."""
    return {site: scale.factor for site, scale in scales.items()}


def factor_row(scales: Mapping[str, SiteScale], slices: Mapping[str, slice]) -> torch.Tensor:
    """Factor of every channel of a batch with these slices."""
    width = max(s.stop for s in slices.values())
    row = torch.ones(width)
    for site, channels in slices.items():
        row[channels] = scales[site].factor
    return row


def describe(scales: Mapping[str, SiteScale]) -> dict[str, Any]:
    """JSON-able factors and variances."""
    return {s: {"factor": v.factor, "variance": v.variance} for s, v in scales.items()}
