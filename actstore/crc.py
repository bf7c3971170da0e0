"""CRC-32C of stripes, and of a whole shard from the sums of its stripes.

Concatenation is linear over GF(2): ``crc(A B) = shift(crc(A), len(B)) ^ crc(B)``, where
``shift`` is a 32 x 32 bit matrix that depends on the length only. A shard's sum therefore
costs nothing beyond those of its stripes, and its bytes are read once.
"""

import functools
from collections.abc import Iterable

import google_crc32c
import numpy as np

_POLYNOMIAL = 0x82F63B78
"""Castagnoli polynomial, bit-reversed."""


def crc32c(data: object) -> int:
    """Return the CRC-32C of a bytes-like object."""
    return extend(0, data)


def extend(crc: int, data: object) -> int:
    """Return the CRC-32C of what `crc` is the sum of, followed by `data`."""
    view = np.frombuffer(data, np.uint8)  # type: ignore[call-overload]
    return int(google_crc32c.extend(crc, view))


def crc32c_of_file(path: str, memory: bytearray) -> int:
    """Return the CRC-32C of a file, read piece by piece into `memory`.

    A piece is summed while it is in the cache of the core, so reuse memory of that size: summing
    then costs a quarter of reading.
    """
    crc, view = 0, memoryview(memory)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(view):
            crc = int(google_crc32c.extend(crc, np.frombuffer(view[:count], np.uint8)))
    return crc


def _apply(matrix: tuple[int, ...], vector: int) -> int:
    out, row = 0, 0
    while vector:
        if vector & 1:
            out ^= matrix[row]
        vector >>= 1
        row += 1
    return out


@functools.lru_cache(maxsize=256)
def _shift(length: int) -> tuple[int, ...]:
    """Return the matrix (row = image of bit i) that appends `length` zero bytes."""
    power = (_POLYNOMIAL, *(1 << i for i in range(31)))  # one zero bit
    for _ in range(3):  # one zero byte
        power = tuple(_apply(power, row) for row in power)
    result = tuple(1 << i for i in range(32))
    while length:
        if length & 1:
            result = tuple(_apply(power, row) for row in result)
        power = tuple(_apply(power, row) for row in power)
        length >>= 1
    return result


def combine(pieces: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32C of a concatenation from the (sum, length in bytes) of its pieces."""
    total = 0
    for crc, length in pieces:
        total = _apply(_shift(length), total) ^ crc
    return total
