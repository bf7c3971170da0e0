"""Moments of every channel, exact to merge in any order of parts.

For n values x of a channel: ``mean = sum(x) / n``, ``m2 = sum((x - mean)**2)``. Two sets merge
by Chan, Golub and LeVeque (1979): with ``delta = mean_b - mean_a`` and ``n = n_a + n_b``,
``mean = mean_a + delta * n_b / n``, ``m2 = m2_a + m2_b + delta**2 * n_a * n_b / n``.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, Shaped

from actstore import layout

_BITS: dict[str, tuple[Any, Any]] = {
    "float16": (np.uint16, np.uint16(0x7FFF)),
    "bfloat16": (np.uint16, np.uint16(0x7FFF)),
    "float32": (np.uint32, np.uint32(0x7FFFFFFF)),
    "int8": (np.int8, np.int8(0)),
}
"""Activation dtype -> integer type of its bits and the mask of all but the sign."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChannelStats:
    """Moments of one array of a store, a value a channel, in float64."""

    count: int
    """Number of tokens seen."""
    mean: Float[np.ndarray, " channel"]
    """Mean of each channel."""
    m2: Float[np.ndarray, " channel"]
    """Sum of squared deviations from the mean."""
    absmax: Float[np.ndarray, " channel"]
    """Largest absolute value."""
    saturated: Int64[np.ndarray, " channel"] | None = None
    """Values beyond the range of int8 with a scale; None for other stores."""
    error: Float[np.ndarray, " channel"] | None = None
    """Sum of squared errors of int8 with a scale; None for other stores."""

    @property
    def var(self) -> Float[np.ndarray, " channel"]:
        """Population variance of each channel."""
        return self.m2 / max(1, self.count)

    @property
    def std(self) -> Float[np.ndarray, " channel"]:
        """Population standard deviation of each channel."""
        std: np.ndarray = np.sqrt(self.var)
        return std

    @property
    def fvu(self) -> float | None:
        """Squared error of the quantisation over the variance, of all channels together."""
        if self.error is None:
            return None
        error, total = float(self.error.sum()), float(self.m2.sum())
        return error / total if total else (math.inf if error else 0.0)

    def scaled(self, scale: Float[np.ndarray, " channel"]) -> "ChannelStats":
        """Return the moments of the values times a positive scale of each channel."""
        wide = scale.astype(np.float64)
        return dataclasses.replace(
            self, mean=self.mean * wide, m2=self.m2 * wide**2, absmax=self.absmax * wide
        )

    @classmethod
    def empty(cls, channels: int) -> "ChannelStats":
        """Return the moments of no value."""
        zero = np.zeros(channels)
        return cls(count=0, mean=zero, m2=zero.copy(), absmax=zero.copy())

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """Return the moments of both sets together."""
        count = self.count + other.count
        if not self.count or not count:
            return other if other.count else self
        delta = other.mean - self.mean
        return ChannelStats(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
            absmax=np.maximum(self.absmax, other.absmax),
            saturated=_sum(self.saturated, other.saturated),
            error=_sum(self.error, other.error),
        )


def _sum(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """Return the sum, None where one of the two is not known."""
    return None if one is None or other is None else one + other


class MomentSum:
    """Moments of stored values, a stripe at a time, in reused scratch memory.

    Of a stripe with n rows and its first row c as shift (float32, then float64):
    ``s1 = sum(x - c)``, ``s2 = sum((x - c)**2)``, ``mean = c + s1 / n``, ``m2 = s2 - s1**2 / n``.
    Any value of the set as shift keeps the subtraction exact to a few roundings.
    """

    def __init__(self, dtype: str, rows: int, channels: int) -> None:
        self._dtype = dtype
        self._wide = np.empty((rows, channels), np.int32)
        self._bits = np.empty((rows, channels), _BITS[dtype][0])
        self._ones = np.ones(rows, np.float32)
        self._total = ChannelStats.empty(channels)

    def add(self, values: Shaped[np.ndarray, "token channel"]) -> None:
        """Add stored values, at most as many rows as there is room for."""
        count = len(values)
        if not count:
            return
        absmax = self._absmax(values)
        if not np.isfinite(absmax).all():
            undefined = np.where(np.isfinite(absmax), 0.0, np.nan)
            moments = (undefined, undefined)
        else:
            x = layout.widen(values, self._dtype, self._wide[:count])
            shift = x[0].copy()
            np.subtract(x, shift, out=x)
            s1 = (self._ones[:count] @ x).astype(np.float64)
            s2 = np.einsum("ij,ij->j", x, x).astype(np.float64)
            moments = (shift + s1 / count, np.maximum(s2 - s1**2 / count, 0.0))
        mean, m2 = moments
        self._total = self._total.merge(ChannelStats(count=count, mean=mean, m2=m2, absmax=absmax))

    def _absmax(self, values: np.ndarray) -> Float[np.ndarray, " channel"]:
        """Return the largest magnitude of a channel: magnitudes order as their bits do."""
        if self._dtype == "int8":
            top = np.abs(values.astype(np.int16)).max(axis=0)
            return np.asarray(top, dtype=np.float64)
        bits, mask = _BITS[self._dtype]
        scratch = self._bits[: len(values)]
        top = np.bitwise_and(values.view(bits), mask, out=scratch).max(axis=0)
        if self._dtype == "bfloat16":
            return layout.from_stored(top, "bfloat16").astype(np.float64)
        return np.asarray(top.view(self._dtype), dtype=np.float64)

    @property
    def total(self) -> ChannelStats:
        """Moments of all values so far; not finite in `absmax` where a value was not."""
        return self._total
