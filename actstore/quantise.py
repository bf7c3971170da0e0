"""int8 with a scale per channel: what it loses is counted, and it is widened where it is read.

    q = clip(round(x / scale), -127, 127)          half to even, in float32
    x' = q * scale

The scales are decided once, before the first part, and stand in the manifest. A value whose
rounded quotient lies outside of -127 .. 127 is saturated. Legend: d channels, n tokens.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int8, Int64, Shaped

from actstore import layout
from actstore.manifest import ArraySpec, Manifest
from actstore.stats import ChannelStats

if TYPE_CHECKING:
    from actstore.selection import Selection

CALIBRATION = 256
"""Items that the scales of a harvest are taken from, the first of the plan."""

LIMIT = 127
"""Largest magnitude of a stored value."""

HEADROOM = 1.25
"""How far beyond the largest value of the calibration a scale reaches."""

DEVIATIONS = 5.0
"""Standard deviations from the mean that a scale reaches at least."""

_FLOOR = 2.0**-10
"""Least range of a channel, of the median one: a channel that was silent may speak later."""

_BLOCK = 256
"""Rows handled at a time: they stay in the second-level cache."""

MOST = 1e300
"""Bound of a sum of squared errors."""


def calibrated(moments: ChannelStats) -> Float32[np.ndarray, " d"]:
    """Return scales from the moments of the first items.

    ``range = max(1.25 absmax, |mean| + 5 std)``, at least 2**-10 of the median range of the
    array; ``scale = range / 127``. An array that is zero throughout gets the scale 1.
    """
    wide = np.abs(moments.mean) + DEVIATIONS * moments.std
    return _scales(np.maximum(HEADROOM * moments.absmax, wide))


def exact(moments: ChannelStats) -> Float32[np.ndarray, " d"]:
    """Return the scales that saturate nothing, from the moments of all values."""
    return _scales(moments.absmax)


def _scales(reach: Float64[np.ndarray, " d"]) -> Float32[np.ndarray, " d"]:
    positive = reach[reach > 0]
    if not len(positive):
        return np.ones(len(reach), dtype=np.float32)
    reach = np.maximum(reach, _FLOOR * np.median(positive))
    scale: np.ndarray = np.maximum(reach / LIMIT, 2.0**-100).astype(np.float32)
    return scale


def quantise(
    values: Shaped[np.ndarray, "... d"], scale: Float32[np.ndarray, " d"]
) -> tuple[Int8[np.ndarray, "... d"], Int64[np.ndarray, " d"], Float64[np.ndarray, " d"]]:
    """Return finite values as int8, how many saturate, and the sum of squared errors."""
    flat = values.reshape(-1, len(scale))
    out = np.empty(flat.shape, np.int8)
    saturated = np.zeros(len(scale), np.int64)
    error = np.zeros(len(scale))
    with np.errstate(over="ignore"):
        for at in range(0, len(flat), _BLOCK):
            x = flat[at : at + _BLOCK].astype(np.float32)
            x /= scale
            q = np.rint(x)
            beyond = np.abs(q) > LIMIT
            if beyond.any():
                saturated += np.count_nonzero(beyond, axis=0)
                np.clip(q, -LIMIT, LIMIT, out=q)
            out[at : at + _BLOCK] = q
            x -= q
            error += np.einsum("ij,ij->j", x, x)
        error *= scale.astype(np.float64) ** 2
    return out.reshape(values.shape), saturated, np.minimum(error, MOST)


class Loss:
    """What quantising one part lost, by channel."""

    def __init__(self, channels: int) -> None:
        self.saturated: Int64[np.ndarray, " d"] = np.zeros(channels, np.int64)
        self.error: Float64[np.ndarray, " d"] = np.zeros(channels)

    def clear(self) -> None:
        """Forget everything."""
        self.saturated[:], self.error[:] = 0, 0

    def add(self, saturated: np.ndarray, error: np.ndarray) -> None:
        """Add what some more values lost."""
        self.saturated += saturated
        self.error += error


def to_float(
    values: Shaped[np.ndarray, "... d"], manifest: Manifest, array: ArraySpec
) -> Float32[np.ndarray, "... d"]:
    """Return stored values of an array as float32."""
    scale = manifest.scale(array)
    if scale is None:
        return layout.from_stored(values, manifest.dtype)
    wide: np.ndarray = np.multiply(values, scale, dtype=np.float32)
    return wide


class Dequantiser:
    """Widens rows [n, sum d] of a selection, each by the scales of its site and token kind.

    Attributes
    ----------
    table : float32 array [kind, sum d]
        Scales of every kind, sites side by side.
    kind_of : int64 array [token]
        Row of `table` for a token number.
    """

    def __init__(self, selection: "Selection") -> None:
        store = selection.store
        specs = [[store.spec(site, kind) for site in selection.sites] for kind in selection.kinds]
        rows = [np.concatenate([_or_ones(store.manifest, a) for a in one]) for one in specs]
        self.table: Float32[np.ndarray, "kind width"] = np.stack(rows)
        ends = [one[0].first + one[0].span for one in specs]
        self.kind_of: Int64[np.ndarray, " token"] = np.zeros(max(ends), np.int64)
        for number, (one, end) in enumerate(zip(specs, ends, strict=True)):
            self.kind_of[one[0].first : end] = number

    def __call__(
        self, values: Int8[np.ndarray, "n width"], token: Shaped[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n width"]:
        """Return rows as float32."""
        scale: Any = self.table[0]
        if len(self.table) > 1:
            scale = self.table[self.kind_of[token]]
        wide: np.ndarray = np.multiply(values, scale, dtype=np.float32)
        return wide


def _or_ones(manifest: Manifest, array: ArraySpec) -> np.ndarray:
    scale = manifest.scale(array)
    return np.ones(array.channels, np.float32) if scale is None else scale


def dequantiser(selection: "Selection") -> Dequantiser | None:
    """Return what widens the rows of a selection, None where they are stored plainly."""
    return Dequantiser(selection) if selection.store.manifest.scales else None
