"""Hugging Face parquet: a column of images ``{bytes, path}`` or bytes, with labels beside it."""

import collections
import json
import os
import threading
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from actstore.index import SCHEMA
from actstore.sources.base import Undecodable, decode_image, digest
from actstore.sources.bounded import check_groups, read_group
from actstore.sources.fetch import Watched
from actstore.sources.places import absolute, file_sizes, nothing_at, reached

CACHE_BYTES = 256 << 20
"""Room for decompressed row groups, in bytes; at least the newest one is kept."""


class Parquet:
    """One or several parquet files, by path, folder, glob or fsspec URL.

    Labels and their names come from the column that the schema metadata calls ClassLabel, or
    from a column `label`. Columns of plain values beside them reach the index.

    Raises
    ------
    FileNotFoundError
        When no file is there.
    ValueError
        When a file is not parquet, has other columns than the first, no column of images, or a
        row group that unpacks to more than `bounded.MAX_GROUP` bytes.
    """

    def __init__(
        self,
        url: str,
        storage_options: dict[str, Any] | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._url = absolute(url)
        with reached(self._url):
            self._fs, path = fsspec.core.url_to_fs(self._url, **(storage_options or {}))
            self._paths = self._expand(path)
        self._files: list[pq.ParquetFile] = []
        self._watched: list[Watched] = []
        self._locks: list[threading.Lock] = []
        starts, groups, entries = [0], [], []
        for number, name in enumerate(self._paths):
            file = self._open(name)
            self._files.append(file)
            self._locks.append(threading.Lock())
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                groups.append((number, group))
                starts.append(starts[-1] + rows)
            entries.append([os.path.basename(name), self._fs.size(name), file.metadata.num_rows])
        self._starts = np.array(starts)
        self._groups = groups
        self._entries = entries
        schema = self._files[0].schema_arrow
        for name, file in zip(self._paths, self._files, strict=True):
            if not file.schema_arrow.equals(schema):
                raise ValueError(f"{name} has other columns than {self._paths[0]}")
        self._image = self._image_column(schema)
        self._label, self._names = self._label_column(schema)
        self._extra = [
            field.name
            for field in schema
            if field.name not in {self._image, self._label, *SCHEMA.names}
            and not pa.types.is_nested(field.type)
            and not pa.types.is_binary(field.type)
            and not pa.types.is_large_binary(field.type)
        ]
        image = schema.field(self._image).type
        parts = [self._image]
        if pa.types.is_struct(image):
            inside = [name for name in ("bytes", "path") if image.get_field_index(name) >= 0]
            parts = [f"{self._image}.{name}" for name in inside]
        self._columns = [*parts, *([self._label] if self._label else []), *self._extra]
        for name, file in zip(self._paths, self._files, strict=True):
            check_groups(file, name, self._columns)
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()

    @property
    def memory(self) -> int:
        """Bytes the decompressed row groups may take: the cache and those being read."""
        sizes = [
            self._files[file].metadata.row_group(group).total_byte_size
            for file, group in self._groups
        ]
        total: int = min(sum(sizes), self._cache_bytes + 2 * max(sizes, default=0))
        return total

    def _expand(self, path: str) -> list[str]:
        if "*" in path or "?" in path:
            found = sorted(self._fs.glob(path))
        elif self._fs.isdir(path):
            found = sorted(p for p in file_sizes(self._fs, path) if p.endswith(".parquet"))
        else:
            found = [path] if self._fs.exists(path) else []
        if not found:
            raise nothing_at(self._fs, self._url, "parquet")
        return found

    def _open(self, name: str) -> pq.ParquetFile:
        self._watched.append(Watched(self._fs, name))
        try:
            return pq.ParquetFile(self._watched[-1], pre_buffer=True)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name} is not a parquet file: {error}") from error

    def _image_column(self, schema: pa.Schema) -> str:
        def fits(kind: pa.DataType) -> bool:
            if pa.types.is_struct(kind):
                return bool(kind.get_field_index("bytes") >= 0)
            return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

        columns = [field.name for field in schema if fits(field.type)]
        columns.sort(key=lambda name: name not in ("image", "img"))
        if not columns:
            raise ValueError(
                f"{self._url} has no image column (a struct with `bytes`, or binary) and none of "
                "strings called path, url or file_name; its columns are "
                f"{', '.join(f'{f.name}: {f.type}' for f in schema)}"
            )
        return str(columns[0])

    @staticmethod
    def _label_column(schema: pa.Schema) -> tuple[str | None, list[str]]:
        try:
            text = (schema.metadata or {})[b"huggingface"]
            features = json.loads(text)["info"]["features"]
            pairs = [
                (str(name), [str(n) for n in f["names"]])
                for name, f in features.items()
                if f.get("_type") == "ClassLabel" and name in schema.names
            ]
        except (KeyError, ValueError, TypeError, AttributeError):
            pairs = []
        pairs.sort(key=lambda pair: pair[0] != "label")
        if pairs:
            return pairs[0]
        if "label" in schema.names and pa.types.is_integer(schema.field("label").type):
            return "label", []
        return None, []

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _table(self, number: int) -> pa.Table:
        """Return a row group from the cache, reading it once however many threads ask."""
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        file, group = self._groups[number]
        with self._locks[file]:
            with self._lock:
                if number in self._cache:
                    return self._cache[number]
            name = os.path.basename(self._paths[file])
            try:
                table = read_group(self._files[file], name, group, self._columns)
            except (OSError, pa.ArrowException) as error:
                self._watched[file].check()
                raise Undecodable(f"row group {group} cannot be read: {error}") from error
        with self._lock:
            self._cache[number] = table
            while len(self._cache) > 1 and self._cached_bytes() > self._cache_bytes:
                self._cache.popitem(last=False)
        return table

    def _cached_bytes(self) -> int:
        return sum(table.nbytes for table in self._cache.values())

    def _find(self, index: int) -> tuple[pa.Table, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._table(number), index - int(self._starts[number])

    def row(self, index: int) -> dict[str, Any]:
        """Return the path of the image (or its number), the label and the plain columns."""
        fallback = f"row-{index}"
        try:
            table, row = self._find(index)
        except Undecodable:
            return {"key": fallback, "label": None, "label_name": None}
        cell = table[self._image][row]
        path = None
        if pa.types.is_struct(cell.type) and cell.is_valid:
            path = cell["path"].as_py() if cell.type.get_field_index("path") >= 0 else None
        label = table[self._label][row].as_py() if self._label else None
        names = self._names
        return {
            "key": path or fallback,
            "label": label,
            "label_name": names[label] if isinstance(label, int) and label < len(names) else None,
            **{extra: table[extra][row].as_py() for extra in self._extra},
        }

    def image(self, index: int) -> Image.Image:
        """Return the decoded image of a row."""
        table, row = self._find(index)
        cell = table[self._image][row]
        if pa.types.is_struct(cell.type) and cell.is_valid:
            cell = cell["bytes"]
        if not cell.is_valid:
            raise Undecodable("the row holds no image bytes")
        return decode_image(cell.as_py())

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest; the fingerprint covers names, sizes and rows."""
        return {
            "kind": "parquet",
            "url": self._url,
            "files": len(self._paths),
            "items": len(self),
            "fingerprint": digest(self._entries),
        }
