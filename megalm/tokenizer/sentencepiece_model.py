"""SentencePiece models, by `sentencepiece` or by a faster library that has proven itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
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
    read_bytes,
)

USER_DEFINED, CONTROL = 4, 3  # types of a piece in the model's file


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; it never reads control tokens out of text.

    `end`: the end token by name, if not the model's own. A symbol that the model would find in a text (user-defined) is a
    control token where it ends documents.
    """

    library, fast = "sentencepiece", FAST_BACKENDS[:1]

    def __init__(
        self,
        path: str,
        backend: str = "auto",
        proven: bool = False,
        control_tokens: bool = False,
        end: str | None = None,
    ):
        try:
            import sentencepiece
        except ImportError as error:
            raise ConfigError(f"{path} is a SentencePiece model: `pip install sentencepiece` to read it.") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_bytes(path))
        except Exception as error:
            raise ConfigError(f"{path}: not a SentencePiece model ({error}). Give {FORMATS}.") from error
        if control_tokens:
            raise ConfigError(
                f"{path}: SentencePiece never reads control tokens out of text: leave out --control-tokens, or give the "
                "model's tokenizer.json."
            )
        model = self._model
        begin, own_end, pad, unknown = (
            None if number < 0 else number
            for number in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
        )
        control = resolve_control_tokens(
            read_settings_beside(Path(path)),
            self.token_id,
            known=range(model.vocab_size()).__contains__,
            own=ControlTokens(begin, own_end, pad, unknown),
        )
        control = replace(control, end=choose_end(path, end, control.end, self.token_id))
        self._make_control({control.begin, control.end} - {None})
        super().__init__(path, range(model.vocab_size()), control)
        self._choose(backend, proven)

    def _make_control(self, ids: Collection[int | None]) -> None:
        """Makes control tokens of user-defined symbols, which the model would otherwise find in texts."""
        in_text = [number for number in ids if number is not None and not self._model.is_control(number)]
        if not in_text:
            return
        content = self._content()
        changed = [content.pieces[number] for number in in_text if content.pieces[number].type == USER_DEFINED]
        for piece in changed:
            piece.type = CONTROL
        if changed:
            self._model.LoadFromSerializedProto(content.SerializeToString())

    def _content(self) -> Any:
        from sentencepiece import sentencepiece_model_pb2

        content = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        content.ParseFromString(self._model.serialized_model_proto())
        return content

    def _encode_slowly(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _fast_encoder(self, name: str) -> Callable[[str], Any]:
        """gigatoken would make control tokens of their names: texts that hold one stay with the format's library."""
        fast = import_fast_library(name).Tokenizer.from_sentencepiece(self.path).encode
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
        in_text = [piece.piece for piece in self._content().pieces if piece.type == USER_DEFINED]
        return [*in_text, *self._control_names()]

    def control_ids(self) -> Collection[int]:
        ids = range(self._model.vocab_size())
        return {*super().control_ids(), *(i for i in ids if self._model.is_control(i))}

    @property
    def unknown_id(self) -> int | None:
        number = self._model.unk_id()
        return number if number >= 0 else None

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def name_of(self, number: int) -> str:
        return self._model.id_to_piece(number)

    def token_id(self, name: str) -> int | None:
        number = self._model.piece_to_id(name)
        return None if number == self._model.unk_id() and name != self._model.id_to_piece(number) else number
