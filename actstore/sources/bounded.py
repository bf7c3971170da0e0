"""Parquet read with a bound on what it unpacks to: a few kilobytes can hold any number of bytes."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.sources.base import Undecodable

MAX_GROUP = 4 << 30
"""Bytes that the columns read of a row group may unpack to."""

MAX_ROWS = 1 << 16
"""Rows unpacked at a time."""


def check_groups(file: pq.ParquetFile, name: str, columns: Sequence[str]) -> None:
    """Refuse a file with a row group that says it unpacks to more than `MAX_GROUP`.

    Raises
    ------
    ValueError
        Naming file, row group and column, and how to write the file anew.
    """
    for group in range(file.num_row_groups):
        sizes = _sizes(file, group, columns)
        if sum(sizes.values()) > MAX_GROUP:
            largest = max(sizes, key=lambda column: sizes[column])
            raise ValueError(
                f"{name}: row group {group} of {file.num_row_groups} unpacks to "
                f"{sum(sizes.values()):,} bytes, {sizes[largest]:,} of them in column {largest!r}; "
                f"at most {MAX_GROUP:,} a row group are read: write the file anew with smaller "
                "ones, pyarrow.parquet.write_table(table, path, row_group_size=1000)"
            )


def read_group(
    file: pq.ParquetFile, name: str, group: int, columns: Sequence[str], most: int = 0
) -> pa.Table:
    """Return the columns of a row group, read in steps that are counted.

    A value of a dictionary is stored once and unpacked as often as it is named, which the sizes
    in the file do not tell. So no step takes more rows than would fit if all were the largest
    value there can be.

    Parameters
    ----------
    file, name
        The file, and what to call it.
    group
        Number of the row group.
    columns
        What to read: names, or ``name.field`` of a struct.
    most
        Bytes allowed; `MAX_GROUP` by default.

    Raises
    ------
    Undecodable
        When there are more bytes than allowed.
    OSError, pyarrow.ArrowException
        When the file is damaged.
    """
    most = most or MAX_GROUP
    rows = max(1, min(MAX_ROWS, most // max(1, _repeated(file, group, columns))))
    batches, found = [], 0
    # Threads of pyarrow would compete with those of the model for the same cores.
    for batch in file.iter_batches(rows, [group], list(columns), use_threads=False):
        batches.append(batch)
        found += batch.nbytes
        if found > most:
            raise Undecodable(
                f"row group {group} of {name} unpacks to more than the {most:,} bytes that are "
                f"read of {', '.join(columns)}: write the file anew with smaller row groups"
            )
    schema = batches[0].schema if batches else file.read_row_group(group, list(columns)).schema
    return pa.Table.from_batches(batches, schema)


def _chunks(
    file: pq.ParquetFile, group: int, columns: Sequence[str]
) -> list[tuple[str, pq.ColumnChunkMetaData]]:
    """Return the column chunks that reading these columns takes, by their column."""
    about, wanted = file.metadata.row_group(group), set(columns)
    found = []
    for chunk in map(about.column, range(about.num_columns)):
        column = chunk.path_in_schema
        while column and column not in wanted:  # a field of a field of what is asked for
            column = column.rpartition(".")[0]
        if column:
            found.append((column, chunk))
    return found


def _sizes(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = dict.fromkeys(columns, 0)
    for column, chunk in _chunks(file, group, columns):
        sizes[column] += chunk.total_uncompressed_size
    return sizes


def _repeated(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> int:
    """Return the most bytes that one value of a dictionary can have."""
    return max(
        (
            int(chunk.total_uncompressed_size)
            for _, chunk in _chunks(file, group, columns)
            if chunk.physical_type.endswith("BYTE_ARRAY")
            and any("DICTIONARY" in encoding for encoding in chunk.encodings)
        ),
        default=0,
    )
