"""A record becomes tokens, and what each of them counts as a target.

Targets are the words of the assistant and what ends them, not the header that names the speaker. Where they begin and end says
the template's generation block; without one, the difference between a conversation up to the answer and one with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megalm.config.errors import ConfigError
from megalm.posttrain.records import BadRecord, Record
from megalm.tokenizer.chat import ChatTemplate
from megalm.tokenizer.encoder import Tokenizer

_FIRST_MARK = 0xE100
"""Characters of private use from here on stand for names of control tokens that a message spells, while it is rendered."""


@dataclass(frozen=True)
class Rendered:
    """Shapes: ids int64 [N], weights fp32 [N]: of each token as a target, 0 where it is none"""

    ids: np.ndarray
    weights: np.ndarray

    @property
    def targets(self) -> int:
        """Tokens that are learned."""
        return int(np.count_nonzero(self.weights))

    def cut(self, length: int) -> Rendered:
        """Its first tokens."""
        return Rendered(self.ids[:length], self.weights[:length])


@dataclass(frozen=True)
class Renderer:
    """Renders records with one template and one tokenizer."""

    template: ChatTemplate
    tokenizer: Tokenizer

    def render(self, record: Record) -> Rendered:
        """Shapes: see `Rendered`. Errors: BadRecord"""
        try:
            if record.messages:
                rendered = self._conversation(record)
            elif record.completion is not None and record.prompt is not None:
                rendered = self._join([(self._begin(record.prompt), 0.0), (self._end(record.completion), 1.0)])
            else:
                assert record.text is not None
                begin = self._begin("")
                rendered = self._join([(begin, 0.0), (self._end(record.text), 1.0)])
        except ConfigError as error:
            raise BadRecord(str(error) if str(error).startswith(record.place) else f"{record.place}: {error}") from None
        if not rendered.targets:
            raise BadRecord(f"{record.place}: no token of it is a target: what the assistant says is empty.")
        return rendered

    def render_prompt(self, prompt: str | Sequence[Mapping[str, object]]) -> list[int]:
        """Ids up to where the answer begins: of a text as before a completion, of messages as before the assistant's next."""
        if isinstance(prompt, str):
            return self._begin(prompt)
        messages = [{**message, "content": self._hide_names(str(message["content"]))} for message in prompt]
        return self._encode(self.template.render(messages))

    # ------------------------------------------------------------------------------------------------------ conversations
    def _conversation(self, record: Record) -> Rendered:
        messages = [{**message, "content": self._hide_names(message["content"])} for message in record.messages]
        text, spans = self.template.render_spans(messages, answer=False)
        spoken = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not spans:
            spans = [self._find_span(messages, number, text, record.place) for number in spoken]
        if len(spans) != len(spoken):
            raise BadRecord(
                f"{record.place}: the template has {len(spans)} generation blocks for {len(spoken)} messages of the assistant."
            )
        parts: list[tuple[list[int], float]] = []
        at = 0
        for (start, stop), number in zip(spans, spoken, strict=True):
            parts += [(self._encode(text[at:start]), 0.0), (self._encode(text[start:stop]), record.weights[number])]
            at = stop
        rest = self._encode(text[at:])
        if self.template.template is None and self.tokenizer.eos_id is not None:
            # A plain transcript knows no token that ends an answer: the document's end is one.
            parts += [(rest, 0.0), ([self.tokenizer.eos_id], record.weights[spoken[-1]] if spoken else 0.0)]
        else:
            parts.append((rest, 0.0))
        return self._join(parts)

    def _find_span(self, messages: list[dict[str, object]], number: int, whole: str, place: str) -> tuple[int, int]:
        """Find where a message's words lie in the text, with what ends them."""
        before = self.template.render(messages[:number], answer=True)
        through = self.template.render(messages[: number + 1], answer=False)
        if not through.startswith(before) or not whole.startswith(through):
            raise BadRecord(
                f"{place}: what of the conversation is the assistant's cannot be told: the template writes earlier messages "
                f"otherwise once message {number + 1} follows. Put {{% generation %}} and {{% endgeneration %}} around the "
                "assistant's words in the chat template."
            )
        content = str(messages[number]["content"])
        said = through[len(before) :]
        place_of_content = said.rfind(content)
        end = place_of_content + len(content) if place_of_content >= 0 else 0
        return len(before), len(before) + end + len(said[end:].rstrip())

    # ------------------------------------------------------------------------------------------------------------- tokens
    @cached_property
    def _names(self) -> list[str]:
        return [name for name in self.tokenizer.control_names() if len(name) > 1]

    def _hide_names(self, content: str) -> str:
        """A message may speak of control tokens: that is text, and not those tokens."""
        for number, name in enumerate(self._names):
            if name in content:
                content = content.replace(name, chr(_FIRST_MARK + number))
        return content

    def _encode(self, text: str) -> list[int]:
        """Encode ids of rendered text: names of control tokens are those tokens, but where a message spelt them."""
        ids: list[int] = []
        at = 0
        for place, character in enumerate(text):
            number = ord(character) - _FIRST_MARK
            if 0 <= number < len(self._names):
                ids += self.tokenizer.encode_with_names(text[at:place]) if place > at else []
                ids += [int(token) for token in self.tokenizer.encode(self._names[number])]
                at = place + 1
        return ids + (self.tokenizer.encode_with_names(text[at:]) if at < len(text) else [])

    def _begin(self, prompt: str) -> list[int]:
        """A prompt behind what the tokenizer puts before every text."""
        given = self.tokenizer.encode_prompt("a")
        return [*given.ids[: given.added], *(int(token) for token in self.tokenizer.encode(prompt))]

    def _end(self, text: str) -> list[int]:
        """A text to its end."""
        end = self.tokenizer.eos_id
        return [*(int(token) for token in self.tokenizer.encode(text)), *([] if end is None else [end])]

    @staticmethod
    def _join(parts: list[tuple[list[int], float]]) -> Rendered:
        ids = np.concatenate([np.asarray(part, np.int64) for part, _ in parts])
        return Rendered(ids, np.concatenate([np.full(len(part), weight, np.float32) for part, weight in parts]))
