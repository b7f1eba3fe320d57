"""What every tokenizer format gives: ids of texts by the format's own library, or by a faster one that has proven itself.

Text is only text here: `<s>` or `<|endoftext|>` written in a document is encoded as its characters, not as the control
token, so that no document can end itself, unless `control_tokens` asks for it. Control tokens are added by number
(`eos_id`, `bos_id`).

Where an exact faster library is installed it encodes in place of the format's own, but only after it gave the same ids
for every text of a sample (`prove`); its ids are never trusted unseen.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import TOKENIZER_NAMES, ControlTokens, list_missing_ids
from megalm.tokenizer.proof import make_proof_texts

FORMATS = "a Hugging Face tokenizer.json, Mistral's tekken.json, a SentencePiece .model, or a .tiktoken rank file"
FAST_BACKENDS = ("gigatoken", "fastokens")  # by measured speed


class CannotEncode(ConfigError):
    """A text that the tokenizer's library gives no ids for."""


class FastLibraryMissing(Exception):
    """A faster library is not there, or cannot be imported; says why."""


class Prompt(NamedTuple):
    """A text to go on from: its ids, of which the tokenizer itself put the first `added` before the text."""

    ids: list[int]
    added: int


class Tokenizer:
    """What the tools need of a tokenizer.

    `control` has the control tokens; `eos_id` and `bos_id` are those that end and begin documents, None where it has none;
    `backend` names the library that encodes: the one that the format belongs to (`library`), or a faster one that has
    proven itself; `rejected` says of each faster one that was tried and does not serve why.
    """

    library = ""
    fast: tuple[str, ...] = ()
    """Faster libraries that may read the format, by measured speed."""

    def __init__(self, path: str, ids: Iterable[int], control: ControlTokens):
        self.path, self.control, self.backend = path, control, self.library
        self.eos_id, self.bos_id = control.end, control.begin
        self._ids = frozenset(ids)
        self.vocab_size = max(self._ids, default=-1) + 1
        self.rejected: dict[str, str] = {}
        self._encode: Callable[[str], Any] = self._encode_slowly
        self._untried = False

    def _choose(self, backend: str, proven: bool) -> None:
        """Takes what was asked for. Errors: ConfigError if that cannot serve."""
        self._untried = backend == "auto"  # proving takes a while, which one who only decodes need not wait
        if backend not in ("auto", self.library):
            self._take(backend, proven)
        if backend not in ("auto", self.backend):
            raise ConfigError(
                f"the tokenizer backend {backend!r} cannot serve {self.path}: {self.rejected.get(backend, 'unknown')}. "
                f"Choose auto or one of {', '.join((self.library, *self.fast))}."
            )

    def _encode_slowly(self, text: str) -> Any:
        """Encode the ids by the library that the format belongs to, which are right by definition."""
        raise NotImplementedError

    def _encode_batch_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._encode_slowly(text)) for text in texts]

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        """`_encode_slowly` by another library. Errors: FastLibraryMissing; anything, if it does not read this tokenizer"""
        raise NotImplementedError

    def _names_in_text(self) -> Sequence[str]:
        """Of tokens that a library might find in a text: they belong to the proof."""
        return ()

    def _take(self, name: str, proven: bool = False) -> bool:
        try:
            if name not in self.fast:
                raise ValueError(f"it does not read what {self.library} does")
            encode = self._fast_encoder(name)
        except FastLibraryMissing as error:
            self.rejected[name] = str(error)
            return False
        except BaseException as error:  # a Rust panic is a BaseException; the slow library then serves
            _let_interrupts_through(error)
            self.rejected[name] = f"it does not read this tokenizer ({_first_line(error)})"
            return False
        difference = None if proven else self._differs(encode, make_proof_texts(self._names_in_text()))
        if difference is not None:
            self._reject(name, difference)
            return False
        self._encode, self.backend = encode, name
        return True

    def _reject(self, name: str, difference: str) -> None:
        self.rejected[name] = f"its ids differ from those of `{self.library}` on {difference[:60]!r}"

    def _differs(self, encode: Callable[[str], Any], texts: Iterable[str]) -> str | None:
        for text in texts:
            try:
                right = self._encode_slowly(text)
            except BaseException as error:  # a text that has no ids proves nothing
                _let_interrupts_through(error)
                continue
            try:
                if not np.array_equal(encode(text), right):
                    return text
            except BaseException as error:
                _let_interrupts_through(error)
                return text
        return None

    def choose_backend(self) -> str:
        """The library that encodes: with backend="auto" the first of the fast ones that proves itself, at the first use."""
        if self._untried:
            self._untried = False
            any(self._take(name) for name in self.fast)
        return self.backend

    def prove(self, texts: Iterable[str]) -> None:
        """Compares the fast library with the format's own on these texts; at the first difference that one serves from
        then on."""
        if self.choose_backend() == self.library:
            return
        difference = self._differs(self._encode, texts)
        if difference is not None:
            self._reject(self.backend, difference)
            self.backend, self._encode = self.library, self._encode_slowly

    def encode(self, text: str) -> np.ndarray:
        """Encode ids of the text, without any control token that it does not spell. Shapes: -> integers [N]

        Errors: CannotEncode
        """
        self.choose_backend()
        try:
            return np.asarray(self._encode(text))
        except BaseException as error:
            _let_interrupts_through(error)
            if self.backend == self.library:
                raise self._cannot_encode(text, error) from error
        try:
            return np.asarray(self._encode_slowly(text))
        except BaseException as error:
            _let_interrupts_through(error)
            raise self._cannot_encode(text, error) from error

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode the ids of each text. Errors: CannotEncode, of the first that has none"""
        if self.choose_backend() == self.library:
            try:
                return self._encode_batch_slowly(texts)
            except BaseException as error:
                _let_interrupts_through(error)
        return [self.encode(text) for text in texts]

    def _cannot_encode(self, text: str, error: BaseException) -> CannotEncode:
        return CannotEncode(
            f"{self.path}: `{self.library}` has no ids for the text {text[:40]!r} ({_first_line(error)}). Give a tokenizer "
            "with an unknown token that is in its vocabulary, or one that knows every byte."
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Decode the text of these ids; control tokens are written by name."""
        raise NotImplementedError

    def decode_text(self, ids: Iterable[int]) -> str:
        """Decode the text of ids that `encode` gave for one."""
        return self.decode(ids)

    def token_id(self, name: str) -> int | None:
        """The number of a token by its exact name, or None."""
        raise NotImplementedError

    def name_of(self, number: int) -> str:
        """Name a token. Errors: ValueError for a number that the tokenizer does not have"""
        return self.decode([number])

    @property
    def unknown_id(self) -> int | None:
        """What is written for characters that the vocabulary lacks; None if nothing is."""
        return None

    @property
    def drops_characters(self) -> bool:
        """True if characters that the vocabulary lacks vanish. `count_dropped` tells how many."""
        return False

    def count_dropped(self, text: str) -> int:
        """Count characters of the text that have no id."""
        return 0

    def control_ids(self) -> Collection[int]:
        """The control tokens, which no text gives unless it was asked for."""
        return [i for i in (self.control.begin, self.control.end) if i is not None]

    def encode_prompt(self, text: str) -> Prompt:
        """Encode ids of a text that a model is to go on from, as transformers' tokenizer of the same folder gives them.

        The tokens that the tokenizer puts before and after every text are added (not a second time where the text spells
        them), and names of control tokens in the text are those tokens: a prompt is written by whoever asks, not by a
        document.
        """
        ids = self.encode_with_names(text)
        begin = [self.control.begin] if self.control.add_begin and self.control.begin is not None else []
        end = [self.control.end] if self.control.add_end and self.control.end is not None else []
        if ids[:1] == begin:
            begin = []
        return Prompt([*begin, *ids, *end], len(begin))

    def encode_with_names(self, text: str) -> list[int]:
        """Encode ids of a text that spells its control tokens itself, as a chat template's does; nothing is added to it."""
        return [int(token) for token in self._encode_with_names(text)]

    def control_names(self) -> list[str]:
        """Names of the control tokens, longest first."""
        names = set()
        for number in self.control_ids():
            with suppress(ValueError):  # a number without a name, which no text can spell
                names.add(self.name_of(number))
        return sorted(names - {""}, key=len, reverse=True)

    def _encode_with_names(self, text: str) -> Any:
        """The ids of a text whose names of control tokens are those tokens, where the format's library can read them."""
        return self._encode_slowly(text)

    def unknown_ids(self, size: int) -> list[int]:
        """The ids below `size` that no token has: rows that pad a model's vocabulary, and gaps in the tokenizer's own."""
        return list_missing_ids(self._ids, size)

    def fingerprint(self) -> str:
        """Changes when the tokenizer's file does."""
        return compute_fingerprint(self.path)


