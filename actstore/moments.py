"""Sum the moments of stored values, a stripe at a time while it is in the cache.

Of a stripe with n rows and its first row c as shift: ``s1 = sum(x - c)``, ``s2 = sum((x - c)**2)``,
``mean = c + s1 / n``, ``m2 = s2 - s1**2 / n``. Any value of the set as shift keeps the subtraction
exact to a few roundings. Of m stripes with n rows each: ``mean = sum(mean_i) / m``,
``m2 = sum(m2_i) + n * sum((mean_i - mean)**2)``. A stripe's sums run in float32 over its rows in
their order, all else in float64, so that the bits are the same whoever sums: numpy in several
passes, or the loop that numba compiles (the extra ``fast``) in one, at a quarter of the time.

Legend: m stripes, n rows, d channels.
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
}
"""Activation dtype -> integer type of its bits and the mask of all but the sign."""

_WIDEN = {
    "float16": (np.int32(1 << 13), np.int32(~0x70000000), np.float32(2.0**112)),
    "bfloat16": (np.int32(1 << 16), np.int32(-1), np.float32(1)),
}
"""What makes float32 of 16 bits: a factor that shifts them, bits to keep, a factor of the float;
see `layout.widen`."""

_Sums = tuple[Float32[np.ndarray, "m d"], Float32[np.ndarray, "m d"], Float64[np.ndarray, " d"]]
"""s1, s2, and the largest magnitude of each channel."""


def channel_moments(
    values: Shaped[np.ndarray, "m n d"], dtype: str, rows: int | None = None, loop: Any = "compiled"
) -> ChannelStats:
    """Return the moments of every channel of stored values of an activation dtype.

    Of each stripe the first `rows` are taken, all by default; `absmax` is not finite where a value
    is not. `loop` sums values of 16 bits in one pass: `sum_rows`, compiled where numba is
    installed; with None numpy does, as it does for other dtypes.
    """
    stripes, planned, channels = values.shape
    rows = planned if rows is None else rows
    if not stripes * rows:
        return ChannelStats.empty(channels)
    # numpy does not sum a single channel row after row, but pairwise.
    fits = dtype in _WIDEN and channels > 1
    loop = (compile_loop(sum_rows) if loop == "compiled" else loop) if fits else None
    shift = layout.from_stored(values[:, 0], dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # the magnitudes tell
        if loop is None:
            s1, s2, absmax = _in_passes(values[:, :rows], dtype, shift)
        else:
            s1, s2 = np.zeros_like(shift), np.zeros_like(shift)
            top = np.zeros(channels, np.int16)
            loop(values.view(np.int16), rows, *_WIDEN[dtype], shift, s1, s2, top)
            absmax = _magnitude(top.view(np.uint16), dtype)
    finite = np.isfinite(absmax)
    mean = m2 = np.where(finite, 0.0, np.nan)
    if finite.all():
        first, second = s1.astype(np.float64), s2.astype(np.float64)
        each = shift + first / rows
        mean = each.mean(axis=0)
        m2 = np.maximum(second - first**2 / rows, 0.0).sum(axis=0)
        m2 += rows * ((each - mean) ** 2).sum(axis=0)
    return ChannelStats(count=stripes * rows, mean=mean, m2=m2, absmax=absmax)


def _in_passes(
    values: Shaped[np.ndarray, "m n d"], dtype: str, shift: Float32[np.ndarray, "m d"]
) -> _Sums:
    """Return s1, s2 and the largest magnitudes by numpy, in memory for one stripe."""
    wide = np.empty(values.shape[1:], np.int32)
    s1, s2 = np.empty_like(shift), np.empty_like(shift)
    top = np.zeros(values.shape[2], np.int16 if dtype == "int8" else _BITS[dtype][0])
    for number, stripe in enumerate(values):
        x = layout.widen(stripe, dtype, wide)
        np.subtract(x, shift[number], out=x)
        np.add.reduce(x, axis=0, out=s1[number])
        np.multiply(x, x, out=x)
        np.add.reduce(x, axis=0, out=s2[number])
        if dtype == "int8":
            magnitude = np.abs(stripe.astype(np.int16))
        else:
            bits, mask = _BITS[dtype]
            magnitude = stripe.view(bits) & mask
        np.maximum(top, magnitude.max(axis=0), out=top)
    return s1, s2, _magnitude(top, dtype)


def _magnitude(bits: np.ndarray, dtype: str) -> Float64[np.ndarray, " d"]:
    """Return the values of bits without sign: magnitudes order as their bits do."""
    if dtype == "bfloat16":
        return layout.from_stored(bits, dtype).astype(np.float64)
    return np.asarray(bits if dtype == "int8" else bits.view(dtype), dtype=np.float64)


def sum_rows(
    values: Any,
    rows: int,
    times: Any,
    keep: Any,
    factor: Any,
    shift: Any,
    s1: Any,
    s2: Any,
    top: Any,
) -> None:
    """Add to s1 and s2 [m, d] and to top [d] what 16-bit values [m, n, d] sum up to."""
    stripes, _, channels = values.shape
    for stripe in range(stripes):
        c, first, second = shift[stripe], s1[stripe], s2[stripe]
        for row in range(rows):
            bits = values[stripe, row]
            for d in range(channels):
                # A product, not a shift: by a variable numba shifts 64 bits, half at a time.
                x = np.int32((np.int32(bits[d]) * times) & keep).view(np.float32) * factor - c[d]
                first[d] += x
                second[d] += x * x
                top[d] = max(top[d], np.int16(bits[d] & np.int16(0x7FFF)))
