"""A table's values as Python has them; where Python has none for what is there, as near to it as can be written.

Text that is not UTF-8 keeps its bytes as surrogates ("\\udcff"), a time that Python's types cannot hold, or whose zone is
unknown, becomes a Moment. Only a value whose place in the file points nowhere has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Moment:
    """A time, date or duration that Python's types cannot hold, in words. It is no text: a document is not made of it."""

    words: str

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Values:
    """The values of a column; by the row, why a value is not as Python has it (`restored`), or is not there (`lost`)."""

    values: list[Any]
    restored: dict[int, str]
    lost: dict[int, str]


def list_values(column: Any) -> Values:
    """List the values of a pyarrow array, each by itself where not all can be had at once. Unchecked, offsets that point
    anywhere would be followed."""
    try:
        column.validate(full=True)
        return Values(_in_microseconds(column).to_pylist(), {}, {})
    except Exception:  # pyarrow, zoneinfo and datetime have kinds of their own
        found = Values([], {}, {})
    for row in range(len(column)):
        value, one = None, column.slice(row, 1)
        try:
            one.validate(full=True)
            value = _in_microseconds(one).to_pylist()[0]
        except Exception as error:
            try:
                value, found.restored[row] = _restored(one), str(error)
            except Exception as worse:
                found.lost[row] = str(worse)
        found.values.append(value)
    return found


def _in_microseconds(column: Any) -> Any:
    """The same moments in the unit that Python's types have. Where pandas is installed, pyarrow would make pandas' own of
    nanoseconds, and drop those of a time of day.

    Errors: pyarrow's, where a value has nanoseconds that would be lost
    """
    kind = _kind_in_microseconds(column.type)
    return column if kind == column.type else column.cast(kind)


def _kind_in_microseconds(kind: Any) -> Any:
    import pyarrow

    types = pyarrow.types

    def inside(field: Any) -> Any:
        return field.with_type(_kind_in_microseconds(field.type))

    if getattr(kind, "unit", None) == "ns":
        if types.is_timestamp(kind):
            return pyarrow.timestamp("us", kind.tz)
        return pyarrow.time64("us") if types.is_time(kind) else pyarrow.duration("us")
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _kind_in_microseconds(kind.value_type), kind.ordered)
    if types.is_struct(kind):
        return pyarrow.struct([inside(field) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(inside(kind.value_field))
    if types.is_large_list(kind):
        return pyarrow.large_list(inside(kind.value_field))
    if types.is_map(kind):
        return pyarrow.map_(inside(kind.key_field), inside(kind.item_field))
    return kind


def _restored(one: Any) -> Any:
    """The value of an array of one row, from the numbers and bytes behind it."""
    import pyarrow

    if pyarrow.types.is_dictionary(one.type):
        words = one.dictionary
        bare = words.view(_bare(words.type))
        held = pyarrow.DictionaryArray.from_arrays(one.indices, bare)
        held.validate(full=True)
        return _value(held.dictionary_decode()[0], words.type)
    bare = one.view(_bare(one.type))
    bare.validate(full=True)
    return _value(bare[0], one.type)


def _bare(kind: Any) -> Any:
    """The type of the bytes and numbers by which values of this type are stored."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_date32(kind) or types.is_time32(kind):
        return pyarrow.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return pyarrow.int64()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_bare(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_bare(kind.value_type)))
    if types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_bare(kind.value_type)))
    if types.is_map(kind):
        return pyarrow.map_(_bare(kind.key_type), kind.item_field.with_type(_bare(kind.item_type)))
    return kind


def _value(bare: Any, kind: Any) -> Any:
    """The value of a type from the scalar that stores it."""
    import pyarrow

    types = pyarrow.types
    if not bare.is_valid:
        return None
    if types.is_string(kind) or types.is_large_string(kind):
        return bare.as_py().decode("utf-8", "surrogateescape")
    if types.is_struct(kind):
        return {field.name: _value(bare[place], field.type) for place, field in enumerate(kind)}
    if types.is_list(kind) or types.is_large_list(kind):
        return [_value(item, kind.value_type) for item in bare.values]
    if types.is_map(kind):
        return [(_value(item[0], kind.key_type), _value(item[1], kind.item_type)) for item in bare.values]
    if types.is_temporal(kind) and not types.is_interval(kind):
        return _moment(bare.as_py(), kind)
    return bare.as_py()


def _moment(number: int, kind: Any) -> Any:
    """What a number of seconds, days and the like is, if Python has it; else in words, as Python would write it."""
    import pyarrow

    types = pyarrow.types
    try:
        return _in_microseconds(pyarrow.array([number], _bare(kind)).view(kind))[0].as_py()
    except Exception:  # as above
        if types.is_duration(kind):
            return Moment(str(np.timedelta64(number, kind.unit)))
        unit: Any = "D" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
        words = str(np.datetime64(number, unit)).replace("T", " ")
        if types.is_time(kind):
            return Moment(words.partition(" ")[2])
        return Moment(f"{words}+00:00" if types.is_timestamp(kind) and kind.tz else words)
