"""tiktoken rank files, by `tiktoken` or by a faster library that has proven itself.

Such a file says neither how text is split nor which control tokens there are. Public encodings are known by the hash of
their ranks, whatever the file is called; for any other file both must be given, and nothing is made up.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import ControlTokens, read_settings_beside, resolve_control_tokens
from megalm.tokenizer.encoder import (
    FAST_BACKENDS,
    FORMATS,
    Tokenizer,
    choose_end,
    import_fast_library,
    read_text,
    split_number,
)

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
O200K_PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
LLAMA3_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"""
    r"""\s+(?!\S)|\s+"""
)
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Encoding:
    """A public encoding: what its rank file does not say."""

    name: str
    hash: str
    """SHA-256 of the ranks as OpenAI and Meta publish them: a line for each, in order, token in base64 and number."""
    pattern: str
    special: Mapping[str, int]
    end: str = END_OF_TEXT
    begin: str | None = None
    splitting: str | None = None
    """What gigatoken calls the pattern."""
    called: tuple[str, ...] = field(default=())
    """Parts of file names that tell it."""


def _llama3_special() -> dict[str, int]:
    given = {
        0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>",
    }  # fmt: skip
    reserved = (number for number in range(256) if number not in given)
    names = {**given, **{at: f"<|reserved_special_token_{number}|>" for number, at in enumerate(reserved)}}
    return {names[at]: 128000 + at for at in range(256)}


ENCODINGS = (
    Encoding(
        "r50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", GPT2_PATTERN,
        {END_OF_TEXT: 50256}, splitting="gpt2", called=("r50k", "gpt2"),
    ),
    Encoding(
        "p50k_base", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", GPT2_PATTERN,
        {END_OF_TEXT: 50256}, splitting="gpt2", called=("p50k",),
    ),
    Encoding(
        "cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7", CL100K_PATTERN,
        {END_OF_TEXT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
         "<|endofprompt|>": 100276},
        splitting="cl100k", called=("cl100k",),
    ),
    Encoding(
        "o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d", O200K_PATTERN,
        {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}, splitting="o200k", called=("o200k",),
    ),
    Encoding(
        "llama3", "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", LLAMA3_PATTERN,
        _llama3_special(), end="<|end_of_text|>", begin="<|begin_of_text|>", called=("llama3", "llama-3"),
    ),
)  # fmt: skip
NAMES = tuple(encoding.name for encoding in ENCODINGS)


