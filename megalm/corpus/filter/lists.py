"""Steps that look for what is on a list, or has a form: words, addresses of the web, personal data; a user's function."""

from __future__ import annotations

import importlib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.texts import Texts
from megalm.corpus.fields import look_up_value
from megalm.corpus.filter.batch import Batch

_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
PII: dict[str, re.Pattern[str]] = {
    "email": re.compile(
        r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
    ),
    "ip": re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w.]*\d)"),
    "phone": re.compile(
        r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}|\(\d{3}\) ?\d{3}[ .-]\d{4}"
        r"|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w-])"
    ),
    "key": re.compile(
        r"(?<!\w)(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
        r"|AIza[0-9A-Za-z_-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?!\w)"
        r"|-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"
    ),
}
"""Forms of personal data and secrets, after the published forms of e-mail (RFC 5322, the common part), IPv4, telephone
numbers (E.164 and North America), and of keys of AWS, GitHub, OpenAI, Slack, Google, JSON web tokens and PEM."""


def is_public(found: str) -> bool:
    """Whether an IP address is one of the public network."""
    try:
        return ipaddress.ip_address(found).is_global
    except ValueError:
        return False


@dataclass(frozen=True)
class PersonalData:
    """Counts what looks like personal data or a secret; with `replace` a mark such as <email> stands for it."""

    kinds: tuple[str, ...] = tuple(PII)
    replace: bool = False
    needs_fields = False

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in PII:
                raise ConfigError(f"personal data of the kind {kind!r} is not known: choose from {', '.join(PII)}.")

    @property
    def gives(self) -> tuple[str, ...]:
        """A count for each kind, and their sum."""
        return (*(f"pii_{kind}" for kind in self.kinds), "pii")

    def apply(self, batch: Batch) -> None:
        """Gives the counts; changes the texts if they are to be replaced."""
        counts = np.zeros((len(batch.texts), len(self.kinds)))
        changed: list[str] = []
        for number, text in enumerate(batch.texts):
            for place, kind in enumerate(self.kinds):
                text, counts[number, place] = self._replaced(text, kind)
            changed.append(text)
        for place, kind in enumerate(self.kinds):
            batch.give(f"pii_{kind}", counts[:, place])
        batch.give("pii", counts.sum(1))
        if self.replace and counts.any():
            batch.change(Texts.of(changed))

    def _replaced(self, text: str, kind: str) -> tuple[str, int]:
        """The text, and how many were found; addresses that are not public belong to nobody."""
        if (kind == "email" and "@" not in text) or (kind == "ip" and "." not in text):
            return text, 0
        count = 0

        def mark(match: re.Match[str]) -> str:
            nonlocal count
            if kind == "ip" and not is_public(match.group()):
                return match.group()
            count += 1
            return f"<{kind}>"

        new = PII[kind].sub(mark, text)
        return (new if self.replace else text), count


@dataclass(frozen=True)
class ListedWords:
    """Counts the places of listed words and phrases, in any case; in scripts without spaces anywhere in the text."""

    words: tuple[str, ...]
    score: str = "listed_words"
    inside: bool = False
    needs_fields = False

    @property
    def gives(self) -> tuple[str, ...]:
        """The count."""
        return (self.score,)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = "|".join(re.escape(word.lower()) for word in sorted(self.words, key=len, reverse=True))
        return re.compile(parts if self.inside else rf"(?<!\w)(?:{parts})(?!\w)")

    def apply(self, batch: Batch) -> None:
        """Gives the count."""
        found = [sum(1 for _ in self._pattern.finditer(text.lower())) for text in batch.texts]
        batch.give(self.score, np.array(found))


@dataclass(frozen=True)
class Address:
    """Counts the reasons against a document's address: its domain (or one above it) is listed, a word between its signs
    is, or a part of it is."""

    field: str = "url"
    domains: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    gives = ("listed_address",)
    needs_fields = True

    def apply(self, batch: Batch) -> None:
        """Gives the count; none for a document without an address."""
        batch.give(
            "listed_address", np.array([self._count(look_up_value(fields, self.field)) for fields in batch.fields])
        )

    def _count(self, url: Any) -> float:
        if not isinstance(url, str) or not url:
            return 0.0
        small = url.lower()
        try:
            host = urlsplit(small if "://" in small else f"//{small}").hostname or ""
        except ValueError:  # brackets that do not close
            host = ""
        labels = host.split(".")
        listed = any(".".join(labels[start:]) in self.domains for start in range(len(labels)))
        named = any(word in self.words for word in re.split(r"[^a-z0-9]+", small)) if self.words else False
        flat = re.sub(r"[^a-z0-9]+", "", small) if self.parts else ""
        return float(listed) + float(named) + float(any(part in flat for part in self.parts))


@dataclass(frozen=True)
class FieldValue:
    """A number of the document's own fields; with `values` 1 where the field is one of these, else 0."""

    field: str
    missing: str | None = None
    """What becomes of a document without it: keep, drop; None: an error."""
    values: tuple[str, ...] = ()
    needs_fields = True

    @property
    def gives(self) -> tuple[str, ...]:
        """The field's name."""
        return (self.field,)

    def apply(self, batch: Batch) -> None:
        """Gives the value.

        Errors: ConfigError where a document has none, unless `missing` says what becomes of it.
        """
        batch.give(self.field, np.array([self._value(fields) for fields in batch.fields]))

    def _value(self, fields: dict[str, Any]) -> float:
        found = look_up_value(fields, self.field)
        if found is not None and self.values:
            return float(str(found) in self.values)
        if isinstance(found, (int, float)):
            return float(found)
        if self.missing is None:
            shown = (
                f"is {found!r}, no number"
                if found is not None
                else f"is not among {', '.join(map(str, fields)) or 'none'}"
            )
            raise ConfigError(
                f"a rule asks for the field {self.field!r}, which {shown}. Name another field, or say `missing: keep` or "
                "`missing: drop`."
            )
        return float("nan") if self.missing == "keep" else float("-inf")


@dataclass(frozen=True)
class UserFunction:
    """A function `name(text, fields)` of a module of the user's that gives a number, or True and False."""

    function: str
    needs_fields = True

    @property
    def gives(self) -> tuple[str, ...]:
        """The function's name."""
        return (self.function.rpartition(":")[2],)

    def apply(self, batch: Batch) -> None:
        """Gives what the function returns.

        Errors: ConfigError where it fails, or returns something else.
        """
        call = load_function(self.function)
        found = np.empty(len(batch.texts))
        for number, (text, fields) in enumerate(zip(batch.texts, batch.fields, strict=True)):
            try:
                found[number] = float(call(text, fields))
            except Exception as error:  # whatever a user's function raises
                raise ConfigError(
                    f"{self.function} fails for a text that begins {text[:60]!r} ({type(error).__name__}: {error}). It takes "
                    "(text, fields) and returns a number."
                ) from error
        batch.give(self.gives[0], found)


@cache
def load_function(name: str) -> Callable[[str, dict[str, Any]], Any]:
    """Load the function MODULE:NAME.

    Errors: ConfigError where there is none.
    """
    module, separator, function = name.partition(":")
    if not separator:
        raise ConfigError(f"function {name!r}: name it as MODULE:NAME, with the module's folder in PYTHONPATH.")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"function {name!r}: {error}. Its folder must be in PYTHONPATH.") from error
    if not callable(found):
        raise ConfigError(f"function {name!r} is no function.")
    return found
