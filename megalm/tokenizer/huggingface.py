"""tokenizer.json, by `tokenizers` or by a faster library that has proven itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import (
    SPELLINGS,
    ControlTokens,
    FolderSettings,
    parse_json,
    read_settings_beside,
    resolve_control_tokens,
)
from megalm.tokenizer.encoder import (
    FAST_BACKENDS,
    Prompt,
    Tokenizer,
    choose_end,
    import_fast_library,
    read_bytes,
    read_text,
)
from megalm.tokenizer.plain_text import (
    BYTE_PIECE,
    find_misnumbered,
    list_added_tokens,
    make_plain_text_config,
    read_model_vocabulary,
    remove_additions,
    remove_special_tokens,
    walk_parts,
)

COMMON = frozenset(name for names in SPELLINGS.values() for name in names)
ONE_TO_ONE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "Sequence"}
"""Normalizers that leave ASCII ASCII, letter by letter."""
BYTE_LETTERS = frozenset([*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))])
"""The letters that ByteLevel writes for the 256 bytes."""
MARK = (1 << 32) - 1  # a number that no vocabulary reaches


class HuggingFaceTokenizer(Tokenizer):
    """tokenizer.json through `tokenizers`, or through a faster library that has proven itself.

    `control_tokens`: names of control tokens in a text become those tokens, in place of being text. `end`: the end token
    by name, if not the tokenizer's own.
    """

    library, fast = "tokenizers", FAST_BACKENDS

    def __init__(
        self,
        path: str,
        backend: str = "auto",
        proven: bool = False,
        control_tokens: bool = False,
        end: str | None = None,
        content: dict[str, Any] | None = None,
    ):
        config = content or parse_json(Path(path), read_bytes(path))
        try:
            self._vocabulary = read_model_vocabulary(config["model"])
            added = list_added_tokens(config)
            self._added = {token["content"]: token["id"] for token in added}
            self._special = {token["content"] for token in added if token.get("special")}
            ids = frozenset([*self._vocabulary.values(), *self._added.values()])
            wrong = find_misnumbered(config)
        except Exception as error:
            raise explain_unusable(path, error) from error
        settings = read_settings_beside(Path(path))
        control = resolve_control_tokens(settings, self.token_id, known=ids.__contains__, special=self._special)
        # What comes before and after a text stands in the post-processor; transformers reads it there alone.
        control = replace(control, add_begin=False, add_end=False)
        control = replace(control, end=choose_end(path, end, control.end, self.token_id))
        used = {control.begin, control.end}
        for name, number in wrong.items():
            if control_tokens or name not in self._special or self._added[name] in used:
                raise ConfigError(
                    f"{path}: gives the added token {name!r} the number {self._added[name]}, but `tokenizers` reads the file "
                    f"so that it is {number}. Which one the model was trained with cannot be seen: correct the numbers in "
                    "added_tokens, or save the tokenizer again by the library that it was used with."
                )
        self._control_tokens = control_tokens
        self._config = (
            remove_additions(config)
            if control_tokens
            else make_plain_text_config(config, self._declared(config, settings, control))
        )
        try:
            if not proven:
                self._native  # noqa: B018  the library reads it: what it refuses is refused here
        except Exception as error:  # the library raises bare Exception
            raise explain_unusable(path, error) from error
        super().__init__(path, ids, control)
        self._choose(backend, proven)

    def _declared(self, config: dict[str, Any], settings: FolderSettings, control: ControlTokens) -> set[str]:
        """Names of control tokens that the file itself does not mark as special.

        An ordinary word of the vocabulary that is only chosen as the end of documents is none: texts need it.
        """
        names = {name for key in SPELLINGS if (name := settings.name(key)) is not None}
        if control.end is not None:
            ending = [name for name in (*self._added, *COMMON) if self.token_id(name) == control.end]
            names |= set(ending)
        if config["model"].get("type") in ("Unigram", "WordLevel", "WordPiece"):
            names |= COMMON  # entries that no text means: SentencePiece, for one, never finds its own in a text
        return {name for name in names if self.token_id(name) is not None}

    @cached_property
    def _native(self) -> Any:
        """The library's own tokenizer, which adds no control tokens."""
        from tokenizers import Tokenizer as Native

        native = Native.from_str(json.dumps(self._config))
        native.encode_special_tokens = not self._control_tokens
        return native

    @cached_property
    def _whole(self) -> Any:
        """The library's own tokenizer as the file says, for prompts and for text out of ids."""
        from tokenizers import Tokenizer as Native

        try:
            whole = Native.from_str(read_text(self.path))
        except Exception as error:
            raise explain_unusable(self.path, error) from error
        whole.no_truncation()  # of training in batches, which transformers does not apply to a text either
        whole.no_padding()
        return whole

    def _encode_slowly(self, text: str) -> list[int]:
        return self._native.encode(text, add_special_tokens=False).ids

    def _encode_batch_slowly(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(e.ids) for e in self._native.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        library = import_fast_library(name)
        content = json.dumps(self._config if self._control_tokens else remove_special_tokens(self._config))
        if name == "gigatoken":
            return library.Tokenizer.from_json(content).encode
        fast = library.Tokenizer.from_json_str(content)
        return lambda text: fast.encode(text, add_special_tokens=False).ids

    def _encode_with_names(self, text: str) -> list[int]:
        try:
            return self._whole.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise self._cannot_encode(text, error) from error

    def encode_prompt(self, text: str) -> Prompt:
        try:
            encoded = self._whole.encode(text)
        except Exception as error:  # the library raises bare Exception
            raise self._cannot_encode(text, error) from error
        ids = encoded.ids
        of_text = [position for position, part in enumerate(encoded.sequence_ids) if part is not None]
        begin = of_text[0] if of_text else len(ids)
        if begin and ids[begin : 2 * begin] == ids[:begin]:
            ids, begin = ids[begin:], 0
        return Prompt(ids, begin)

    def _names_in_text(self) -> Sequence[str]:
        # The tokens that texts may hold come first: there may be more names than are tried.
        return sorted(self._added, key=lambda name: name in self._special)

    def decode(self, ids: Iterable[int]) -> str:
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_text(self, ids: Iterable[int]) -> str:
        return self._native.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        return self._added.get(name, self._vocabulary.get(name))

    def name_of(self, number: int) -> str:
        name = self._whole.id_to_token(number)
        if name is None:
            raise ValueError(f"{self.path} has no token {number}")
        return name

    def control_ids(self) -> Collection[int]:
        return {*super().control_ids(), *(self._added[name] for name in self._special)}

    @property
    def unknown_id(self) -> int | None:
        model = self._config["model"]
        if model.get("type") == "Unigram":
            return model.get("unk_id")
        return read_model_vocabulary(model).get(model.get("unk_token") or "")

    @property
    def drops_characters(self) -> bool:
        model = self._config["model"]
        if (model.get("type") or "BPE") != "BPE" or model.get("unk_token"):
            return False
        if model.get("byte_fallback") and sum(map(bool, map(BYTE_PIECE.fullmatch, self._vocabulary))) == 256:
            return False
        if any(part.get("type") == "ByteLevel" for part in walk_parts(self._config)):
            return not self._vocabulary.keys() >= BYTE_LETTERS
        return True

    @cached_property
    def _marking(self) -> Any:
        """The same tokenizer, which writes a mark for every character that this one drops."""
        from tokenizers import Tokenizer as Native

        model = self._config["model"]
        vocabulary = {**model["vocab"], "\U0010fffemark\U0010ffff": MARK}
        changed = {**model, "vocab": vocabulary, "unk_token": "\U0010fffemark\U0010ffff", "fuse_unk": False}
        marking = Native.from_str(json.dumps({**self._config, "model": changed}))
        marking.encode_special_tokens = not self._control_tokens
        return marking

    @cached_property
    def _known_ascii(self) -> frozenset[str]:
        """ASCII characters that are never dropped, wherever they stand."""
        if any(
            part.get("type") not in ONE_TO_ONE for part in walk_parts({"normalizer": self._config.get("normalizer")})
        ):
            return frozenset()
        letters = [chr(code) for code in range(128)]
        return frozenset(c for c in letters if not self._marks(c) and self._marks(f"{c}{c}{c} {c}") == 0)

    def _marks(self, text: str) -> int:
        return self._marking.encode(text, add_special_tokens=False).ids.count(MARK)

    def count_dropped(self, text: str) -> int:
        if text.isascii() and set(text) <= self._known_ascii:
            return 0
        return self._marks(text)


def explain_unusable(path: str, error: Exception) -> ConfigError:
    """Explain the error for a tokenizer.json that its library does not take."""
    return ConfigError(
        f"{path}: not a usable tokenizer.json ({error}). Give one that `tokenizers` reads, or train one with "
        "`megalm tokenize INPUT --train-bpe 8192 --output PREFIX`."
    )
