"""One face over Hugging Face tokenizer.json, SentencePiece models and tiktoken rank files.

Text is only ever text here: `<s>` or `<|endoftext|>` written in a document is encoded as its characters, never as the
control token, so that no document can end itself. Control tokens are added by number (`eos_id`, `bos_id`).

Where an exact faster library is installed it encodes in place of `tokenizers`, but only after it gave the same ids
for every text of a sample (`prove`); its ids are never trusted unseen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError

FORMATS = "a Hugging Face tokenizer.json, a SentencePiece .model, or a .tiktoken rank file"
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]", "[EOS]")
BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]", "[BOS]")
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
TIKTOKEN = {  # name of the encoding: how it splits, number of its end-of-text token
    "r50k": (GPT2_PATTERN, 50256),
    "gpt2": (GPT2_PATTERN, 50256),
    "p50k": (GPT2_PATTERN, 50256),
    "cl100k": (CL100K_PATTERN, 100257),
    "o200k": (O200K_PATTERN, 199999),
}


class Tokenizer:
    """What the tools need of a tokenizer.

    `eos_id` and `bos_id` are None where it has none; `backend` names the library that encodes.
    """

    def __init__(self, path: str, vocab_size: int, eos_id: int | None, bos_id: int | None, backend: str):
        self.path, self.vocab_size, self.eos_id, self.bos_id, self.backend = path, vocab_size, eos_id, bos_id, backend

    def encode(self, text: str) -> np.ndarray:
        """Ids of the text, without any control token. Shapes: -> integers [N]"""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; control tokens are written by name."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def choose_backend(self) -> str:
        """The library that encodes."""
        return self.backend

    def token_id(self, name: str) -> int | None:
        """The number of a token by its exact name, or None."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes when the tokenizer's file does."""
        return fingerprint_of(self.path)


