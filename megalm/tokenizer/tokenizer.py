"""One face over Hugging Face tokenizer.json, SentencePiece models and tiktoken rank files.

Text is only text here: `<s>` or `<|endoftext|>` written in a document is encoded as its characters, not as the control
token, so that no document can end itself, unless `control_tokens` asks for it. Control tokens are added by number
(`eos_id`, `bos_id`).

Where an exact faster library is installed it encodes in place of the format's own, but only after it gave the same ids
for every text of a sample (`prove`); its ids are never trusted unseen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import (
    TOKENIZER_NAMES,
    ControlTokens,
    missing_ids,
    parse_json,
    resolve_control_tokens,
    settings_beside,
)
from megalm.tokenizer.damage import describe_damage
from megalm.tokenizer.proof import proof_texts

FORMATS = "a Hugging Face tokenizer.json, a SentencePiece .model, or a .tiktoken rank file"
FAST_BACKENDS = ("gigatoken", "fastokens")  # by measured speed
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
TIKTOKEN = {  # name of the encoding: how it splits, number of its end-of-text token, what gigatoken calls the splitting
    "r50k": (GPT2_PATTERN, 50256, "gpt2"),
    "gpt2": (GPT2_PATTERN, 50256, "gpt2"),
    "p50k": (GPT2_PATTERN, 50256, "gpt2"),
    "cl100k": (CL100K_PATTERN, 100257, "cl100k"),
    "o200k": (O200K_PATTERN, 199999, "o200k"),
}


class Tokenizer:
    """What the tools need of a tokenizer.

    `control` has the control tokens; `eos_id` and `bos_id` are those that end and begin documents, None where it has none;
    `backend` names the library that encodes: the one that the format belongs to (`library`), or a faster one that has
    proven itself.
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
                f"Choose auto or one of {', '.join((self.library, *self.fast))} (`pip install --no-deps gigatoken fastokens`)."
            )

    def _encode_slowly(self, text: str) -> Any:
        """The ids by the library that the format belongs to, which are right by definition."""
        raise NotImplementedError

    def _encode_batch_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(self._encode_slowly(text)) for text in texts]

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        """`_encode_slowly` by another library. Errors: ImportError; anything, if it does not read this tokenizer"""
        raise NotImplementedError

    def _names_in_text(self) -> Sequence[str]:
        """Of tokens that a library might find in a text: they belong to the proof."""
        return ()

    def _take(self, name: str, proven: bool = False) -> bool:
        try:
            if name not in self.fast:
                raise ValueError(f"it does not read what {self.library} does")
            encode = self._fast_encoder(name)
        except ImportError:
            self.rejected[name] = "it is not installed"
            return False
        except BaseException as error:  # a Rust panic is a BaseException; the slow library then serves
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self.rejected[name] = f"it does not read this tokenizer ({error})"
            return False
        difference = None if proven else self._differs(encode, proof_texts(self._names_in_text()))
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
                if not np.array_equal(encode(text), self._encode_slowly(text)):
                    return text
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
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
        """Ids of the text, without any control token that it does not spell. Shapes: -> integers [N]"""
        self.choose_backend()
        return np.asarray(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        if self.choose_backend() == self.library:
            return self._encode_batch_slowly(texts)
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; control tokens are written by name."""
        raise NotImplementedError

    def token_id(self, name: str) -> int | None:
        """The number of a token by its exact name, or None."""
        raise NotImplementedError

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on from, as transformers' tokenizer of the same folder gives them.

        The tokens that the tokenizer puts before and after every text are added (not a second time where the text spells
        them), and names of control tokens in the text are those tokens: a prompt is written by whoever asks, not by a
        document.
        """
        ids = [int(token) for token in self._encode_with_names(text)]
        begin = [self.control.begin] if self.control.add_begin and self.control.begin is not None else []
        end = [self.control.end] if self.control.add_end and self.control.end is not None else []
        return [*(begin if ids[:1] != begin else []), *ids, *end]

    def _encode_with_names(self, text: str) -> Any:
        """The ids of a text whose names of control tokens are those tokens, where the format's library can read them."""
        return self._encode_slowly(text)

    def unknown_ids(self, size: int) -> list[int]:
        """The ids below `size` that no token has: rows that pad a model's vocabulary, and gaps in the tokenizer's own."""
        return missing_ids(self._ids, size)

    def fingerprint(self) -> str:
        """Changes when the tokenizer's file does."""
        return fingerprint_of(self.path)


class HuggingFaceTokenizer(Tokenizer):
    """tokenizer.json through `tokenizers`, or through a faster library that has proven itself.

    `control_tokens`: names of control tokens in a text become those tokens, in place of being text.
    """

    library, fast = "tokenizers", FAST_BACKENDS

    def __init__(self, path: str, backend: str = "auto", proven: bool = False, control_tokens: bool = False):
        config = parse_json(Path(path), _read_bytes(path))
        try:
            self._json = json.dumps(_without_additions(config) if control_tokens else without_control_tokens(config))
            if not proven:
                self._native  # noqa: B018  the library reads it: what it refuses is refused here
            added = config.get("added_tokens") or []
            ids = [*_model_ids(config["model"]), *(token["id"] for token in added)]
        except Exception as error:  # the library raises bare Exception
            raise _unusable(path, error) from error
        self._names = {token["content"]: token["id"] for token in added if token.get("special")}
        numbers = {**_model_vocabulary(config["model"]), **{token["content"]: token["id"] for token in added}}
        there = frozenset(ids)
        settings = settings_beside(Path(path))
        control = resolve_control_tokens(settings, numbers.get, known=there.__contains__, special=self._names)
        # What comes before and after a text stands in the post-processor; transformers reads it there alone.
        super().__init__(path, there, replace(control, add_begin=False, add_end=False))
        self._choose(backend, proven)

    @cached_property
    def _native(self) -> Any:
        """The library's own tokenizer, which adds no control tokens."""
        from tokenizers import Tokenizer as Native

        return Native.from_str(self._json)

    @cached_property
    def _whole(self) -> Any:
        """The library's own tokenizer as the file says, for names and for text out of ids."""
        from tokenizers import Tokenizer as Native

        try:
            whole = Native.from_str(_read(self.path))
        except Exception as error:
            raise _unusable(self.path, error) from error
        whole.no_truncation()  # of training in batches, which transformers does not apply to a text either
        whole.no_padding()
        return whole

    def _encode_slowly(self, text: str) -> list[int]:
        return self._native.encode(text, add_special_tokens=False).ids

    def _encode_batch_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(e.ids) for e in self._native.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        if name == "gigatoken":
            import gigatoken

            return gigatoken.Tokenizer.from_json(self._json).encode
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(self._json)
        return lambda text: fast.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        try:
            encoded = self._whole.encode(text)
        except Exception as error:  # the library raises bare Exception
            raise _unusable(self.path, error) from error
        ids = encoded.ids
        of_text = [position for position, part in enumerate(encoded.sequence_ids) if part is not None]
        begin = ids[: of_text[0]] if of_text else ids
        return ids[len(begin) :] if begin and ids[len(begin) : 2 * len(begin)] == begin else ids

    def _names_in_text(self) -> Sequence[str]:
        return list(self._names)

    def decode(self, ids: Iterable[int]) -> str:
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self._whole.token_to_id(name)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; it never reads control tokens out of text."""

    library, fast = "sentencepiece", FAST_BACKENDS[:1]

    def __init__(self, path: str, backend: str = "auto", proven: bool = False, control_tokens: bool = False):
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(f"{path} is a SentencePiece model: `pip install sentencepiece` to read it.") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except Exception as error:
            raise ConfigError(f"{path}: not a SentencePiece model ({error}). Give {FORMATS}.") from error
        if control_tokens:
            raise ConfigError(
                f"{path}: SentencePiece never reads control tokens out of text: leave out --control-tokens, or give the "
                "model's tokenizer.json."
            )
        model = self._model
        begin, end, pad, unknown = (
            None if number < 0 else number
            for number in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
        )
        control = resolve_control_tokens(
            settings_beside(Path(path)),
            self.token_id,
            known=range(model.vocab_size()).__contains__,
            own=ControlTokens(begin, end, pad, unknown),
        )
        super().__init__(path, range(model.vocab_size()), control)
        self._choose(backend, proven)

    def _encode_slowly(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        """gigatoken would make control tokens of their names: texts that hold one stay with the format's library."""
        import gigatoken

        fast = gigatoken.Tokenizer.from_sentencepiece(self.path).encode
        names = self._control_names()
        firsts = {name[0] for name in names}
        spelt = re.compile("|".join(map(re.escape, names)) or "(?!)").search

        def encode(text: str) -> Any:
            if any(first in text for first in firsts) and spelt(text):
                return self._encode_slowly(text)
            return fast(text)

        return encode

    def _encode_with_names(self, text: str) -> list[int]:
        """The text between control tokens is encoded by itself, and only at the very start as the start of a text."""
        names = [name for name in self._control_names() if name]
        inside = None
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]:
            if part in names:
                ids.append(self._model.piece_to_id(part))
            elif part and not ids:
                ids += self._model.encode(part)
            elif part:
                inside = inside or self._without_prefix()
                ids += inside.encode(part)
        return ids

    def _without_prefix(self) -> Any:
        """The same model, which does not put a space before a text."""
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor()
        # Messages that follow one another are merged field by field: normalizer_spec (3) with add_dummy_prefix (3) false.
        model.LoadFromSerializedProto(self._model.serialized_model_proto() + b"\x1a\x02\x18\x00")
        return model

    def _control_names(self) -> list[str]:
        model = self._model
        ids = range(model.vocab_size())
        return [model.id_to_piece(i) for i in ids if model.is_control(i) or model.is_unknown(i)]

    def _names_in_text(self) -> Sequence[str]:
        return self._control_names()

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        number = self._model.piece_to_id(name)
        return None if number == self._model.unk_id() and name != self._model.id_to_piece(number) else number


