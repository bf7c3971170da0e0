"""Commit records: what makes a part exist.

::

    parts/00000.json            part, items, fingerprint; bytes and CRC-32C of every object
    parts/00000.safetensors     per array: mean, m2, absmax by channel; CRC-32C by stripe
    index/part-00000.parquet    rows of the index

The record is created last, under its final name, once: a part without it does not exist. Its
objects may be there, unfinished or from a lost race; nobody reads them.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from actstore.crc import crc32c
from actstore.manifest import MAX_JSON_BYTES, MAX_OBJECT_BYTES, ArraySpec, FormatError
from actstore.stats import ChannelStats
from actstore.storage import Storage

_NAME = re.compile(r"(\d{5,})\.json\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """The record of one part."""

    part: int
    """Number of the part."""
    items: int
    """Valid items, packed at the front of the part."""
    fingerprint: str
    """Fingerprint of the manifest the part was written under."""
    objects: Mapping[str, Mapping[str, int]]
    """Path -> ``{"bytes": n, "crc32c": c}`` of every object of the part."""

    def encode(self) -> bytes:
        """Return the record's file."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1).encode() + b"\n"


def record_path(part: int) -> str:
    """Return the path of a part's commit record."""
    return f"parts/{part:05d}.json"


def sidecar_path(part: int) -> str:
    """Return the path of a part's statistics and checksums."""
    return f"parts/{part:05d}.safetensors"


def index_path(part: int) -> str:
    """Return the path of a part's index rows."""
    return f"index/part-{part:05d}.parquet"


def committed_parts(storage: Storage) -> list[int]:
    """Return the numbers of the parts that have a record, sorted."""
    found = (_NAME.match(name) for name in storage.list("parts"))
    return sorted(int(match.group(1)) for match in found if match)


def read_commit(storage: Storage, part: int) -> Commit:
    """Return the record of a part.

    Raises
    ------
    FileNotFoundError
        When the part is not committed.
    FormatError
        When the record is damaged.
    """
    return parse_record(storage.read(record_path(part), limit=MAX_JSON_BYTES), storage, part)


def parse_record(data: bytes, storage: Storage, part: int) -> Commit:
    """Return the record of a part from its bytes; FormatError when it is damaged."""
    path = record_path(part)
    try:
        value: Any = json.loads(data)
        objects = {
            str(name): {"bytes": int(entry["bytes"]), "crc32c": int(entry["crc32c"])}
            for name, entry in value["objects"].items()
        }
        record = Commit(
            part=int(value["part"]),
            items=int(value["items"]),
            fingerprint=str(value["fingerprint"]),
            objects=objects,
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise FormatError(f"{storage.uri(path)} is not a commit record: {error!r}") from error
    if record.part != part or record.items < 0:
        raise FormatError(f"{storage.uri(path)} is the record of another part ({record.part})")
    return record


def encode_sidecar(
    stats: Mapping[ArraySpec, ChannelStats], sums: Mapping[ArraySpec, np.ndarray]
) -> bytes:
    """Return the sidecar of a part: moments and stripe checksums of every array."""
    tensors: dict[str, np.ndarray] = {}
    for array, moments in stats.items():
        name = f"{array.site}/{array.kind}"
        tensors[f"{name}/count"] = np.array([moments.count], dtype=np.int64)
        tensors[f"{name}/mean"] = moments.mean
        tensors[f"{name}/m2"] = moments.m2
        tensors[f"{name}/absmax"] = moments.absmax
        if moments.saturated is not None and moments.error is not None:
            tensors[f"{name}/saturated"] = moments.saturated
            tensors[f"{name}/error"] = moments.error
        tensors[f"{name}/crc32c"] = sums[array].astype(np.uint32)
    return safetensors.numpy.save(tensors)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sidecar:
    """Decoded sidecar of one part."""

    tensors: Mapping[str, np.ndarray]
    """Tensors by name."""

    def stats(self, array: ArraySpec) -> ChannelStats:
        """Return the moments of one array over the part."""
        name = f"{array.site}/{array.kind}"
        moments = {key: self._get(f"{name}/{key}") for key in ("count", "mean", "m2", "absmax")}
        count = int(moments.pop("count")[0])
        if f"{name}/error" in self.tensors:
            moments |= {key: self._get(f"{name}/{key}") for key in ("saturated", "error")}
        for key, value in moments.items():
            due = np.int64 if key == "saturated" else np.float64
            if value.shape != (array.channels,) or value.dtype != due:
                raise FormatError(f"sidecar: {name}/{key} has {value.dtype} {value.shape}")
        return ChannelStats(count=count, **moments)

    def checksums(self, array: ArraySpec) -> np.ndarray:
        """Return the CRC-32C of every stripe of one array, uint32 [stripe]."""
        value = self._get(f"{array.site}/{array.kind}/crc32c")
        if value.shape != (array.n_stripes,) or value.dtype != np.uint32:
            raise FormatError(
                f"sidecar: checksums of {array.path} have {value.dtype} {value.shape}"
            )
        return value

    def _get(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise FormatError(f"sidecar: {name} is missing")
        return self.tensors[name]


def read_sidecar(storage: Storage, commit: Commit) -> Sidecar:
    """Return the sidecar of a committed part, checked against its record."""
    path = sidecar_path(commit.part)
    data = storage.read(path, limit=MAX_OBJECT_BYTES)
    expected = commit.objects.get(path)
    if expected is None or crc32c(data) != expected["crc32c"] or len(data) != expected["bytes"]:
        raise FormatError(f"{storage.uri(path)} is damaged: checksum differs from the record")
    return Sidecar(tensors=safetensors.numpy.load(data))
