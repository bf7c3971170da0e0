"""The index: which item lies where, and where it came from.

Columns: `position` (in the store: part * S + row; null when skipped), `source` (position in the
data set), `key` (path or id), `label`, `label_name`, `status` (``ok`` or why it was skipped),
then any further column of the data source.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.manifest import MAX_OBJECT_BYTES, FormatError

SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("source", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("label_name", pa.string()),
        ("status", pa.string()),
    ]
)
"""Columns every index has."""

OK = "ok"
"""Status of an item whose activations are in the store."""


MORE_ROWS = 1 << 20
"""Rows that an index may have beyond four for each planned item."""


def rows_table(rows: Sequence[Mapping[str, Any]] | pa.Table) -> pa.Table:
    """Return index rows as a table: the fixed columns first, then the others by name."""
    if isinstance(rows, pa.Table):
        table = rows
    else:
        extra = sorted({name for row in rows for name in row} - set(SCHEMA.names))
        columns = {name: [row.get(name) for row in rows] for name in [*SCHEMA.names, *extra]}
        fixed = {name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}
        table = pa.table({**fixed, **{name: pa.array(columns[name]) for name in extra}})
    extra = sorted(set(table.column_names) - set(SCHEMA.names))
    table = table.select([*SCHEMA.names, *extra])
    fields = [*SCHEMA, *(table.schema.field(name) for name in extra)]
    return table.cast(pa.schema(fields)).replace_schema_metadata(None)


def encode_index_rows(rows: Sequence[Mapping[str, Any]] | pa.Table) -> bytes:
    """Return index rows as a parquet file; equal rows give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(rows_table(rows), sink, compression="zstd", store_schema=True)
    return sink.getvalue()


def decode_index_rows(data: bytes, name: str, items: int) -> pa.Table:
    """Return the rows of one parquet file of the index, for so many planned items.

    Converted stores keep the rows of skipped items too, which are no items of their plan.

    Raises
    ------
    FormatError
        When it is not parquet, lacks a column, or has or would unpack to too much.
    """
    most = 4 * items + MORE_ROWS
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        unpacked = sum(group.total_byte_size for group in groups)
        if file.metadata.num_rows > most or unpacked > MAX_OBJECT_BYTES:
            raise FormatError(
                f"{name} claims {file.metadata.num_rows} rows, {unpacked} bytes unpacked; at most "
                f"{most} rows and {MAX_OBJECT_BYTES} bytes are read"
            )
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{name} is not an index file: {error}") from error
    if missing := [column for column in SCHEMA.names if column not in table.column_names]:
        raise FormatError(f"{name} lacks the index columns {missing}")
    return table


def concat_rows(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of several parts in order; columns absent in one are null there."""
    if not tables:
        return SCHEMA.empty_table()
    return pa.concat_tables(tables, promote_options="permissive")
