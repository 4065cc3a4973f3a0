"""Rows of Parquet files, by batches. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megapoly.data.records import BadRecord, Record
from megapoly.errors import ConfigError, DataError

_ROWS = 256  # of a batch, all of which are in memory


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file; whatever the library says of it becomes our error."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading .parquet needs pyarrow: pip install 'megapoly[data]'") from error
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}); get the file anew") from error


def row_groups(path: Path, size: int, fields: Sequence[str]) -> Iterator[tuple[int, int, int]]:
    """Pieces of about ``size`` bytes in memory: first row group, the one after the last, and the first row, from 1.

    Raises:
        DataError: the file is damaged or no Parquet.
    """
    with _opened(path) as file:
        _check_footer(path, file.metadata, fields)
        first = row = 0
        held = rows = 0
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            held += about.total_byte_size
            rows += about.num_rows
            if held >= size:
                yield first, group + 1, row + 1
                first, row, held, rows = group + 1, row + rows, 0, 0
        if first < file.num_row_groups:
            yield first, file.num_row_groups, row + 1


def _check_footer(path: Path, metadata: Any, fields: Sequence[str]) -> None:
    """The pages of a file have checksums, its footer has none: it could lose rows, or have some come twice."""
    chosen = [
        i for i in range(metadata.num_columns) if not fields or metadata.schema.column(i).path.split(".")[0] in fields
    ]
    places, rows = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        rows += group.num_rows
        for column in map(group.column, chosen):
            starts = [at for at in (column.dictionary_page_offset, column.data_page_offset) if at]
            places.append((min(starts, default=0), column.total_compressed_size))
    places.sort()
    overlap = any(start + size > after for (start, size), (after, _) in itertools.pairwise(places))
    if rows != metadata.num_rows or overlap:
        raise DataError(
            f"{path}: cannot be read (its footer is damaged: {rows} rows in row groups, {metadata.num_rows} in all,"
            f" columns {'one over the other' if overlap else 'apart'}); get the file anew"
        )


def rows(path: Path, start: int, stop: int, number: int, fields: Sequence[str]) -> Iterator[Record | BadRecord]:
    """The rows of the row groups from ``start`` to before ``stop``, the first of which has this ``number``.

    Args:
        fields: the columns to read, those of them that the file has; all where none is named.

    Raises:
        DataError: the file is damaged or no Parquet.
    """
    with _opened(path) as file:
        names = file.schema_arrow.names
        columns = [name for name in fields if name in names]
        if fields and not columns:  # then every row names what there is instead
            columns = names
        # Threads of the library's own would hang a process that was forked after they had begun.
        groups = range(start, stop)
        first, count = number, sum(file.metadata.row_group(group).num_rows for group in groups)
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=columns or None, use_threads=False):
            try:
                values = batch.to_pylist()
            except UnicodeDecodeError:
                values = None
            for i in range(batch.num_rows):
                try:
                    yield Record(path, number, values[i] if values else batch.slice(i, 1).to_pylist()[0], "row")
                except UnicodeDecodeError as error:
                    what = f"is not UTF-8, at byte {error.start} of a field; convert the text to UTF-8"
                    yield BadRecord(path, number, "row", 0, "not UTF-8", what)
                number += 1
        if number - first != count:
            raise DataError(
                f"{path}: cannot be read (row groups {start} to {stop - 1} hold {number - first} rows, and the footer"
                f" tells of {count}); get the file anew"
            )