class TiktokenTokenizer(Tokenizer):
    """A tiktoken rank file. Such a file does not say how text is split: the known encodings are told by the file's
    name."""

    library, fast = "tiktoken", FAST_BACKENDS[:1]

    def __init__(
        self,
        path: str,
        pattern: str | None = None,
        backend: str = "auto",
        proven: bool = False,
        control_tokens: bool = False,
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(f"{path} is a tiktoken file: `pip install tiktoken` to read it.") from error
        ranks = {}
        for number, line in enumerate(_read(path).splitlines(), 1):
            try:
                if line.strip():
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ConfigError(
                    f"{path}: line {number} is not `base64 number` but {line[:60]!r}. Restore the file, or give {FORMATS}."
                ) from error
        alone = sum(bytes([value]) in ranks for value in range(256))
        if alone < 256 or len(set(ranks.values())) < len(ranks):
            what = f"only {alone} of the 256 single bytes" if alone < 256 else "the same number for two tokens"
            raise ConfigError(f"{path}: holds {what}. Restore the file, or give {FORMATS}.")
        known = next((value for name, value in TIKTOKEN.items() if name in os.path.basename(path).lower()), None)
        if pattern is None and known is None:
            raise ConfigError(
                f"{path}: the file's name is none of {', '.join(TIKTOKEN)}, and a tiktoken file does not say how text is split. "
                "Rename it, or give the pattern with --tiktoken-pattern."
            )
        chosen = pattern or (known[0] if known else "")
        self._splitting = known[2] if known and pattern is None else None
        end = known[1] if known and known[1] not in ranks.values() else max(ranks.values(), default=-1) + 1
        self._special = {"<|endoftext|>": end}
        self._allowed: Any = "all" if control_tokens else set()
        try:
            self._encoding = tiktoken.Encoding(
                os.path.basename(path), pat_str=chosen, mergeable_ranks=ranks, special_tokens=self._special
            )
        except Exception as error:
            raise ConfigError(
                f"{path}: tiktoken cannot use it ({error}). Restore the file, or give {FORMATS}."
            ) from error
        ids = frozenset([*ranks.values(), *self._special.values()])
        control = resolve_control_tokens(
            settings_beside(Path(path)), self.token_id, known=ids.__contains__, own=ControlTokens(end=end)
        )
        super().__init__(path, ids, control)
        self._choose(backend, proven)

    def _encode_slowly(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special=self._allowed, disallowed_special=())

    def _encode_with_names(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        import gigatoken

        if self._splitting is None:
            raise ValueError("it splits text by a pattern of its own")
        special = self._special if self._allowed else {}
        return gigatoken.Tokenizer.from_tiktoken(self.path, self._splitting, special).encode

    def _names_in_text(self) -> Sequence[str]:
        return list(self._special)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        try:
            return self._encoding.encode_single_token(name)
        except KeyError:
            return None


def load_tokenizer(
    path: str | os.PathLike,
    *,
    backend: str = "auto",
    tiktoken_pattern: str | None = None,
    proven: bool = False,
    control_tokens: bool = False,
) -> Tokenizer:
    """The tokenizer in this file, or in this folder (tokenizer.json before tokenizer.model).

    `proven`: another process has compared this backend with the format's own library; it is taken as it is, which saves
    the time. `control_tokens`: their names in a text become control tokens.

    Errors: ConfigError if there is none, or the file cannot be used.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        for file in TOKENIZER_NAMES:
            if os.path.exists(os.path.join(name, file)):
                return load_tokenizer(
                    os.path.join(name, file),
                    backend=backend,
                    tiktoken_pattern=tiktoken_pattern,
                    proven=proven,
                    control_tokens=control_tokens,
                )
        raise ConfigError(f"{name}: the folder has neither tokenizer.json nor tokenizer.model. Give {FORMATS}.")
    if not os.path.exists(name):
        raise ConfigError(f"tokenizer {name!r} does not exist. Give {FORMATS}, or train one with --train-bpe.")
    with open(name, "rb") as content:
        start = content.read(256)
    damage = describe_damage(start)
    if damage is not None:
        raise ConfigError(f"{name}: {damage}")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(name, backend, proven, control_tokens)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):
        return TiktokenTokenizer(name, tiktoken_pattern, backend, proven, control_tokens)
    return SentencePieceTokenizer(name, backend, proven, control_tokens)


def _unusable(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not a usable tokenizer.json ({error}). Give one that `tokenizers` reads, or train one with "
        "`python -m tools.tokenize INPUT --train-bpe 8192 --output PREFIX`."
    )


def fingerprint_of(path: str) -> str:
    """A hash of the tokenizer's file; in a folder, of the file that is read."""
    if os.path.isdir(path):
        names = (os.path.join(path, file) for file in TOKENIZER_NAMES)
        path = next((name for name in names if os.path.exists(name)), path)
    try:
        return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give {FORMATS}.") from error


def _model_ids(model: dict[str, Any]) -> Iterable[int]:
    vocabulary = model.get("vocab") or {}
    return vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))


def without_control_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose encoder sees control tokens as plain text and adds none by itself."""
    added = [token for token in config.get("added_tokens") or [] if not token.get("special")]
    return {**_without_additions(config), "added_tokens": added}


def _without_additions(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "post_processor": None, "truncation": None, "padding": None}


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """The names of the model's own vocabulary. Unigram's is a list of [name, score]."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: number for number, entry in enumerate(vocabulary)}


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error}). Give {FORMATS}.") from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give {FORMATS}.") from error
