"""A table of images: CSV or parquet with a column of paths or URLs, labels and anything else."""

import os
import posixpath
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

from actstore.credentials import public
from actstore.index import SCHEMA
from actstore.sources.base import Undecodable, Unreachable, decode_image, digest
from actstore.sources.bounded import check_groups, read_group
from actstore.sources.fetch import Denied, fetch
from actstore.sources.places import absolute, find_files

NAMES = ("path", "url", "file_name")
"""Columns that name the image; the first there is counts."""

PROTOCOLS = frozenset(
    {"file", "local", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf"}
)
"""Where a row may point to; others are skipped rows."""

MAX_TABLE = 4 << 30
"""Bytes of a table, as it lies and as it is unpacked."""

MAX_IMAGE = 256 << 20
"""Bytes of an encoded image."""

NEIGHBOURS = 1000
"""Rows among which others of the same server are looked for when it denies one."""

ASKED = 8
"""Of those, how many it is asked for."""


def names_files(url: str, storage_options: Mapping[str, Any] | None = None) -> bool:
    """Whether parquet files hold the names of images instead of the images.

    Raises
    ------
    FileNotFoundError
        When there is none.
    ValueError
        When the first is not parquet.
    """
    fs, paths, _ = find_files(url, storage_options, (".parquet",))
    try:
        with fs.open(paths[0], "rb") as file:
            schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{paths[0]} is not a parquet file: {error}") from error
    if any(pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type) for f in schema):
        return False
    structs = [f.type for f in schema if pa.types.is_struct(f.type)]
    return _column(schema) is not None and not any(t.get_field_index("bytes") >= 0 for t in structs)


class Table:
    """Images named by the rows of a table; relative paths start at the folder of the table.

    `label` (a number, or words, which are numbered in sorted order) and `label_name` are what
    they say; every other column of plain values reaches the index, one of nested values not, one
    of other types as text. `key` is the key, else the name of the image. A table that lies
    elsewhere than on this machine cannot name files of this machine.

    Parameters
    ----------
    url
        CSV, TSV or parquet: path, glob, brace pattern or fsspec URL.
    storage_options
        Options of fsspec for the table and for images on the same kind of storage.

    Raises
    ------
    FileNotFoundError
        When the table is not there.
    ValueError
        When it cannot be read, or no column names images; the columns found are listed.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = absolute(url)
        self._options = dict(storage_options or {})
        fs, paths, sizes = find_files(url, storage_options, (".csv", ".tsv", ".parquet"))
        if sum(sizes) > MAX_TABLE:
            raise ValueError(f"{url} has {sum(sizes):,} bytes, tables have at most {MAX_TABLE:,}")
        tables = [_read(fs, path) for path in paths]
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"the files of {url} do not have the same columns: {error}") from error
        name = _column(table.schema)
        if name is None:
            columns = ", ".join(f"{f.name}: {f.type}" for f in table.schema)
            raise ValueError(
                f"{url} names no images: one of the columns {', '.join(NAMES)} must hold strings; "
                f"its columns are {columns}"
            )
        self._name = name
        self._files = fs
        self._gives: dict[str, bool] = {}
        self._scheme = _scheme(self._url)
        self._local = self._scheme in ("", "file", "local")
        self._root = posixpath.dirname(paths[0])
        self._label, self._classes = _labels(table)
        self._label_name = table["label_name"] if "label_name" in table.column_names else None
        self._keys = table["key"].cast(pa.string()) if "key" in table.column_names else None
        self._where = table[name].cast(pa.string()).combine_chunks()
        self._extra = _plain(table, {name})
        self._digest = digest(zip(map(posixpath.basename, paths), sizes, strict=True))
        self._rows = digest(self._where.to_pylist())
        for scheme in sorted({_scheme(text or "") for text in pc.unique(self._where).to_pylist()}):
            if scheme in PROTOCOLS:
                self._check_installed(scheme)

    def __len__(self) -> int:
        return len(self._where)

    def _options_of(self, scheme: str) -> dict[str, Any]:
        """Return options for images: those given are for the storage of the table only."""
        return self._options if scheme == self._scheme else {}

    def _check_installed(self, scheme: str) -> None:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise ValueError(f"{self._url} names {scheme}:// URLs, which need: {error}") from error

    def row(self, index: int) -> dict[str, Any]:
        """Return key, label, label name and the other columns of a row."""
        where = self._where[index].as_py()
        key = self._keys[index].as_py() if self._keys is not None else None
        label = self._label[index].as_py() if self._label is not None else None
        name = self._label_name[index].as_py() if self._label_name is not None else None
        if name is None and self._classes and label is not None:
            name = self._classes[label]
        return {
            "key": key or public(where or "") or f"row-{index}",
            "label": label,
            "label_name": name,
            **{column: values[index].as_py() for column, values in self._extra.items()},
        }

    def image(self, index: int) -> Image.Image:
        """Return the decoded image a row names."""
        where = self._where[index].as_py()
        if not where or "\0" in where:
            raise Undecodable("the row names no image")
        try:
            data = self._fetch(*self._resolve(where))
        except Denied as error:
            if not self._gives_others(index):
                raise
            raise Undecodable(f"{error}, and the server gives others") from None
        return decode_image(data)

    def _gives_others(self, index: int) -> bool:
        """Whether the server of a denied row gives any other row that is near.

        Then it is the item's fault; if not, credentials may be missing, which is that of none. A
        server is asked once.
        """
        host = urlsplit(self._where[index].as_py()).netloc
        if host not in self._gives:
            self._gives[host] = self._gives_one_near(index, host)
        return self._gives[host]

    def _gives_one_near(self, index: int, host: str) -> bool:
        near = [self._where[(index + k) % len(self)].as_py() or "" for k in range(1, NEIGHBOURS)]
        for where in [w for w in near if f"://{host}/" in w][:ASKED]:
            try:
                self._fetch(*self._resolve(where))
            except (Undecodable, Unreachable):
                continue
            return True
        return False

    def _resolve(self, where: str) -> tuple[Any, str]:
        """Return file system and path of what a row names."""
        scheme = _scheme(where)
        if scheme and (scheme not in PROTOCOLS or "::" in where):
            raise Undecodable(f"{scheme}:// is none of {', '.join(sorted(PROTOCOLS))}")
        if not self._local and (scheme in ("file", "local") or where.startswith(("/", "~"))):
            raise Undecodable("a table from elsewhere may not name files of this machine")
        if scheme:
            try:
                found: tuple[Any, str] = fsspec.core.url_to_fs(where, **self._options_of(scheme))
            except ValueError:
                raise Undecodable("the row holds no valid URL") from None
            return found
        if self._local:
            return self._files, os.path.join(self._root, where)
        inside = posixpath.normpath(where)
        if inside.startswith("../") or inside == "..":
            raise Undecodable("the path leaves the folder of the table")
        return self._files, f"{self._root}/{inside}"

    def _fetch(self, fs: Any, path: str) -> bytes:
        """Return the bytes of an image, if they are not too many."""
        data = fetch(fs, path, 0, MAX_IMAGE + 1)
        if len(data) > MAX_IMAGE:
            raise Undecodable(f"the file has more than {MAX_IMAGE} bytes")
        return data

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest: names and sizes of the tables, every image named."""
        return {
            "kind": "table",
            "url": self._url,
            "items": len(self),
            "fingerprint": digest([self._digest, self._rows]),
        }


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower() if "://" in url else ""


