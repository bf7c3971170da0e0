"""Sum the moments of stored values, a stripe at a time.

Of a stripe with n rows and its first row c as shift: ``s1 = sum(x - c)``, ``s2 = sum((x - c)**2)``,
``mean = c + s1 / n``, ``m2 = s2 - s1**2 / n``. Any value of the set as shift keeps the subtraction
exact to a few roundings. Sums run in float32 over the rows in their order, those of stripes in
float64, so that the bits are the same whoever sums: numpy in several passes, or the loop that
numba compiles (the extra ``fast``) in one, at a fifth of the time.

Legend: n tokens, d channels.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from actstore import layout
from actstore.compile import compile_loop
from actstore.stats import ChannelStats

_BITS: dict[str, tuple[Any, Any]] = {
    "float16": (np.uint16, np.uint16(0x7FFF)),
    "bfloat16": (np.uint16, np.uint16(0x7FFF)),
    "float32": (np.uint32, np.uint32(0x7FFFFFFF)),
    "int8": (np.int8, np.int8(0)),
}
"""Activation dtype -> integer type of its bits and the mask of all but the sign."""

Sums = tuple[Float32[np.ndarray, " d"], Float32[np.ndarray, " d"], Float64[np.ndarray, " d"]]
"""s1, s2, and the largest magnitude of each channel."""

_WIDEN = {
    "float16": (np.int32(13), np.int32(~0x70000000), np.float32(2.0**112)),
    "bfloat16": (np.int32(16), np.int32(-1), np.float32(1)),
}
"""What makes float32 of 16 bits: places to shift, bits to keep, factor; see `layout.widen`."""


class MomentSum:
    """Moments of stored values, a stripe at a time, in reused scratch memory.

    `loop` sums values of 16 bits in one pass: `sum_rows`, compiled where numba is installed; with
    None numpy does, as it does for other dtypes.
    """

    def __init__(self, dtype: str, rows: int, channels: int, loop: Any = "compiled") -> None:
        self._dtype = dtype
        # numpy does not sum a single channel row after row, but pairwise.
        fits = dtype in _WIDEN and channels > 1
        self._loop: Any = (compile_loop(sum_rows) if loop == "compiled" else loop) if fits else None
        if self._loop is None:
            self._wide = np.empty((rows, channels), np.int32)
            self._bits = np.empty((rows, channels), _BITS[dtype][0])
        self._total = ChannelStats.empty(channels)

    def add(self, values: Shaped[np.ndarray, "n d"]) -> None:
        """Add stored values, at most as many rows as there is room for."""
        count = len(values)
        if not count:
            return
        shift = layout.from_stored(values[0], self._dtype)
        with np.errstate(invalid="ignore", over="ignore"):  # the magnitudes tell
            s1, s2, absmax = (self._in_passes if self._loop is None else self._at_once)(
                values, shift
            )
        finite = np.isfinite(absmax)
        mean = m2 = np.where(finite, 0.0, np.nan)
        if finite.all():
            first, second = s1.astype(np.float64), s2.astype(np.float64)
            mean, m2 = shift + first / count, np.maximum(second - first**2 / count, 0.0)
        self._total = self._total.merge(ChannelStats(count=count, mean=mean, m2=m2, absmax=absmax))

    @property
    def total(self) -> ChannelStats:
        """Moments of all values so far; not finite in `absmax` where a value was not."""
        return self._total

    def _at_once(self, values: Shaped[np.ndarray, "n d"], shift: Float32[np.ndarray, " d"]) -> Sums:
        """Return s1, s2 and the largest magnitudes by the loop."""
        s1, s2 = np.zeros_like(shift), np.zeros_like(shift)
        top = np.zeros(len(shift), np.int16)
        self._loop(values.view(np.int16), *_WIDEN[self._dtype], shift, s1, s2, top)
        return s1, s2, self._magnitude(top.view(np.uint16))

    def _in_passes(
        self, values: Shaped[np.ndarray, "n d"], shift: Float32[np.ndarray, " d"]
    ) -> Sums:
        """Return s1, s2 and the largest magnitudes by numpy."""
        x = layout.widen(values, self._dtype, self._wide[: len(values)])
        np.subtract(x, shift, out=x)
        s1 = np.add.reduce(x, axis=0)
        np.multiply(x, x, out=x)
        s2 = np.add.reduce(x, axis=0)
        if self._dtype == "int8":
            return s1, s2, np.abs(values.astype(np.int16)).max(axis=0).astype(np.float64)
        bits, mask = _BITS[self._dtype]
        scratch = self._bits[: len(values)]
        return s1, s2, self._magnitude(np.bitwise_and(values.view(bits), mask, out=scratch).max(0))

    def _magnitude(self, bits: np.ndarray) -> Float64[np.ndarray, " d"]:
        """Return the values of bits without sign: magnitudes order as their bits do."""
        if self._dtype != "bfloat16":
            bits = bits.view(self._dtype)
        return layout.from_stored(bits, self._dtype).astype(np.float64)


def sum_rows(
    bits: Any, left: Any, keep: Any, factor: Any, shift: Any, s1: Any, s2: Any, top: Any
) -> None:
    """Add to the last three arrays [d] what rows of 16 bits [n, d] sum up to; see the module."""
    rows, channels = bits.shape
    for row in range(rows):
        for channel in range(channels):
            b = bits[row, channel]
            x = np.int32((np.int32(b) << left) & keep).view(np.float32) * factor - shift[channel]
            s1[channel] += x
            s2[channel] += x * x
            top[channel] = max(top[channel], np.int16(b & np.int16(0x7FFF)))
