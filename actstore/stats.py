"""Moments of every channel, exact to merge in any order of parts.

For n values x of a channel: ``mean = sum(x) / n``, ``m2 = sum((x - mean)**2)``. Two sets merge
by Chan, Golub and LeVeque (1979): with ``delta = mean_b - mean_a`` and ``n = n_a + n_b``,
``mean = mean_a + delta * n_b / n``, ``m2 = m2_a + m2_b + delta**2 * n_a * n_b / n``.
"""

import dataclasses

import numpy as np
from jaxtyping import Float


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

    @property
    def var(self) -> Float[np.ndarray, " channel"]:
        """Population variance of each channel."""
        return self.m2 / max(1, self.count)

    @property
    def std(self) -> Float[np.ndarray, " channel"]:
        """Population standard deviation of each channel."""
        std: np.ndarray = np.sqrt(self.var)
        return std

    @classmethod
    def empty(cls, channels: int) -> "ChannelStats":
        """Return the moments of no value."""
        zero = np.zeros(channels)
        return cls(count=0, mean=zero, m2=zero.copy(), absmax=zero.copy())

    @classmethod
    def of(cls, values: Float[np.ndarray, "token channel"]) -> "ChannelStats":
        """Return the moments of float32 values, as a corrected two-pass sum.

        Where a channel is not finite, so is its `absmax`, and the moments mean nothing.
        """
        count, channels = values.shape
        if not count:
            return cls.empty(channels)
        absmax = np.maximum(values.max(axis=0), -values.min(axis=0)).astype(np.float64)
        if not np.isfinite(absmax).all():
            undefined = np.where(np.isfinite(absmax), 0.0, np.nan)
            return cls(count=count, mean=undefined, m2=undefined.copy(), absmax=absmax)
        guess = values.mean(axis=0, dtype=np.float32)
        centred = values - guess
        shift = centred.sum(axis=0, dtype=np.float32).astype(np.float64) / count
        squares = np.einsum("ij,ij->j", centred, centred).astype(np.float64)
        return cls(
            count=count,
            mean=guess.astype(np.float64) + shift,
            m2=np.maximum(squares - count * shift**2, 0.0),
            absmax=absmax,
        )

    def merge(self, other: "ChannelStats") -> "ChannelStats":
        """Return the moments of both sets together."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return ChannelStats(
            count=count,
            mean=self.mean + delta * (other.count / count),
            m2=self.m2 + other.m2 + delta**2 * (self.count * other.count / count),
            absmax=np.maximum(self.absmax, other.absmax),
        )
