"""A model that answers: conversations become prompts, and answers come as they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.convert.source import Source
from megalm.generate.generate import tokenize_unfinished
from megalm.generate.model import stop_tokens
from megalm.generate.sampling import Sampling
from megalm.generate.text import WrittenText, check_stop, write_texts
from megalm.model.transformer import Transformer
from megalm.tokenizer.chat import ChatTemplate, Message, find_chat_template
from megalm.tokenizer.tokenizer import Tokenizer

OnText = Callable[[int, str], bool | None]
"""Told (which text, its next piece); True ends that text."""


@dataclass
class Speaker:
    """One model in this process; who asks while it writes waits for its turn."""

    source: Source
    model: Transformer
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        self.template: ChatTemplate = find_chat_template(self.tokenizer)
        self.stop_tokens = stop_tokens(self.source, self.tokenizer)
        self._turn = threading.Lock()

    @property
    def name(self) -> str:
        """What the model is called: its run's or folder's name."""
        path = Path(self.source.path)
        return path.parent.parent.name if path.name.startswith("step-") else path.name

    @property
    def window(self) -> int:
        """Tokens that it sees."""
        return self.source.model.seq_length

    def prompt_of(self, messages: Sequence[Message], max_tokens: int) -> list[int]:
        """Ids of a conversation up to the answer. Where they leave no room for it, the oldest turns are dropped, the system's
        message last."""
        kept = list(messages)
        room = max(1, self.window - min(max_tokens, self.window // 2))
        while True:
            ids = self.encode(self.template.render(kept))
            first = 1 if kept and kept[0]["role"] == "system" else 0
            if len(ids) <= room or len(kept) - first <= 1:
                return ids
            del kept[first]
            while len(kept) - first > 1 and kept[first]["role"] != "user":  # an answer without its question
                del kept[first]

    def encode(self, text: str) -> list[int]:
        """Encode ids of a text to go on from. Errors: ConfigError"""
        return tokenize_unfinished(self.tokenizer, text)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> list[WrittenText]:
        """Write on from each prompt. Errors: ConfigError for settings that nothing can be written with"""
        check_stop(stop)
        for one in sampling:
            one.check()
        unknown = [i for prompt in prompts for i in prompt if not 0 <= i < self.source.model.vocab_size]
        if unknown:
            raise ConfigError(f"the prompt has the token {unknown[0]}, the model has {self.source.model.vocab_size}")
        with self._turn:
            return write_texts(
                self.model,
                self.tokenizer,
                prompts,
                list(sampling),
                stop_tokens=self.stop_tokens,
                stop=list(stop),
                on_text=on_text,
            )

    def answer(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
    ) -> WrittenText:
        """The assistant's next message."""
        prompt = self.prompt_of(messages, sampling.max_tokens)
        (found,) = self.write([prompt], [sampling], [*stop, *self.template.stop], on_text)
        return found