def import_fast_library(name: str) -> Any:
    """The module of a faster library. Errors: FastLibraryMissing, which tells absence from an import that fails"""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise FastLibraryMissing("it is not installed") from error
        raise FastLibraryMissing(f"its import fails ({_first_line(error)})") from error
    except Exception as error:
        raise FastLibraryMissing(f"its import fails ({_first_line(error)})") from error


def split_number(name: str) -> tuple[str, int | None]:
    """(name, number) of `NAME=NUMBER`; of a name alone the number is None."""
    found = re.fullmatch(r"(.+)=(\d+)", name, re.DOTALL)
    return (found[1], int(found[2])) if found else (name, None)


def choose_end(path: str, end: str | None, own: int | None, token_id: Callable[[str], int | None]) -> int | None:
    """Choose the number of the end token: of the name that was asked for, as NAME or NAME=NUMBER, else the tokenizer's own. None
    if there is no such token.

    Errors: ConfigError if the number that was asked for is not the tokenizer's.
    """
    if end is None:
        return own
    if (number := token_id(end)) is not None:
        return number
    name, number = split_number(end)
    there = token_id(name)
    if number is not None and there != number:
        has = f"gives it the number {there}" if there is not None else "has no token of this name"
        raise ConfigError(
            f"--eos {end}: {path} {has}. Give the name alone; only a .tiktoken rank file leaves numbers to you."
        )
    return there


def compute_fingerprint(path: str) -> str:
    """Compute a hash of the tokenizer's file; in a folder, of the file that is read."""
    if os.path.isdir(path):
        names = (os.path.join(path, file) for file in TOKENIZER_NAMES)
        path = next((name for name in names if os.path.exists(name)), path)
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give {FORMATS}.") from error


def read_bytes(path: str) -> bytes:
    """Read the file's content. ConfigError where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give {FORMATS}.") from error


def read_text(path: str) -> str:
    """Read the file's text, without a byte order mark. ConfigError where it is none."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give {FORMATS}.") from error


def _let_interrupts_through(error: BaseException) -> None:
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