class TiktokenTokenizer(Tokenizer):
    """A tiktoken rank file.

    `pattern`: how text is split, as a regular expression or by the name of a public encoding. `special`: control tokens
    as NAME=NUMBER; `end`: the one that ends documents, as NAME, or as NAME=NUMBER where it is not known yet.
    """

    library, fast = "tiktoken", FAST_BACKENDS[:1]

    def __init__(
        self,
        path: str,
        pattern: str | None = None,
        backend: str = "auto",
        proven: bool = False,
        control_tokens: bool = False,
        end: str | None = None,
        special: Sequence[str] = (),
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(f"{path} is a tiktoken file: `pip install tiktoken` to read it.") from error
        ranks = read_ranks(path)
        known = recognize(path, ranks)
        by_pattern = next((e for e in ENCODINGS if pattern in (e.name, *e.called, e.pattern)), None)
        split = known if pattern is None else by_pattern
        if split is None and pattern is None:
            name = os.path.basename(path).lower()
            called = next((e.name for e in ENCODINGS if any(part in name for part in e.called)), None)
            damaged = f" It is called {called}, but has other ranks: fetch a damaged copy again." if called else ""
            raise ConfigError(
                f"{path}: its {len(ranks)} ranks are those of no public encoding ({', '.join(NAMES)}), and a tiktoken file "
                "does not say how text is split: give --tiktoken-pattern, a regular expression or one of these names, and "
                f"the end-of-document token with its number, --eos NAME=NUMBER.{damaged}"
            )
        self._splitting = split.splitting if split else None
        self._special = dict(known.special) if known else {}
        self._add_special(path, ranks, special, end)
        self._allowed: Any = "all" if control_tokens else set()
        try:
            self._encoding = tiktoken.Encoding(
                os.path.basename(path),
                pat_str=split.pattern if split else str(pattern),
                mergeable_ranks=ranks,
                special_tokens=self._special,
            )
        except BaseException as error:  # a pattern that cannot be read is a Rust panic or a ValueError
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ConfigError(
                f"{path}: tiktoken cannot use it ({error}). Correct --tiktoken-pattern, or give {FORMATS}."
            ) from error
        if split is None:
            self._check_pattern(path, str(pattern))
        ids = frozenset([*ranks.values(), *self._special.values()])
        own = ControlTokens(
            begin=self._special.get(known.begin) if known and known.begin else None,
            end=self._special.get(known.end) if known else None,
        )
        control = resolve_control_tokens(
            read_settings_beside(Path(path)), self.token_id, known=ids.__contains__, own=own, special=self._special
        )
        control = replace(control, end=choose_end(path, end, control.end, self.token_id))
        super().__init__(path, ids, control)
        self._choose(backend, proven)

    def _check_pattern(self, path: str, pattern: str) -> None:
        """Refuse a pattern that leaves characters out: tiktoken drops without a word what no match covers."""
        for sample in ("words, more words", "in 2 lines\n\tor 30", "Größe \u65e5\u672c\u8a9e \U0001f600"):
            back = self._encoding.decode(self._encoding.encode_ordinary(sample))
            if back != sample:
                raise ConfigError(
                    f"{path}: --tiktoken-pattern {pattern!r} does not cover all of a text: {sample!r} comes back as {back!r}. "
                    f"Give a regular expression whose matches leave nothing out, or one of {', '.join(NAMES)}."
                )

    def _add_special(self, path: str, ranks: Mapping[bytes, int], special: Sequence[str], end: str | None) -> None:
        """Adds the control tokens that were given with their numbers. Errors: ConfigError for one that cannot be"""
        given = [("--special", text) for text in special]
        if end is not None and end not in self._special and end.encode("utf-8", "replace") not in ranks:
            given += [("--eos", end)] if split_number(end)[1] is not None else []
        taken = set(ranks.values())
        for option, text in given:
            name, number = split_number(text)
            if number is None:
                raise ConfigError(f"{option} {text}: has no number. Give NAME=NUMBER, such as {END_OF_TEXT}=50256.")
            if self._special.get(name, number) != number:
                raise ConfigError(
                    f"{option} {text}: {name} has the number {self._special[name]} in {path}. Leave it out."
                )
            others = {value for other, value in self._special.items() if other != name}
            if number in taken or number in others or number >= 1 << 31:
                what = "is beyond what a token can be" if number >= 1 << 31 else "is that of another token"
                raise ConfigError(f"{option} {text}: the number {number} {what} of {path}. Give the model's own.")
            self._special[name] = number

    def _encode_slowly(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special=self._allowed, disallowed_special=())

    def _encode_with_names(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        library = import_fast_library(name)
        if self._splitting is None:
            raise ValueError("it splits text by a pattern of its own")
        special = self._special if self._allowed else {}
        return library.Tokenizer.from_tiktoken(self.path, self._splitting, special).encode

    def _names_in_text(self) -> Sequence[str]:
        return list(self._special)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        try:
            return self._encoding.encode_single_token(name)
        except KeyError:
            return None

    def control_ids(self) -> Collection[int]:
        return {*super().control_ids(), *self._special.values()}


def read_ranks(path: str) -> dict[bytes, int]:
    """Number of each token of a rank file. ConfigError where it is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(
                f"{path}: line {number} is not `base64 number` but {line[:60]!r}. Restore the file, or give {FORMATS}."
            ) from error
    check_ranks(path, ranks)
    return ranks


def check_ranks(path: str, ranks: Mapping[bytes, int]) -> None:
    """Errors: ConfigError for ranks that cannot encode every text."""
    alone = sum(bytes([value]) in ranks for value in range(256))
    if alone < 256 or len(set(ranks.values())) < len(ranks):
        what = f"only {alone} of the 256 single bytes" if alone < 256 else "the same number for two tokens"
        raise ConfigError(f"{path}: holds {what}. Restore the file, or give {FORMATS}.")


def hash_of(ranks: Mapping[bytes, int]) -> str:
    """SHA-256 of the ranks in the form that they are published in, whatever the lines' order and ends are here."""
    lines = (base64.b64encode(t) + b" %d\n" % rank for t, rank in sorted(ranks.items(), key=lambda item: item[1]))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def recognize(path: str, ranks: Mapping[bytes, int]) -> Encoding | None:
    """The public encoding that these ranks are of. None for ranks of nobody known."""
    digest = hash_of(ranks)
    return next((encoding for encoding in ENCODINGS if encoding.hash == digest), None)
