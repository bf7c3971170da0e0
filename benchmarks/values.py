"""Values that look like a residual stream, made fast and as many as are asked for."""

import numpy as np
from jaxtyping import Float16, Float32

_ITEMS = 64
"""Items drawn anew; the others repeat them."""


def channel_statistics(
    rng: np.random.Generator, channels: int
) -> tuple[Float32[np.ndarray, " channel"], Float32[np.ndarray, " channel"]]:
    """Return mean and gain: log-normal gains, and three massive channels with a mean of 80.

    Massive channels: Sun et al. (2024), "Massive Activations in Large Language Models".
    """
    mean = rng.normal(size=channels).astype(np.float32)
    gain = np.exp(rng.normal(size=channels) * 0.5).astype(np.float32)
    mean[rng.choice(channels, min(3, channels), replace=False)] = 80.0
    return mean, gain


def residual_stream(
    items: int, tokens: int, channels: int, seed: int = 0
) -> Float16[np.ndarray, "item token channel"]:
    """Return normal values with the mean and gain of `channel_statistics`.

    The first items are independent, the rest repeats them: what moves bytes does not see it.
    """
    rng = np.random.default_rng(seed)
    mean, gain = channel_statistics(rng, channels)
    drawn = rng.standard_normal((min(items, _ITEMS), tokens, channels), dtype=np.float32)
    block = (drawn * gain + mean).astype(np.float16)
    values = np.empty((items, tokens, channels), np.float16)
    for first in range(0, items, _ITEMS):
        values[first : first + _ITEMS] = block[: items - first]
    return values
