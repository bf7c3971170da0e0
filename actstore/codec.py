"""Codec profiles: how the values of a stripe become bytes.

`raw`       plain little-endian values; what the shuffled reader and the dask mount take.
`archive`   Blosc with zstd after a byte shuffle, a stripe at a time: for keeping and moving.
            bfloat16 takes about 0.75 of its size, float16 0.93. Any Zarr reader with the codec
            `blosc` reads it; `actstore convert --codec raw` brings it back, bit for bit.
`int8`      not a codec but a dtype: raw int8 with a scale of each channel, `actstore.quantise`.
"""

from typing import Any

import numcodecs
import numpy as np
from jaxtyping import Shaped

from actstore.manifest import CODECS, DTYPES, ITEM_SIZE, ArraySpec, FormatError, Manifest

LEVEL = 3
"""Level of zstd; higher ones gain less than a hundredth."""

_HEADER = 16
"""Bytes of Blosc's header: nbytes at 4, blocksize at 8, cbytes at 12, each uint32."""


def profile(codec: str, dtype: str | None) -> tuple[str, str]:
    """Return codec and dtype of a store from the names of a profile and a dtype.

    Raises
    ------
    FormatError
        When one is not known.
    ValueError
        When the two contradict each other.
    """
    if codec not in (*CODECS, "int8"):
        raise FormatError(f"codec {codec!r} is none of {', '.join(CODECS)}, int8")
    if dtype is not None and dtype not in DTYPES:
        raise FormatError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    if codec == "int8":
        if dtype not in (None, "int8"):
            raise ValueError(f"codec int8 stores dtype int8, not {dtype}: give one of the two")
        return "raw", "int8"
    return codec, dtype or ("bfloat16" if codec == "archive" else "float16")


def zarr_codecs(codec: str, itemsize: int) -> list[dict[str, Any]]:
    """Return the codecs of a stripe for its array's metadata."""
    plain: dict[str, Any] = {"name": "bytes"}
    if itemsize > 1:
        plain["configuration"] = {"endian": "little"}
    if codec == "raw":
        return [plain]
    configuration = {
        "typesize": itemsize,
        "cname": "zstd",
        "clevel": LEVEL,
        "shuffle": "shuffle",
        "blocksize": 0,
    }
    return [plain, {"name": "blosc", "configuration": configuration}]


def encode(stripe: Shaped[np.ndarray, "item t channel"], codec: str) -> Any:
    """Return the bytes of a stripe as a buffer; equal values give equal bytes."""
    if codec == "raw":
        return stripe
    blosc = numcodecs.Blosc(cname="zstd", clevel=LEVEL, shuffle=numcodecs.Blosc.SHUFFLE)
    return blosc.encode(stripe)


def decode(
    data: Any, manifest: Manifest, array: ArraySpec, dtype: np.dtype[Any]
) -> Shaped[np.ndarray, "item t channel"]:
    """Return the stored values of a stripe.

    Raises
    ------
    FormatError
        When the bytes are not a stripe of this array; what they claim to unpack to is checked
        before memory is taken.
    """
    shape = (manifest.items_per_part, array.stripe_tokens, array.channels)
    due = shape[0] * shape[1] * shape[2] * ITEM_SIZE[manifest.dtype]
    if manifest.codec != "raw":
        header = np.frombuffer(data, np.uint8, count=min(len(data), _HEADER))
        claims = header.view("<u4").tolist() if len(header) == _HEADER else [0] * 4
        if claims[1] != due or claims[3] != len(data):
            raise FormatError(f"{array.path}: a compressed stripe does not hold {due} bytes")
        out = np.empty(due, np.uint8)
        try:
            numcodecs.Blosc().decode(data, out=out)
        except RuntimeError as error:
            raise FormatError(f"{array.path}: a stripe cannot be decompressed") from error
        data = out
    if len(memoryview(data)) != due:
        raise FormatError(f"{array.path}: a stripe has {len(data)} bytes, {due} are due")
    return np.frombuffer(data, dtype).reshape(shape)
