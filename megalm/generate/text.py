"""Texts from texts: prompts encoded, tokens decoded as they come, ended at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from megalm.config.errors import ConfigError
from megalm.generate.batch import ROWS, Written, generate_batch
from megalm.generate.sampling import Sampling
from megalm.model.transformer import Transformer
from megalm.tokenizer.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows where the bytes of a character are not all there yet."""


class TextStream:
    """The text of tokens as they come, up to the first of the stop strings.

    A character whose bytes are spread over tokens is held back until it is whole, and so is what may yet become a stop
    string. Only the last tokens are decoded anew, with those before them, since a token's text may depend on what precedes
    it (a leading blank in SentencePiece).
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int] = (), stop: Collection[str] = ()) -> None:
        """ids: of the prompt, whose text is not given out but may shape the first word's."""
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.ids = [int(token) for token in ids]
        self.text = ""
        """What was written so far, what is held back included."""
        self.stopped = False
        self._given = 0  # characters handed out
        self._before = max(len(self.ids) - 8, 0)  # first token that is decoded anew
        self._read = len(self.ids)  # tokens whose text is in `text`

    def add(self, token: int) -> str:
        """Take the next token; returns the text that can be shown now. After a stop string: `stopped`, and nothing more."""
        if self.stopped:
            return ""
        self.ids.append(int(token))
        known, now = self._decode(self._read), self._decode(len(self.ids))
        if now.endswith(UNFINISHED) or not now.startswith(known):
            return ""
        self._before, self._read = self._read, len(self.ids)
        return self._grow(now[len(known) :])

    def finish(self) -> str:
        """No token follows: returns what was held back."""
        if self.stopped:
            return ""
        known, now = self._decode(self._read), self._decode(len(self.ids))
        self._read = len(self.ids)
        shown = self._grow(now[len(known) :] if now.startswith(known) else "")
        rest = "" if self.stopped else self.text[self._given :]
        self._given = len(self.text)
        return shown + rest

    def _decode(self, end: int) -> str:
        return self.tokenizer.decode(self.ids[self._before : end])

    def _grow(self, new: str) -> str:
        searched = max(self._given - max(map(len, self.stop), default=0), 0)
        self.text += new
        found = [at for text in self.stop if (at := self.text.find(text, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            until = len(self.text)
        else:
            until = len(self.text) - max((_overlap(self.text, text) for text in self.stop), default=0)
        shown = self.text[self._given : until]
        self._given = max(self._given, until)
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class WrittenText:
    """What followed one prompt, as text."""

    text: str
    written: Written = field(repr=False)
    """Its tokens; of a text that ends at a stop string, those of the stop string too."""


def write_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    stop_tokens: Collection[int] = (),
    stop: Collection[str] | Sequence[Collection[str]] = (),
    on_text: Callable[[int, str], bool | None] | None = None,
    rows: int = ROWS,
) -> list[WrittenText]:
    """Write on from each prompt's ids, up to a stop token, one of the stop strings (neither is included), or its length.

    stop: strings for all prompts, or a collection for each. on_text(which prompt, text) is told of the text as it becomes
    known; True ends that text.
    """
    texts = [list(one) for one in stop] if stop and not all(isinstance(one, str) for one in stop) else None
    shared = [str(one) for one in stop] if texts is None else []
    streams = [TextStream(tokenizer, prompt, shared if texts is None else texts[i]) for i, prompt in enumerate(prompts)]

    def take(which: int, token: int) -> bool:
        shown = streams[which].add(token)
        asked = bool(on_text(which, shown)) if shown and on_text is not None else False
        return streams[which].stopped or asked

    written = generate_batch(
        model,
        prompts,
        sampling,
        stop=stop_tokens,
        never=tokenizer.unknown_ids(model.config.vocab_size),
        on_token=take,
        rows=rows,
    )
    for which, stream in enumerate(streams):
        rest = stream.finish()
        if rest and on_text is not None:
            on_text(which, rest)
        if stream.stopped:
            written[which].reason = "stop"
    return [WrittenText(stream.text, one) for stream, one in zip(streams, written, strict=True)]


def check_stop(stop: Collection[str]) -> None:
    """Errors: ConfigError for a stop string that every text would end at."""
    if any(not text for text in stop):
        raise ConfigError("an empty stop string would end every text at once; leave it out")
