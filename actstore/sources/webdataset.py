"""WebDataset: tar files in which members of one name, but for the ending, make one item.

The headers are read once; from then on an item is one range of bytes, so that tars are as good
for random access as a folder. ``0001.jpg 0001.cls 0001.json 0001.txt`` gives an image, a label,
columns and a text.
"""

import itertools
import json
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from actstore.index import SCHEMA
from actstore.sources.base import Undecodable, Unreachable, decode_image, digest
from actstore.sources.fetch import fetch
from actstore.sources.folder import EXTENSIONS
from actstore.sources.places import absolute, find_files
from actstore.sources.tar import Member, members

MAX_IMAGE = 256 << 20
"""Encoded images of more bytes are not read."""

MAX_TEXT = 1 << 20
"""Labels, texts and JSON of more bytes are not read."""

PROBED = 64
"""Items whose JSON decides which columns there are, and their types."""

MAX_COLUMNS = 256
"""Columns taken from the JSON."""

_NAME = re.compile(r"(?P<key>(?:.*/|)[^./][^./]*)\.(?P<ending>[^/]+)\Z", re.DOTALL)
_PARTS = ("image", "cls", "json", "txt")


class _Sample(NamedTuple):
    """Where one item lies."""

    shard: int
    """Number of the tar."""
    key: str
    """Name without the ending."""
    spans: dict[str, tuple[int, int]]
    """Offset and size of the members read, by `_PARTS`."""


