"""Normalisation of activations from the statistics a store carries.

    y = (x - shift) * scale        by channel, over the token kinds that are read

=========== ============= ==========================================================
how         shift         scale
=========== ============= ==========================================================
center      mean          1
standard    mean          1 / standard deviation of the channel, 1 where it is zero
rms         mean          sqrt(d / sum of channel variances): E |y|^2 = d by site
=========== ============= ==========================================================
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from actstore.stats import ChannelStats

if TYPE_CHECKING:
    from actstore.store import Store

RULES = ("center", "standard", "rms")
"""Rules by name."""


def affine(
    store: "Store", sites: Sequence[str], kinds: Sequence[str], how: str
) -> tuple[Float32[np.ndarray, " width"], Float32[np.ndarray, " width"]]:
    """Return shift and scale of every channel, sites side by side.

    Raises
    ------
    ValueError
        For a rule that is not one of `RULES`.
    """
    if how not in RULES:
        raise ValueError(f"normalize {how!r} is none of {', '.join(RULES)}")
    shifts, scales = [], []
    for site in sites:
        stats: ChannelStats = functools.reduce(
            ChannelStats.merge, [store.stats(site, kind) for kind in kinds]
        )
        one = np.ones_like(stats.mean)
        if how == "center":
            scale = one
        elif how == "standard":
            scale = 1 / np.where(stats.std > 0, stats.std, one)
        else:
            total = stats.var.sum()
            scale = one * (np.sqrt(len(one) / total) if total > 0 else 1.0)
        shifts.append(stats.mean)
        scales.append(scale)
    return (
        np.concatenate(shifts).astype(np.float32),
        np.concatenate(scales).astype(np.float32),
    )
