"""Parquet and Arrow files as records, a few rows at a time. Where one is damaged, what is before the place is read.

`records` is a pure function of file and row groups; pyarrow is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from megalm.config.errors import ConfigError
from megalm.corpus.fields import column_of
from megalm.corpus.files import open_seekable

ROWS = 128  # that are held as Python objects
BUFFER = 1 << 20  # bytes of a column that are read at a time; without it whole columns are held
UNREADABLE = (OSError, ValueError, MemoryError, OverflowError)  # what else pyarrow raises for damaged files


def row_groups(paths: Sequence[str]) -> dict[str, int]:
    """How many row groups each Parquet file has; 0 where it does not say so.

    Errors: ConfigError for a file that cannot be read, or without pyarrow.
    """
    with ThreadPoolExecutor(8) as pool:  # far away each takes a while
        return dict(zip(paths, pool.map(_row_groups, paths), strict=True))


def records(
    path: str, ending: str, first: int, stop: int | None, names: Sequence[str], others: Sequence[str] | None
) -> Iterator[tuple[int, Any, str]]:
    """(row, its record, what is wrong) of a .parquet or .arrow file, in order; a row with something wrong has no record.

    first, stop: of the row groups of a Parquet file; stop None: the last. names: columns, or paths such as meta.text,
    that every row must have; others: those that will be asked for besides, None: all.
    Errors: ConfigError without pyarrow; OSError for a file out of reach. A damaged file ends with a row that says so.
    """
    pyarrow = _pyarrow()
    row = 0
    try:
        with open_seekable(path) as file:
            if ending == ".parquet":
                table = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER)
                groups = range(first, table.num_row_groups if stop is None else stop)
                row = sum(table.metadata.row_group(group).num_rows for group in range(first))
                columns = _columns(table.schema_arrow.names, names, others)
                batches = table.iter_batches(ROWS, row_groups=list(groups), columns=columns)
            else:
                batches = _arrow_batches(pyarrow, file, names, others)
            for batch in batches:
                for record, wrong in _rows(batch):
                    row += 1  # counted before it is given: a reader may stop here
                    yield row - 1, record, wrong
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file is not damaged, but out of reach
        rest = "file" if stop is None else "row group"
        yield row, None, f"cannot be read ({error}); the rest of the {rest} is left out"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("reading .parquet and .arrow needs pyarrow: `pip install pyarrow`.") from error
    return pyarrow


def _row_groups(path: str) -> int:
    pyarrow = _pyarrow()
    try:
        with open_seekable(path) as file:
            return pyarrow.parquet.ParquetFile(file).num_row_groups
    except OSError as error:
        if error.errno is not None:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}). Restore the file, or leave it out."
            ) from error
        return 0
    except (pyarrow.ArrowException, *UNREADABLE):
        return 0  # reading it says why


def _arrow_batches(pyarrow: Any, file: BinaryIO, names: Sequence[str], others: Sequence[str] | None) -> Iterator[Any]:
    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = batches = pyarrow.ipc.open_stream(file)
    columns = _columns(reader.schema.names, names, others)
    for batch in batches:
        whole = batch if columns is None else batch.select(columns)
        yield from (whole.slice(start, ROWS) for start in range(0, len(whole), ROWS))


def _columns(there: Sequence[str], names: Sequence[str], others: Sequence[str] | None) -> list[str] | None:
    """Those that are needed; None, all, where one is missing: the message then tells which there are."""
    if others is None:
        return None
    wanted = [column_of(name, there) for name in (*names, *others)]
    return None if None in wanted[: len(names)] else sorted({name for name in wanted if name is not None})


def _rows(batch: Any) -> list[tuple[Any, str]]:
    """(record, what is wrong) of a batch's rows. Unchecked, offsets that point anywhere would be followed."""
    try:
        batch.validate(full=True)
        return [(record, "") for record in batch.to_pylist()]
    except ValueError:  # which pyarrow's own error is
        return [_row(batch.slice(number, 1)) for number in range(len(batch))]


def _row(batch: Any) -> tuple[Any, str]:
    try:
        batch.validate(full=True)
        return batch.to_pylist()[0], ""
    except ValueError as error:
        return None, f"invalid UTF-8, or a value that cannot be read ({error})"