class WebDataset:
    """One or several uncompressed tars, by path, folder, glob, brace pattern or fsspec URL.

    Members that follow each other and share their name up to the first dot are one item. The
    image is the first member with the ending of one; ``.cls`` is the label, ``.txt`` the column
    `txt`, the plain values of the ``.json`` object columns of their names (those of its first
    `PROBED` items; a value of another type than theirs is null). Without ``.cls``, `label` and
    `label_name` are taken from the JSON.

    Raises
    ------
    FileNotFoundError
        When a tar is not there.
    ValueError
        When one is compressed or damaged, or there is no image in them.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = absolute(url)
        if re.search(r"\.(tgz|tar\.\w+)\Z", self._url.lower()):
            raise ValueError(
                f"{url} is compressed, which allows no random access: unpack it with "
                "`gunzip` (images are compressed already)"
            )
        self._fs, self._paths, self._sizes = find_files(url, storage_options, (".tar",))
        with ThreadPoolExecutor(min(8, len(self._paths)), "index") as pool:
            found = pool.map(self._index, range(len(self._paths)))
            samples = list(itertools.chain.from_iterable(found))
        self._shard = np.array([s.shard for s in samples], dtype=np.int32)
        self._keys = [s.key for s in samples]
        self._spans = np.full((len(samples), len(_PARTS), 2), -1, dtype=np.int64)
        for row, sample in enumerate(samples):
            for name, span in sample.spans.items():
                self._spans[row, _PARTS.index(name)] = span
        if not (self._spans[:, 0, 0] >= 0).any():
            raise ValueError(
                f"{url} holds no images: looked for {', '.join(sorted(EXTENSIONS))} in "
                f"{len(self._paths)} tars with {len(samples)} items"
            )
        self._recent = threading.local()
        self._columns = self._probe()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_recent"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _recent=threading.local())

    def _index(self, shard: int) -> list[_Sample]:
        """Return the items of one tar, reading its headers."""
        path = self._paths[shard]
        samples: list[_Sample] = []
        with self._fs.open(path, "rb") as file:
            for member in members(file, path):
                match = _NAME.match(member.name)
                if match is None:
                    continue
                if not samples or samples[-1].key != match["key"]:
                    samples.append(_Sample(shard, match["key"], {}))
                _assign(samples[-1].spans, match["ending"].lower(), member)
        return samples

    def _probe(self) -> dict[str, type]:
        """Return name and type of the columns that the JSON of the first items has."""
        types: dict[str, set[type]] = {}
        for index in np.flatnonzero(self._spans[:, 2, 0] >= 0)[:PROBED].tolist():
            for name, value in self._json(index).items():
                if isinstance(value, str | int | float | bool):
                    types.setdefault(name, set()).add(type(value))
        names = sorted(name for name in types if name.isprintable())[:MAX_COLUMNS]
        return {name: _common(types[name]) for name in names}

    def __len__(self) -> int:
        return len(self._keys)

    def _load(self, index: int) -> dict[str, bytes]:
        """Return the members of an item, by one request where they lie side by side.

        Asked twice by a thread, an item is read once.
        """
        if getattr(self._recent, "index", None) == index:
            recent: dict[str, bytes] = self._recent.loaded
            return recent
        bounds = (MAX_IMAGE, MAX_TEXT, MAX_TEXT, MAX_TEXT)
        wanted = {
            name: (int(start), int(size))
            for name, (start, size), most in zip(_PARTS, self._spans[index], bounds, strict=True)
            if start >= 0 and size <= most
        }
        path = self._paths[self._shard[index]]
        first = min((start for start, _ in wanted.values()), default=0)
        last = max((start + size for start, size in wanted.values()), default=0)
        try:
            if last - first <= 2 * sum(size for _, size in wanted.values()) + (1 << 16):
                data = fetch(self._fs, path, first, last) if last > first else b""
                loaded = {n: data[s - first : s - first + size] for n, (s, size) in wanted.items()}
            else:
                loaded = {
                    n: fetch(self._fs, path, s, s + size) if size else b""
                    for n, (s, size) in wanted.items()
                }
        except Undecodable:
            # A tar that has gone takes many items with it, which is no matter of one of them.
            raise Unreachable(f"{os.path.basename(path)} is missing") from None
        self._recent.index, self._recent.loaded = index, loaded
        return loaded

    def _json(self, index: int) -> dict[str, Any]:
        """Return the JSON object of an item; nothing where it is none."""
        try:
            value = json.loads(self._load(index).get("json") or b"{}")
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def row(self, index: int) -> dict[str, Any]:
        """Return the key, the label, the tar and the columns of an item."""
        shard = os.path.basename(self._paths[self._shard[index]])
        row: dict[str, Any] = {
            "key": self._keys[index],
            "label": None,
            "label_name": None,
            "shard": shard,
        }
        loaded = self._load(index)
        for name, kind in self._columns.items():
            value = _fitting(self._json(index).get(name), kind)
            if name in ("label", "label_name"):
                if isinstance(value, str) or (name == "label" and type(value) is int):
                    row["label_name" if isinstance(value, str) else "label"] = value
            else:
                row[f"json_{name}" if name in (*SCHEMA.names, "shard", "txt") else name] = value
        if "txt" in loaded:
            row["txt"] = loaded["txt"].decode(errors="replace").strip()
        if "cls" in loaded:
            text = loaded["cls"].decode(errors="replace").strip()
            number = text.isascii() and text.isdigit() and len(text) < 19
            row["label" if number else "label_name"] = int(text) if number else text
        return row

    def image(self, index: int) -> Image.Image:
        """Return the decoded image of an item."""
        start, size = self._spans[index, 0].tolist()
        if start < 0:
            raise Undecodable("the item holds no image")
        if size > MAX_IMAGE:
            raise Undecodable(f"the image has {size} bytes, at most {MAX_IMAGE} are read")
        data = self._load(index)["image"]
        if len(data) < size:
            raise Undecodable("the tar ends inside of the image")
        return decode_image(data)

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest.

        The fingerprint covers names and sizes of the tars, the keys and where images lie.
        """
        tars = zip(map(os.path.basename, self._paths), self._sizes, strict=True)
        items = zip(self._keys, self._spans[:, 0].tolist(), strict=True)
        return {
            "kind": "webdataset",
            "url": self._url,
            "files": len(self._paths),
            "items": len(self),
            "fingerprint": digest(itertools.chain(tars, items)),
        }


def _assign(spans: dict[str, tuple[int, int]], ending: str, member: Member) -> None:
    """Note where a member lies if it is one that is read; the first of its kind counts."""
    kind = "." + ending.rpartition(".")[2]
    part = "image" if kind in EXTENSIONS else ending
    if part in _PARTS:
        spans.setdefault(part, (member.offset, member.size))


def _common(kinds: set[type]) -> type:
    """Return the type of a column whose values have these."""
    if len(kinds) == 1:
        return next(iter(kinds))
    return float if kinds == {int, float} else str


def _fitting(value: Any, kind: type) -> Any:
    """Return a value if it has the type of its column (an int may be a float), else None."""
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if kind is str and isinstance(value, str):
        return value.encode(errors="replace").decode()
    fits = type(value) is kind and not (type(value) is int and abs(value) >= 1 << 63)
    return value if fits else None
