"""Instruction data made into token files with the weights of their targets, once for each set of data, template and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.data.tokens import TokenWriter, choose_token_dtype
from megalm.posttrain.records import BadRecord, read_records
from megalm.posttrain.render import Renderer
from megalm.tokenizer.chat import ChatTemplate, find_chat_template
from megalm.tokenizer.tokenizer import Tokenizer, load_tokenizer

VERSION = 1


@dataclass
class Prepared:
    """What was made."""

    prefix: str
    records: int = 0
    tokens: int = 0
    targets: int = 0
    cut: int = 0
    """Records that were longer than allowed, and lost their end."""
    left_out: list[str] = field(default_factory=list)
    """What is wrong with each record that was left out."""
    longest: int = 0
    template: str = ""
    reused: bool = False
    """The files were there already, made of the same."""


def prepare(
    files: Sequence[str],
    tokenizer_path: str,
    prefix: str,
    *,
    template_file: str | None = None,
    max_length: int | None = None,
    skip_bad: bool = False,
    progress: Callable[[int], None] = lambda records: None,
) -> Prepared:
    """Write PREFIX.bin, .idx and .targets: a document for each record, and what its tokens count in the loss.

    template_file: a chat template in place of the tokenizer's own. max_length: longer records lose their end. skip_bad: leave out
    records that cannot be learned from, and list them. progress: told of the records so far.
    Errors: ConfigError with the first bad record's file and line; where none is left.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    template = find_template(tokenizer, template_file)
    if max_length is not None and max_length < 2:
        raise ConfigError(f"a maximal length of {max_length} leaves nothing to predict: give at least 2 tokens.")
    recipe = describe_recipe(files, tokenizer, template, max_length, skip_bad)
    made = Prepared(prefix, template="the model's own" if template.template is not None else "none: a plain transcript")
    note = Path(f"{prefix}.recipe.json")
    known = read_note(note, prefix, recipe)
    if known is not None:
        return known
    renderer = Renderer(template, tokenizer)
    with TokenWriter(prefix, choose_token_dtype(tokenizer.vocab_size), with_targets=True) as writer:
        for file in files:
            for record in read_records(file):
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    rendered = renderer.render(record)
                    if max_length is not None and len(rendered.ids) > max_length:
                        rendered = rendered.cut(max_length)
                        made.cut += 1
                        if not rendered.targets:
                            behind = f"all its targets lie behind {max_length} tokens: allow longer records."
                            raise BadRecord(f"{record.place}: {behind}")
                except BadRecord as error:
                    if not skip_bad:
                        said = str(error).rstrip(".")
                        raise ConfigError(f"{said}. Mend it, or leave such records out with --skip-bad.") from None
                    made.left_out.append(str(error))
                    continue
                writer.add_document(rendered.ids, rendered.weights)
                made.records += 1
                made.tokens += len(rendered.ids)
                made.targets += rendered.targets
                made.longest = max(made.longest, len(rendered.ids))
                progress(made.records)
        if not made.records:
            raise ConfigError(f"{', '.join(files)}: no record is left to learn from.")
    _write_note(note, {"recipe": recipe, "made": asdict(made)})
    return made


def find_template(tokenizer: Tokenizer, file: str | None) -> ChatTemplate:
    """The template of a file, or the one beside the tokenizer. Errors: ConfigError"""
    own = find_chat_template(tokenizer)
    if file is None:
        return own
    try:
        return ChatTemplate(Path(file).read_text(encoding="utf-8"), own.tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the chat template cannot be read: {error}.") from None


def describe_recipe(
    files: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate, max_length: int | None, skip_bad: bool
) -> dict[str, Any]:
    """All that decides the tokens, by content."""
    return {
        "version": VERSION,
        "files": [_digest_file(file) for file in files],
        "tokenizer": tokenizer.fingerprint(),
        "template": hashlib.sha256((template.template or "").encode()).hexdigest(),
        "tokens": dict(template.tokens),
        "max_length": max_length,
        "skip_bad": skip_bad,
    }


def _digest_file(file: str) -> str:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except FileNotFoundError:
        raise ConfigError(f"{file} is not there: give a file of JSON lines (.jsonl), JSON or Parquet.") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None


def read_note(note: Path, prefix: str, recipe: dict[str, Any]) -> Prepared | None:
    """What an earlier call made of the same; None where it did not."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["recipe"] != recipe or not all(
            os.path.exists(f"{prefix}.{part}") for part in ("bin", "idx", "targets")
        ):
            return None
        return Prepared(**{**known["made"], "prefix": prefix, "reused": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(note: Path, content: dict[str, Any]) -> None:
    temporary = note.with_name(f"{note.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, note)
