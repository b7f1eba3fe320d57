"""Parquet and Arrow files as records, a few rows at a time. Where one is damaged, what is before the place is read.

`read_records` is a pure function of file and row groups; pyarrow is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

from megalm.config.errors import ConfigError
from megalm.corpus.archives import Unreadable
from megalm.corpus.fields import find_column
from megalm.corpus.files import open_seekable
from megalm.corpus.values import list_values

ROWS = 128  # that are held as Python objects
BUFFER = 1 << 20  # bytes of a column that are read at a time; without it whole columns are held


class Row(NamedTuple):
    """A row of a table."""

    number: int
    record: Any
    """None where something is wrong."""
    wrong: str = ""
    """Why a value that is needed cannot be read."""
    lost: str = ""
    """Which of the other values cannot be read, and why: the record is without them."""


def count_row_groups(paths: Sequence[str]) -> dict[str, int]:
    """Count how many row groups each Parquet file has; 0 where it does not say so.

    Errors: ConfigError for a file that cannot be read, or without pyarrow.
    """
    with ThreadPoolExecutor(8) as pool:  # far away each takes a while
        return dict(zip(paths, pool.map(_row_groups, paths), strict=True))


def read_records(
    path: str, ending: str, first: int, stop: int | None, names: Sequence[str], others: Sequence[str] | None
) -> Iterator[Row]:
    """Read the rows of a .parquet or .arrow file, in order. Which of them are there, and which have something wrong, depends on
    the needed columns alone: who reads more columns sees the same rows.

    first, stop: of the row groups of a Parquet file; stop None: the last. names: columns, or paths such as meta.text,
    that every row must have; others: those that will be asked for besides and are needed as well; None: all that there
    are, as far as they can be read.
    Errors: ConfigError without pyarrow; OSError for a file out of reach. A damaged file ends with a row that says so.
    """
    pyarrow = _pyarrow()
    needed = (*names, *(others or ()))
    row = 0
    try:
        with open_seekable(path) as file:
            if ending == ".parquet":
                table = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER)
                groups = range(first, table.num_row_groups if stop is None else stop)
                row = sum(table.metadata.row_group(group).num_rows for group in range(first))
                columns = _columns(table.schema_arrow.names, names, others)
                batches = (found for group in groups for found in _batches_of_group(table, group, columns, needed))
            else:
                batches = ((batch, "") for batch in _arrow_batches(pyarrow, file, names, others))
            for batch, missing in batches:
                for record, wrong, lost in _rows(batch, needed):
                    row += 1  # counted before it is given: a reader may stop here
                    yield Row(row - 1, record, wrong, "; ".join(filter(None, (missing, lost))))
    except Exception as error:  # pyarrow has many kinds, and lets those of other libraries through
        if isinstance(error, (ConfigError, Unreadable)) or (isinstance(error, OSError) and error.errno is not None):
            raise  # the file is not damaged, but out of reach
        rest = "file" if stop is None else "row group"
        yield Row(row, None, f"cannot be read ({error}); the rest of the {rest} is left out")


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
    except Exception:  # reading it says why
        return 0


def _batches_of_group(
    table: Any, group: int, columns: list[str] | None, needed: Sequence[str]
) -> Iterator[tuple[Any, str]]:
    """(batch, which columns are missing in it and why) of a row group. Where a column that is not needed is damaged, the
    others go on without it."""
    given = 0
    try:
        for batch in table.iter_batches(ROWS, row_groups=[group], columns=columns):
            given += 1
            yield batch, ""
        return
    except Exception as error:  # as in `read_records`
        if columns is not None or (isinstance(error, OSError) and error.errno is not None):
            raise
        damage = error
    there = list(dict.fromkeys(table.schema_arrow.names))
    kept = {find_column(name, there) for name in needed}
    whole, missing = [], []
    for name in there:
        why = None if name in kept else _damage(table, group, name)
        if why is None:
            whole.append(name)
        else:
            missing.append(_without(name, why))
    if not missing:
        raise damage
    for number, batch in enumerate(table.iter_batches(ROWS, row_groups=[group], columns=whole)):
        if number >= given:
            yield batch, "; ".join(missing)


def _damage(table: Any, group: int, column: str) -> str | None:
    """Why a column of a row group cannot be read to its end; None where it can."""
    try:
        for _ in table.iter_batches(ROWS, row_groups=[group], columns=[column]):
            pass
    except Exception as error:  # as in `read_records`
        return str(error)
    return None


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
    wanted = [find_column(name, there) for name in (*names, *others)]
    return None if None in wanted[: len(names)] else sorted({name for name in wanted if name is not None})


def _rows(batch: Any, needed: Sequence[str]) -> list[tuple[Any, str, str]]:
    """(record, what is wrong, what is lost) of a batch's rows."""
    columns = {name: list_values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    inside = {find_column(name, list(columns)) for name in needed}
    wrong: dict[int, str] = {}
    lost: dict[int, str] = {}
    for name, column in columns.items():
        if name in needed:
            for row, why in (*column.restored.items(), *column.lost.items()):
                wrong.setdefault(row, f"invalid UTF-8, or a value that cannot be read ({why})")
        elif name in inside:
            for row, why in column.lost.items():
                wrong.setdefault(row, f"a value of column {name!r} cannot be read ({why})")
        else:
            for row, why in column.lost.items():
                lost[row] = f"{lost[row]}; " * (row in lost) + _without(name, why)
    rows: list[tuple[Any, str, str]] = []
    names = list(columns)
    for row, values in enumerate(zip(*(column.values for column in columns.values()), strict=True)):
        if row in wrong:
            rows.append((None, wrong[row], ""))
            continue
        record = dict(zip(names, values, strict=True))
        if row in lost:
            record = {name: value for name, value in record.items() if row not in columns[name].lost}
        rows.append((record, "", lost.get(row, "")))
    return rows if columns else [({}, "", "")] * len(batch)


def _without(name: str, why: str) -> str:
    return f"column {name!r} cannot be read ({why})"
