"""Moments of every channel, exact to merge in any order of parts.

For n values x of a channel: ``mean = sum(x) / n``, ``m2 = sum((x - mean)**2)``. Two sets merge
by Chan, Golub and LeVeque (1979): with ``delta = mean_b - mean_a`` and ``n = n_a + n_b``,
``mean = mean_a + delta * n_b / n``, ``m2 = m2_a + m2_b + delta**2 * n_a * n_b / n``.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int64


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
