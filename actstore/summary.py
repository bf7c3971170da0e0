"""What the values of a store are like: by channel, by position, and the tokens that stand out.

For an array with values x[item, token, channel]: the root mean square of a channel,
``rms[c] = sqrt(mean(x[:, :, c]**2))``, comes from the statistics of the store. One pass of dask,
a part at a time, gives for every position the root mean square norm,
``norm[t] = sqrt(mean_i(|x[i, t]|**2))``, its largest absolute value, and the tokens of largest
norm.

A channel stands out when its rms is more than `OUTLIER_CHANNEL` times the median one; a token
when its norm is more than `OUTLIER_TOKEN` times the median norm of its kind, as the high-norm
tokens of Darcet et al. 2024 (arXiv 2309.16588) do; it is a massive activation when a single value
makes up most of it (`MASSIVE` of the square; after Sun et al. 2024, arXiv 2402.17762).
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:
    from actstore.manifest import ArraySpec
    from actstore.store import Store

OUTLIER_CHANNEL = 6.0
"""Multiple of the median rms from which on a channel stands out."""

OUTLIER_TOKEN = 3.0
"""Multiple of the median norm from which on a token stands out."""

MASSIVE = 0.5
"""Share of a token's squared norm from which on its largest value is massive."""

TOP = 16
"""Tokens of largest norm and channels of largest rms that are listed."""