class HuggingFaceTokenizer(Tokenizer):
    """tokenizer.json through `tokenizers`, or through a faster library that has proven itself."""

    def __init__(self, path: str, backend: str = "auto", proven: bool = False):
        content = _read(path)
        try:
            config = json.loads(content)
            self._plain_json = json.dumps(without_control_tokens(config))
            if not proven:
                self._plain  # noqa: B018  the library reads it: what it refuses is refused here
            added = config.get("added_tokens") or []
            ids = [*_model_ids(config["model"]), *(token["id"] for token in added)]
        except Exception as error:  # the library raises bare Exception
            raise _unusable(path, error) from error
        names = {token["content"]: token["id"] for token in added if token.get("special")}
        neighbours = Path(path).parent / "tokenizer_config.json"
        eos = _first(names, (_configured(neighbours, "eos_token"), *END_NAMES))
        bos = _first(names, (_configured(neighbours, "bos_token"), *BEGIN_NAMES))
        super().__init__(path, max(ids, default=-1) + 1, eos, bos, "tokenizers")
        self._encode: Callable[[str], Any] = self._encode_slowly
        self.rejected: dict[str, str] = {}
        self._untried = backend == "auto"  # proving takes a while, which one who only decodes need not wait
        if backend not in ("auto", "tokenizers"):
            self._take(backend, proven)
        if backend not in ("auto", self.backend):
            raise ConfigError(
                f"the tokenizer backend {backend!r} cannot serve {path}: {self.rejected.get(backend, 'unknown')}. "
                f"Choose auto, tokenizers or one of {', '.join(FAST_BACKENDS)} (`pip install --no-deps gigatoken fastokens`)."
            )

    @cached_property
    def _plain(self) -> Any:
        """The library's own tokenizer, without control tokens."""
        from tokenizers import Tokenizer as Native

        return Native.from_str(self._plain_json)

    @cached_property
    def _whole(self) -> Any:
        """The library's own tokenizer as the file says, for names and for text out of ids."""
        from tokenizers import Tokenizer as Native

        try:
            return Native.from_str(_read(self.path))
        except Exception as error:
            raise _unusable(self.path, error) from error

    def _encode_slowly(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def choose_backend(self) -> str:
        """The library that encodes: with backend="auto" the first of the fast ones that proves itself, at the first use."""
        if self._untried:
            self._untried = False
            any(self._take(name) for name in FAST_BACKENDS)
        return self.backend

    def _take(self, name: str, proven: bool = False) -> bool:
        try:
            encode = _fast_encoder(name, self._plain_json)
        except ImportError:
            self.rejected[name] = "it is not installed"
            return False
        except BaseException as error:  # a Rust panic is a BaseException; the slow library then serves
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self.rejected[name] = f"it does not read this tokenizer ({error})"
            return False
        difference = None if proven else self._differs(encode, proof_texts())
        if difference is not None:
            self.rejected[name] = f"its ids differ from those of `tokenizers` on {difference[:60]!r}"
            return False
        self._encode, self.backend = encode, name
        return True

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

    def prove(self, texts: Iterable[str]) -> None:
        """Compares the fast library with `tokenizers` on these texts; at the first difference `tokenizers` serves
        from then on."""
        if self.choose_backend() == "tokenizers":
            return
        difference = self._differs(self._encode, texts)
        if difference is not None:
            self.rejected[self.backend] = f"its ids differ from those of `tokenizers` on {difference[:60]!r}"
            self.backend, self._encode = "tokenizers", self._encode_slowly

    def encode(self, text: str) -> np.ndarray:
        self.choose_backend()
        return np.asarray(self._encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.choose_backend() == "tokenizers":
            return [np.asarray(e.ids) for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self._whole.token_to_id(name)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; it never reads control tokens out of text."""

    def __init__(self, path: str):
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(f"{path} is a SentencePiece model: `pip install sentencepiece` to read it.") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except Exception as error:
            raise ConfigError(f"{path}: not a SentencePiece model ({error}). Give {FORMATS}.") from error
        eos, bos = self._model.eos_id(), self._model.bos_id()
        super().__init__(
            path, self._model.vocab_size(), eos if eos >= 0 else None, bos if bos >= 0 else None, "sentencepiece"
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._model.encode(text), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        number = self._model.piece_to_id(name)
        return None if number == self._model.unk_id() and name != self._model.id_to_piece(number) else number


class TiktokenTokenizer(Tokenizer):
    """A tiktoken rank file. Such a file does not say how text is split: the known encodings are told by the file's
    name."""

    def __init__(self, path: str, pattern: str | None = None):
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
        known = next((value for name, value in TIKTOKEN.items() if name in os.path.basename(path).lower()), None)
        if pattern is None and known is None:
            raise ConfigError(
                f"{path}: the file's name is none of {', '.join(TIKTOKEN)}, and a tiktoken file does not say how text is split. "
                "Rename it, or give the pattern with --tiktoken-pattern."
            )
        chosen = pattern or (known[0] if known else "")
        end = known[1] if known and known[1] not in ranks.values() else max(ranks.values(), default=-1) + 1
        try:
            self._encoding = tiktoken.Encoding(
                os.path.basename(path), pat_str=chosen, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": end}
            )
        except Exception as error:
            raise ConfigError(
                f"{path}: tiktoken cannot use it ({error}). Restore the file, or give {FORMATS}."
            ) from error
        super().__init__(path, self._encoding.max_token_value + 1, end, None, "tiktoken")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._encoding.encode_ordinary(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        try:
            return self._encoding.encode_single_token(name)
        except KeyError:
            return None


def load_tokenizer(
    path: str | os.PathLike, *, backend: str = "auto", tiktoken_pattern: str | None = None, proven: bool = False
) -> Tokenizer:
    """The tokenizer in this file, or in this folder (tokenizer.json before tokenizer.model).

    `proven`: another process has compared this backend with `tokenizers`; it is taken as it is, which saves the time.

    Errors: ConfigError if there is none, or the file cannot be used.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        for file in ("tokenizer.json", "tokenizer.model"):
            if os.path.exists(os.path.join(name, file)):
                return load_tokenizer(
                    os.path.join(name, file), backend=backend, tiktoken_pattern=tiktoken_pattern, proven=proven
                )
        raise ConfigError(f"{name}: the folder has neither tokenizer.json nor tokenizer.model. Give {FORMATS}.")
    if not os.path.exists(name):
        raise ConfigError(f"tokenizer {name!r} does not exist. Give {FORMATS}, or train one with --train-bpe.")
    with open(name, "rb") as content:
        start = content.read(256)
    if start.lstrip()[:1] == b"{":
        return HuggingFaceTokenizer(name, backend, proven)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):
        return TiktokenTokenizer(name, tiktoken_pattern)
    return SentencePieceTokenizer(name)


def _unusable(path: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not a usable tokenizer.json ({error}). Give one that `tokenizers` reads, or train one with "
        "`python -m tools.tokenize INPUT --train-bpe 8192 --output PREFIX`."
    )


def fingerprint_of(path: str) -> str:
    """A hash of the tokenizer's file; in a folder, of the file that is read."""
    if os.path.isdir(path):
        names = (os.path.join(path, file) for file in ("tokenizer.json", "tokenizer.model"))
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
    return {**config, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


def proof_texts() -> list[str]:
    """Texts on which tokenizers differ when they differ at all: spaces, numbers, scripts, emoji, controls, random
    code points."""
    texts = [
        "",
        " ",
        "\n",
        "  \n\n \t\t x",
        "a" * 3000,
        "ab " * 700,
        "0123456789 1,234.5678e-9 \u0661\u0662\u0663 \u00bd",
    ]
    texts += [
        "don't I'LL we'Ve o'clock 'S",
        "def f(x):\n    return  x ** 2   # done\n\n\n",
        "\x00\x01\x7f\x85\u2028\u2029",
    ]
    texts += ["<s></s><|endoftext|><|begin_of_text|>[CLS]<pad>", "\r\n\r\r\n \u00a0\u2003\u3000\u200b\ufeff"]
    texts += [
        "Ünïcödé ßẞ İı ŉ ǆ ﬁ",
        "한국어 日本語 中文 ไทย हिन्दी العربية עברית",
        "e\u0301 \u0301 \u0e33 \u1100\u1161\u11a8",
    ]
    texts += [
        "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u261d\U0001f3fd \U0001f9ff",
        "CamelCaseHTTPServer snake_case x1y2z3",
    ]
    texts += ["http://a.b/c?d=e&f#g %20 __init__ ===>>> ++i"]
    rng = random.Random(20)
    ranges = [(32, 127), (32, 127), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x900, 0xE80), (0x2000, 0x2070)]
    ranges += [(0x3040, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (9, 14)]
    for _ in range(300):
        pieces = []
        for _ in range(rng.randrange(1, 12)):
            low, high = rng.choice(ranges)
            pieces.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))))
            pieces.append(rng.choice(["", " ", "  ", "\n", "'s"]))
        texts.append("".join(pieces))
    return texts


def _fast_encoder(name: str, content: str) -> Callable[[str], Any]:
    if name == "gigatoken":
        import gigatoken

        return gigatoken.Tokenizer.from_json(content).encode
    if name == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(content)
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    raise ConfigError(f"unknown tokenizer backend {name!r}; choose auto, tokenizers, {', '.join(FAST_BACKENDS)}.")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}). Give {FORMATS}.") from error


def _first(names: dict[str, int], wanted: Iterable[str | None]) -> int | None:
    return next((names[name] for name in wanted if name in names), None)


def _configured(path: Path, key: str) -> str | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    return value.get("content") if isinstance(value, dict) else value
