"""Keyed permutation of a range, evaluated at single positions.

A four-round Feistel network over the smallest even number of bits that holds the range, with
cycle walking for what falls outside. No table: position i of a billion costs as much as of ten.
"""

import numpy as np
from jaxtyping import Int64

_ROUNDS = 4
_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64 finaliser of x + key (Steele, Lea and Flood 2014)."""
    z = x + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def keyed_permutation(
    positions: Int64[np.ndarray, " n"], size: int, seed: int
) -> Int64[np.ndarray, " n"]:
    """Return the images of `positions` under the permutation of ``range(size)`` keyed by `seed`.

    Raises
    ------
    ValueError
        When a position lies outside of the range.
    """
    values = np.asarray(positions, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"positions must lie in [0, {size})")
    half = np.uint64(max(1, -(-max(1, size - 1).bit_length() // 2)))
    low = np.uint64((1 << int(half)) - 1)
    keys = [
        ((seed * 0x9E3779B97F4A7C15) + (r + 1) * 0xD1B54A32D192ED03) % (1 << 64)
        for r in range(_ROUNDS)
    ]
    out = values.astype(np.uint64)
    todo = np.arange(out.size)
    while todo.size:
        x = out[todo]
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right, key) & low)
        x = (left << half) | right
        out[todo] = x
        todo = todo[x >= np.uint64(size)]
    return out.astype(np.int64)
