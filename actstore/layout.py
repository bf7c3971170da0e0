"""Bytes of a store: Zarr v3 metadata and the encoding of a shard.

A shard is one object of one array and holds S consecutive items. Its inner chunks, the
stripes, have the shape (S, t, d), so that one stripe is t tokens of every item of the part::

    stripe 0 | stripe 1 | ... | stripe T/t - 1 | index | crc32c of the index
    index = (offset uint64, length uint64) a stripe, little-endian

This is the Zarr v3 `sharding_indexed` codec with the index at the end. Stripes of the raw
profile are plain little-endian values, so stripe i starts at byte ``i * S * t * d * itemsize``.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64, Shaped, UInt16

from actstore.codec import zarr_codecs
from actstore.crc import crc32c
from actstore.manifest import (
    DTYPES,
    ITEM_SIZE,
    ArraySpec,
    FormatError,
    Manifest,
    scale_path,
)

MISSING = np.uint64(2**64 - 1)
"""Offset and length of a stripe that was never written."""


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the little-endian numpy dtype that holds activations of `dtype` on disk."""
    return np.dtype(DTYPES[dtype]).newbyteorder("<")


def stripe_bytes(manifest: Manifest, array: ArraySpec) -> int:
    """Return the bytes of one uncompressed stripe."""
    values = manifest.items_per_part * array.stripe_tokens * array.channels
    return values * ITEM_SIZE[manifest.dtype]


def index_bytes(array: ArraySpec) -> int:
    """Return the bytes of a shard's index with its checksum."""
    return 16 * array.n_stripes + 4


def shard_bytes(manifest: Manifest, array: ArraySpec) -> int:
    """Return the bytes of one shard of the raw profile."""
    return stripe_bytes(manifest, array) * array.n_stripes + index_bytes(array)


def shard_path(array: ArraySpec, part: int) -> str:
    """Return the object that holds `part` of `array`, relative to the store."""
    return f"{array.path}/c.{part}.0.0"


def raw_spans(manifest: Manifest, array: ArraySpec) -> Int64[np.ndarray, "stripe 2"]:
    """Return (offset, length) in bytes of every stripe of a shard of the raw profile."""
    size = stripe_bytes(manifest, array)
    offsets = np.arange(array.n_stripes, dtype=np.int64) * size
    return np.stack([offsets, np.full_like(offsets, size)], axis=1)


def encode_index(spans: Int64[np.ndarray, "stripe 2"]) -> bytes:
    """Return a shard's index with its checksum."""
    body = np.ascontiguousarray(spans, dtype="<u8").tobytes()
    return body + crc32c(body).to_bytes(4, "little")


def decode_index(data: bytes, array: ArraySpec, size: int) -> Int64[np.ndarray, "stripe 2"]:
    """Return (offset, length) of every stripe from the index of a shard of `size` bytes.

    Raises
    ------
    FormatError
        When the checksum is wrong or a stripe lies outside of the shard.
    """
    if len(data) != index_bytes(array):
        raise FormatError(
            f"{array.path}: the index has {len(data)} bytes, {index_bytes(array)} due"
        )
    if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise FormatError(f"{array.path}: the checksum of a shard's index is wrong")
    spans = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
    limit = np.uint64(size - len(data))
    bad = (spans > limit).any(axis=1) | (spans.sum(axis=1) > limit)
    if bad.any():
        raise FormatError(f"{array.path}: a shard's index points outside of the shard")
    return spans.astype(np.int64)


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_metadata(manifest: Manifest, array: ArraySpec) -> dict[str, Any]:
    """Return the `zarr.json` of one array of activations."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shard = [manifest.items_per_part, array.tokens, array.channels]
    stripe = [manifest.items_per_part, array.stripe_tokens, array.channels]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": stripe,
            "codecs": zarr_codecs(manifest.codec, ITEM_SIZE[manifest.dtype]),
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        },
    }
    dtype = DTYPES[manifest.dtype]
    attributes = {"activation_dtype": manifest.dtype}
    if manifest.scales:
        attributes["scale"] = scale_path(array)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [manifest.items, array.tokens, array.channels],
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [sharding],
        "dimension_names": ["item", f"{array.kind}_token", "channel"],
        "attributes": attributes,
    }


def plain_metadata(
    shape: list[int], dtype: str, names: list[str], chunk: list[int] | None = None
) -> dict[str, Any]:
    """Return the `zarr.json` of a small array of uncompressed chunks, of one by default."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": chunk or [max(1, n) for n in shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "dimension_names": names,
        "attributes": {},
    }


def to_bfloat16(values: Float[np.ndarray, "..."]) -> UInt16[np.ndarray, "..."]:
    """Return the bits of `values` rounded to bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16)


def from_stored(values: Shaped[np.ndarray, "..."], dtype: str) -> Float[np.ndarray, "..."]:
    """Return stored values as float32; bfloat16 bits are widened exactly."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def widen(
    values: Shaped[np.ndarray, "..."], dtype: str, out: Int32[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Return finite stored values as float32 in the memory of `out`, exactly.

    float16 is widened by integers, four times as fast as numpy's cast: sign-extend, shift
    exponent and mantissa to their places (13 bits), clear the copies of the sign in between,
    and multiply by 2**112, the difference of the two exponent biases. Infinity and NaN become
    finite; `actstore.stats` sees them in the bits.
    """
    wide = out.view(np.float32)
    if dtype == "float16":
        np.copyto(out, values.view(np.int16))
        np.left_shift(out, 13, out=out)
        np.bitwise_and(out, np.int32(~0x70000000), out=out)
        np.multiply(wide, np.float32(2.0**112), out=wide)
    elif dtype == "bfloat16":
        np.copyto(out, values.view(np.int16))
        np.left_shift(out, 16, out=out)
    else:
        np.copyto(wide, values)
    return wide
