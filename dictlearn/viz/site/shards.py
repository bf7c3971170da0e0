"""Data files of a site: scripts that hand one value each to the page.

A page opened from disk may not ``fetch`` its neighbours, but it may load scripts, so every piece of
data is a script ``View.put("<name>", <JSON>)`` at ``data/<name>.js``, loaded when it is needed.
Numbers in bulk are packed: raw deflate, base64.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MISSING = 65535
"""Code of a missing number in a packed column."""


class Shelf:
    """Writes the data files of one site.

    Parameters
    ----------
    folder
        Of the site.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self.files = 0

    def put(self, name: str, value: Any) -> None:
        """Write one value; NaN is refused, as JSON has none."""
        text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        data = f"View.put({json.dumps(name)},{text});\n".encode()
        self.write(f"data/{name}.js", data)

    def write(self, path: str, data: bytes) -> None:
        """Write a file."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        self.bytes += len(data)
        self.files += 1


def pack(values: np.ndarray) -> str:
    """Return an array of uint8 or uint16 deflated, as base64; of uint16 all low bytes come first.

    Bytes of equal weight side by side are what deflate makes small.
    """
    if values.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pack takes uint8 or uint16, not {values.dtype}")
    flat = values.ravel()
    planes = [flat] if values.dtype == np.uint8 else [flat & 0xFF, flat >> 8]
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    data = b"".join(plane.astype(np.uint8).tobytes() for plane in planes)
    return base64.b64encode(deflate.compress(data) + deflate.flush()).decode()


def column(
    values: np.ndarray,
    *,
    log: bool = False,
    steps: int = 4096,
    span: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Pack real numbers in equal steps between their least and largest; NaN is missing.

    Parameters
    ----------
    values
        One number a latent.
    log
        Steps of equal ratio (values of 0 or less are missing, too) in place of equal steps.
    steps
        Number of steps, at most 65,535; up to 255 take one byte a latent.
    span
        Ends of the steps in place of the least and largest; values lie within.
    """
    x = np.asarray(values, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.log(x) if log else x
    known = np.isfinite(x)
    low = float(x[known].min()) if known.any() else 0.0
    high = float(x[known].max()) if known.any() else 0.0
    low, high = span or (low, high)
    step = (high - low) / (steps - 1) or 1.0
    kind = np.uint8 if steps <= 255 else np.uint16
    codes = np.full(x.shape, np.iinfo(kind).max, kind)
    codes[known] = np.round((x[known] - low) / step).astype(kind)
    packed = {"as": "log" if log else "linear", "low": low, "step": step, "data": pack(codes)}
    return {**packed, "bytes": codes.itemsize}


def numbers(values: np.ndarray) -> dict[str, Any]:
    """Pack whole numbers below 2^32 exactly; negative ones are missing."""
    x = np.asarray(values, np.int64)
    if x.max(initial=0) >= MISSING:
        low, high = (x & 0xFFFF).astype(np.uint16), (x >> 16).astype(np.uint16)
        low[x < 0] = high[x < 0] = MISSING
        return {"as": "wide", "data": pack(low), "high": pack(high)}
    codes = np.where(x < 0, MISSING, x).astype(np.uint16)
    return {"as": "whole", "data": pack(codes)}


def short(value: float, digits: int = 4) -> float:
    """Round to significant digits, for JSON."""
    return float(f"{float(value):.{digits}g}")