def _column(schema: pa.Schema) -> str | None:
    for name in NAMES:
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return name
    return None


def _read(fs: Any, path: str) -> pa.Table:
    """Return one file as a table."""
    try:
        with fs.open(path, "rb") as file:
            if path.lower().endswith(".parquet"):
                return _read_parquet(pq.ParquetFile(file), path)
            return pyarrow.csv.read_csv(
                file,
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if path.lower().endswith(".tsv") else ",",
                    newlines_in_values=True,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys((*NAMES, "key", "label_name"), pa.string())
                ),
            )
    except pa.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _read_parquet(file: pq.ParquetFile, path: str) -> pa.Table:
    """Return the columns of plain values, if they do not unpack to too many bytes."""
    fields = [
        field
        for field in file.schema_arrow
        if not pa.types.is_nested(field.type)
        and not pa.types.is_binary(field.type)
        and not pa.types.is_large_binary(field.type)
    ]
    columns = [field.name for field in fields]
    check_groups(file, path, columns)
    left, tables = MAX_TABLE, []
    for group in range(file.num_row_groups):
        try:
            tables.append(read_group(file, path, group, columns, max(1, left)))
        except Undecodable as error:
            raise ValueError(
                f"{path} unpacks to more than {MAX_TABLE:,} bytes, the most that a table may have "
                f"({error}): split it, or leave columns out"
            ) from None
        left -= tables[-1].nbytes
    return pa.concat_tables([pa.schema(fields).empty_table(), *tables])


def _labels(table: pa.Table) -> tuple[pa.ChunkedArray | None, list[str]]:
    """Return numbers of the labels, and the names of the numbers where they were words."""
    if "label" not in table.column_names:
        return None, []
    column = table["label"]
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()), []
    words = column.cast(pa.string())
    names = sorted(word for word in pc.unique(words).to_pylist() if word is not None)
    return pc.index_in(words, value_set=pa.array(names, pa.string())).cast(pa.int64()), names


def _plain(table: pa.Table, without: set[str]) -> dict[str, pa.ChunkedArray]:
    """Return the columns for the index: numbers, truth values and text, renamed where taken."""
    found = {}
    for field in table.schema:
        if field.name in without | {"key", "label", "label_name"} or pa.types.is_nested(field.type):
            continue
        column = table[field.name]
        keep = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_string)
        if not any(test(field.type) for test in keep):
            if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
                continue
            column = column.cast(pa.string())
        if pa.types.is_float16(field.type):
            column = pa.chunked_array([np.asarray(column, dtype=np.float32)])
        taken = field.name in SCHEMA.names
        found[f"column_{field.name}" if taken else field.name] = column
    return found
