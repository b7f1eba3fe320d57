"""Mistral's tekken.json: tiktoken's ranks in JSON, with the control tokens before them."""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.tokenizer.control_tokens import ControlTokens, parse_json, read_settings_beside, resolve_control_tokens
from megalm.tokenizer.encoder import Tokenizer, choose_end, read_bytes
from megalm.tokenizer.tiktoken_ranks import check_ranks

UNLISTED = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Control tokens 0, 1, ... of files up to version 7 that do not list them, as Mistral's own library has them."""
LISTED_SINCE = 11  # the first version whose files list their control tokens


class TekkenTokenizer(Tokenizer):
    """tekken.json through `tiktoken`: ids are ranks behind the control tokens.

    `control_tokens`: names of control tokens in a text become those tokens, in place of being text.
    """

    library = "tiktoken"

    def __init__(
        self,
        path: str,
        backend: str = "auto",
        proven: bool = False,
        control_tokens: bool = False,
        end: str | None = None,
        content: dict[str, Any] | None = None,
    ):
        try:
            import tiktoken
        except ImportError as error:
            raise ConfigError(
                f"{path} is Mistral's tekken.json: `pip install tiktoken` to read it, or give the model's tokenizer.json."
            ) from error
        content = content or parse_json(Path(path), read_bytes(path))
        try:
            config = content["config"]
            self._reserved = int(config["default_num_special_tokens"])
            kept = int(config["default_vocab_size"]) - self._reserved
            ranks = {base64.b64decode(t["token_bytes"]): int(t["rank"]) for t in content["vocab"] if t["rank"] < kept}
            special = self._special_tokens(content, str(config.get("version") or ""))
            check_ranks(path, ranks)
            self._encoding = tiktoken.Encoding(
                "tekken",
                pat_str=config["pattern"],
                mergeable_ranks=ranks,
                # Their numbers stand before the ranks in the file; tiktoken has room for them behind.
                special_tokens={name: len(ranks) + number for name, number in special.items()},
            )
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{path}: not a tekken.json that can be read ({type(error).__name__}: {error}). Fetch it again, or give the "
                "model's tokenizer.json."
            ) from error
        self._special, self._ranks = special, len(ranks)
        self._allowed: Any = "all" if control_tokens else set()
        ids = range(self._reserved + len(ranks))
        own = ControlTokens(special.get("<s>"), special.get("</s>"), special.get("<pad>"), special.get("<unk>"))
        control = resolve_control_tokens(
            read_settings_beside(Path(path)), self.token_id, known=ids.__contains__, own=own
        )
        control = replace(control, end=choose_end(path, end, control.end, self.token_id))
        super().__init__(path, ids, control)
        self._choose(backend, proven)

    def _special_tokens(self, content: dict[str, Any], version: str) -> dict[str, int]:
        listed = content.get("special_tokens")
        if listed is not None:
            named = {token["token_str"]: int(token["rank"]) for token in listed}
        else:
            number = version.removeprefix("v").split("m")[0]
            if not number.isdigit() or int(number) >= LISTED_SINCE:
                raise ValueError(f"version {version!r} must list its special_tokens, and does not")
            named = {name: number for number, name in enumerate(UNLISTED)}
        there = set(named.values())
        return {**named, **{f"<SPECIAL_{n}>": n for n in range(self._reserved) if n not in there}}

    def _encode_slowly(self, text: str) -> list[int]:
        return self._numbers(self._encoding.encode(text, allowed_special=self._allowed, disallowed_special=()))

    def _encode_with_names(self, text: str) -> list[int]:
        return self._numbers(self._encoding.encode(text, allowed_special="all"))

    def _numbers(self, ids: Iterable[int]) -> list[int]:
        return [i + self._reserved if i < self._ranks else i - self._ranks for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        reserved = self._reserved
        return self._encoding.decode([int(i) - reserved if i >= reserved else self._ranks + int(i) for i in ids])

    def token_id(self, name: str) -> int | None:
        try:
            return self._numbers([self._encoding.encode_single_token(name)])[0]
        except KeyError:
            return None

    def control_ids(self) -> Collection[int]:
        return range(self._reserved)

    def _names_in_text(self) -> Sequence[str]:
        return list(self._special)