_BINS = 4096
"""Bins of norms, 16 an octave from 2**-128 on: medians are right to 2.2 %."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySummary:
    """Summary of one token kind of one site."""

    site: str
    """The site."""
    kind: str
    """The token kind."""
    tokens: int
    """Tokens seen: items times positions."""
    rms: Float[np.ndarray, " channel"]
    """Root mean square of each channel."""
    absmax: Float[np.ndarray, " channel"]
    """Largest absolute value of each channel."""
    position_norm: Float[np.ndarray, " token"]
    """Root mean square norm at each position."""
    position_absmax: Float[np.ndarray, " token"]
    """Largest absolute value at each position."""
    median_norm: float
    """Median norm of a token, to 2.2 %."""
    outlier_tokens: int
    """Tokens that stand out, by the median of the bins: to one bin of 4.4 %."""
    top: tuple[dict[str, Any], ...]
    """Tokens of largest norm: item (row of the table), token, norm, channel, value, massive."""
    saturated: int | None
    """Values beyond the range of int8; None where the store is not quantised."""
    fvu: float | None
    """Fraction of variance that int8 lost; None where nothing is known or nothing varies."""

    @property
    def norm(self) -> float:
        """Root mean square norm of a token."""
        return math.sqrt(float((self.rms**2).sum()))

    @property
    def outlier_channels(self) -> Int[np.ndarray, " n"]:
        """Channels that stand out, largest rms first."""
        order = np.argsort(-self.rms, kind="stable")
        found: np.ndarray = order[self.rms[order] > OUTLIER_CHANNEL * np.median(self.rms)]
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        out = dataclasses.asdict(self)
        found = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in out.items()}
        found["top"] = list(self.top)
        return {**found, "norm": self.norm, "outlier_channels": self.outlier_channels.tolist()}


def summarise(
    store: "Store", sites: Sequence[str] | None = None, *, scheduler: Any = None
) -> list[ArraySummary]:
    """Return a summary of every array of some sites, all by default.

    Memory is bounded by the chunk of a part, in float32 and twice, for each thread.

    Parameters
    ----------
    store
        The store; its readable items are summarised.
    sites
        Names of sites.
    scheduler
        What dask computes with: a client of a cluster, ``"threads"``, ``"sync"``; dask's own
        choice by default.

    Raises
    ------
    ValueError
        When no item is readable.
    """
    if not store.n_items:
        raise ValueError(f"{store.url} has no readable items yet: harvest goes on with it")
    chosen = store.sites if sites is None else tuple(sites)
    return [_one(store, site, kind, scheduler) for site in chosen for kind in store.kinds(site)]


def _one(store: "Store", site: str, kind: str, scheduler: Any) -> ArraySummary:
    dask: Any = importlib.import_module("dask")
    moments = store.stats(site, kind)
    mounted = store.dask(site, kind)
    blocks = mounted.to_delayed().ravel().tolist()
    starts = np.cumsum([0, *mounted.chunks[0]])
    part = dask.delayed(_part, pure=True)
    spec, table = store.spec(site, kind), store.table()["position"].to_numpy()
    tasks = [
        part(block, int(start), _place(store, spec, table[start:stop]), spec.span)
        for block, start, stop in zip(blocks, starts[:-1], starts[1:], strict=True)
    ]
    options = {} if scheduler is None else {"scheduler": scheduler}
    found = dask.compute(*tasks, **options)
    counts = sum(one["bins"] for one in found)
    seen = sum(one["seen"] for one in found)
    total = int(counts.sum())
    median_bin = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
    from_bin = min(_BINS, median_bin + round(16 * math.log2(OUTLIER_TOKEN)))
    tokens = sorted((t for one in found for t in one["top"]), key=lambda t: -t["norm"])[:TOP]
    return ArraySummary(
        site=site,
        kind=kind,
        tokens=total,
        rms=np.sqrt(moments.var + moments.mean**2),
        absmax=moments.absmax,
        position_norm=np.sqrt(sum(one["squares"] for one in found) / np.maximum(1, seen)),
        position_absmax=np.max([one["absmax"] for one in found], axis=0),
        median_norm=float(2.0 ** ((median_bin + 0.5) / 16 - 128)) if median_bin else 0.0,
        outlier_tokens=int(counts[from_bin + 1 :].sum()) if median_bin else 0,
        top=tuple(tokens),
        saturated=None if moments.saturated is None else int(moments.saturated.sum()),
        fvu=moments.fvu if moments.fvu is not None and math.isfinite(moments.fvu) else None,
    )


def _place(
    store: "Store", spec: "ArraySpec", positions: Int[np.ndarray, " item"]
) -> Int[np.ndarray, "item token"] | None:
    """Return which position of the kind each token is, None where all are stored."""
    if not spec.of:
        return None
    where: np.ndarray = store.tokens(positions, spec.site, spec.kind) - spec.first
    return where


def _part(
    values: Float[np.ndarray, "item token channel"],
    start: int,
    place: Int[np.ndarray, "item token"] | None,
    span: int,
) -> dict[str, Any]:
    """Return what one part adds; `start` is the row of its first item."""
    if place is None:
        place = np.broadcast_to(np.arange(span), values.shape[:2])
    magnitude = np.abs(values)
    squares = np.einsum("itc,itc->it", values, values, dtype=np.float64)
    norms = np.sqrt(squares)
    with np.errstate(divide="ignore"):
        step = np.floor(16 * (np.log2(norms) + 128))
    bins = np.bincount(step.clip(0, _BINS - 1).astype(np.int64).ravel(), minlength=_BINS)
    top = []
    for flat in np.argsort(-norms, axis=None, kind="stable")[:TOP].tolist():
        item, slot = divmod(flat, norms.shape[1])
        channel = int(magnitude[item, slot].argmax())
        value = float(values[item, slot, channel])
        massive = bool(value**2 > MASSIVE * squares[item, slot])
        top.append(
            {
                "item": start + item,
                "token": int(place[item, slot]),
                "norm": float(norms[item, slot]),
                "channel": channel,
                "value": value,
                "massive": massive,
            }
        )
    flat_place = place.ravel()
    largest = np.zeros(span)
    np.maximum.at(largest, flat_place, magnitude.max(axis=2).ravel())
    return {
        "squares": np.bincount(flat_place, weights=squares.ravel(), minlength=span),
        "seen": np.bincount(flat_place, minlength=span),
        "absmax": largest,
        "bins": bins,
        "top": top,
    }
