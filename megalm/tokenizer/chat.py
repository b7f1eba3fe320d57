"""How a conversation becomes a text: the template that came with the model, or a plain transcript where none did."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import read_settings_beside
from megalm.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
PLAIN_STOP = ("\nUser:", "\nSystem:")
"""What ends an answer in a plain transcript, whose model knows no token for it."""

GENERATED = ("\uf5a0", "\uf5a1")
"""Around what stands in a generation block, while a template is rendered."""

Message = Mapping[str, Any]
"""{"role": one of ROLES, "content": text}."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders a conversation.

    Source: the Jinja templates of transformers' tokenizers, rendered in a sandbox.
    """

    template: str | None
    """None: a plain transcript, `User: ...` and `Assistant: ...`."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token and the like, which templates name."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return PLAIN_STOP if self.template is None else ()

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Render the conversation as text; `answer`: up to where the assistant begins to speak.

        Errors: ConfigError where the template refuses the messages
        """
        return self.render_spans(messages, answer=answer)[0]

    def render_spans(self, messages: Sequence[Message], *, answer: bool = True) -> tuple[str, list[tuple[int, int]]]:
        """Render the same, and which characters lie in the template's `{% generation %}` blocks: what the assistant says.

        Errors: as `render`; ConfigError for text that holds the two characters of Unicode's private use that mark the blocks
        """
        if self.template is None:
            lines = [f"{str(one['role']).capitalize()}: {one['content']}" for one in messages]
            return "\n".join([*lines, *(["Assistant:"] if answer else [])]), []
        if any(mark in str(one) for one in messages for mark in GENERATED):
            raise ConfigError(
                "a message holds the characters U+F5A0 or U+F5A1, which mark what the assistant says: remove them"
            )
        text, spans = "", []
        for part in self._render(messages, answer).split(GENERATED[0]):
            inside, mark, behind = part.partition(GENERATED[1])
            if mark:
                spans.append((len(text), len(text) + len(inside)))
            text += inside + behind
        return text, spans

    def _render(self, messages: Sequence[Message], answer: bool) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(text: str) -> str:
            raise ValueError(text)

        assert self.template is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", make_generation_tag()]
        )
        environment.filters["tojson"] = _write_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            template = environment.from_string(self.template)
            return str(template.render(messages=list(messages), add_generation_prompt=answer, **self.tokens))
        except Exception as error:
            raise ConfigError(f"the model's chat template cannot render this conversation: {error}") from None


def make_generation_tag() -> type:
    """Make Jinja's tag `{% generation %} ... {% endgeneration %}`, which some templates put around what the assistant says.

    Source: transformers' chat templates (return_assistant_tokens_mask)
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{GENERATED[0]}{caller()}{GENERATED[1]}"

    return Generation


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as they must be. Errors: ConfigError that names the first that is not"""
    if not isinstance(messages, list) or not messages:
        raise ConfigError('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    checked = []
    for number, one in enumerate(messages, 1):
        if not isinstance(one, dict) or one.get("role") not in ROLES:
            raise ConfigError(f"message {number}: its role must be one of {', '.join(ROLES)}")
        content = one.get("content")
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ConfigError(f"message {number}: its content must be a text")
        checked.append({**one, "content": content})
    return checked


def find_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Find the template beside a tokenizer: chat_template.jinja, else tokenizer_config.json's; none: a plain transcript."""
    settings = read_settings_beside(Path(tokenizer.path))
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokens = {name: settings.name(name) or "" for name in names}
    path = Path(tokenizer.path)
    file = (path if path.is_dir() else path.parent) / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(file.read_text(encoding="utf-8"), tokens)
    found = settings.tokenizer.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return ChatTemplate(found if isinstance(found, str) else None, tokens)


def _write_json(value: Any, indent: int | None = None) -> str:
    """As transformers' templates expect it: letters as they are, no escaping for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
