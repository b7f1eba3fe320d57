"""Numbers that may not be finite, or not be there: into JSON, out of it, and into words.

JSON has no NaN and no infinity. A file of ours holds them as the texts "nan", "inf" and "-inf", which `float` of any
language reads; older files hold Python's words NaN and Infinity, which its json reads. Whoever computes with what a file
holds asks `read_number` first, and whoever shows it asks `format_number`, so that no value from a file can break a format.
"""

import json
import math
from typing import Any


def read_number(value: Any) -> float | None:
    """Give the value as a number, finite or not; None for what is no number, and for what is not there."""
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        return None


def is_finite(value: Any) -> bool:
    """True for a number that one can go on computing with."""
    number = read_number(value)
    return number is not None and math.isfinite(number)


def format_number(value: Any, form: str = "g") -> str:
    """Write the number in a format of Python's, as 12.3457 with ".4f"; NaN, inf or -inf where it is that; other values as they
    are, and "-" for none."""
    number = read_number(value)
    if number is None:
        return "-" if value is None else str(value)
    if math.isnan(number):
        return "NaN"
    return format(number, form) if math.isfinite(number) else str(number)


def encode_json(value: Any, *, indent: int | None = None) -> str:
    """Write the value as JSON that every reader takes: non-finite numbers as text, scalars of other libraries as plain
    ones, and what JSON does not know as its text."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    scalar = getattr(value, "item", None)  # numpy's and torch's
    if callable(scalar):
        try:
            return _plain(scalar())
        except (TypeError, ValueError, RuntimeError):
            return str(value)
    return str(value)
