"""One word read as what a field holds: a whole number, a number, a truth. The field decides, never the word's looks."""

import math
import re
from decimal import Decimal

_WHOLE = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*\.?|(\d+(_\d+)*)?\.\d+(_\d+)*)([eE][+-]?\d+)?", re.ASCII)
_SPECIAL = {"inf": math.inf, "infinity": math.inf, "nan": math.nan}  # yaml writes them with a point before
_TRUTHS = {"true": True, "yes": True, "on": True, "y": True, "1": True,
           "false": False, "no": False, "off": False, "n": False, "0": False}  # fmt: skip
_SUFFIXES = {"k": "e3", "m": "e6", "b": "e9", "g": "e9", "t": "e12"}
_LARGEST_EXPONENT = 30  # of a whole number written as 1e9: far beyond any count, and no memory is spent on the digits


def read_whole(word: object) -> int:
    """Read the whole number that a word stands for: 1000, 1_000, 1e3. Errors: ValueError."""
    if isinstance(word, bool):
        raise ValueError
    if isinstance(word, int):
        return word
    text = str(word).strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        raise ValueError
    value = Decimal(text.replace("_", ""))
    if value.adjusted() > _LARGEST_EXPONENT or value != value.to_integral_value():
        raise ValueError
    return int(value)


def read_number(word: object) -> float:
    """Read the number that a word stands for, also inf and nan. Errors: ValueError."""
    if isinstance(word, bool):
        raise ValueError
    if isinstance(word, int | float):
        return float(word)
    text = str(word).strip()
    if _NUMBER.fullmatch(text):
        return float(text.replace("_", ""))
    sign = -1.0 if text.startswith("-") else 1.0
    name = text.lstrip("+-").lower().removeprefix(".")
    if name not in _SPECIAL:
        raise ValueError
    return sign * _SPECIAL[name]


def read_truth(word: object) -> bool:
    """true or false, in any of the words that yaml has for them. Errors: ValueError."""
    if isinstance(word, bool):
        return word
    name = str(word).strip().lower()
    if name not in _TRUTHS:
        raise ValueError
    return _TRUTHS[name]


def read_any(word: str) -> int | float | str:
    """Read a word of which only its reader knows what it is: a number where it looks like one, else the text."""
    text = word.strip()
    if _WHOLE.fullmatch(text):
        return int(text)
    return read_number(text) if _NUMBER.fullmatch(text) else word


def explain_number(word: str) -> str:
    """Explain what is wrong with a word that was meant as a number, where one can tell; a sentence with a space before it."""
    text = word.strip()
    plain = re.sub(r"[\u2010-\u2015\u2212\ufe63\uff0d]", "-", text)
    if plain != text:
        shown = f": write {plain}" if _NUMBER.fullmatch(plain) else ""
        return f" Its minus sign is another character than the keyboard's{shown}."
    if re.fullmatch(r"[+-]?\d{1,3}([,' \u00a0\u202f]\d{3})+(\.\d*)?", text):
        return f" Write it without separators: {re.sub(r'[^0-9.+-]', '', text)}."
    if re.fullmatch(r"[+-]?\d+,\d+([eE][+-]?\d+)?", text):
        return f" Write a point for the decimals: {text.replace(',', '.')}."
    if re.fullmatch(r"[+-]?\d[\d_]*(\.\d+)?\s*[kKmMbBgGtT]", text, re.ASCII):
        return f" Write {text[:-1].strip()}{_SUFFIXES[text[-1].lower()]}."
    if _NUMBER.fullmatch(text.rstrip("%").strip()) and text.endswith("%"):
        return f" Write {float(text.rstrip('%')) / 100:g}."
    return ""
