"""Instruction data made into token files with the weights of their targets, once for each set of data, template and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megalm.config.errors import ConfigError
from megalm.data.pairs import MARGINS
from megalm.data.tokens import TokenWriter, choose_token_dtype
from megalm.posttrain.pairs import PairRecord, is_pair, read_pairs
from megalm.posttrain.records import BadRecord, Record, read_records, read_values
from megalm.posttrain.render import Rendered, Renderer
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
    pairs: bool = False
    """Each record is a pair: two documents, the better answer first."""
    longer: int = 0
    """Of pairs: how often the better answer is the longer one."""
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
    """Write PREFIX.bin, .idx and .targets: a document for each record, and what its tokens count in the loss. Where the first
    record is a pair of answers, all must be: two documents for each, and PREFIX.pairs, a margin for each.

    template_file: a chat template in place of the tokenizer's own. max_length: longer records lose their end. skip_bad: leave out
    records that cannot be learned from, and list them. progress: told of the records so far.
    Errors: ConfigError with the first bad record's file and line; where none is left.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    template = find_template(tokenizer, template_file)
    if max_length is not None and max_length < 2:
        raise ConfigError(f"a maximal length of {max_length} leaves nothing to predict: give at least 2 tokens.")
    pairs = _hold_pairs(files)
    recipe = describe_recipe(files, tokenizer, template, max_length, skip_bad, pairs)
    made = Prepared(
        prefix, pairs=pairs, template="the model's own" if template.template is not None else "none: a plain transcript"
    )
    note = Path(f"{prefix}.recipe.json")
    known = read_note(note, prefix, recipe)
    if known is not None:
        return known
    renderer = Renderer(template, tokenizer)
    margins: list[float] = []
    with TokenWriter(prefix, choose_token_dtype(tokenizer.vocab_size), with_targets=True) as writer:
        for file in files:
            for record in read_pairs(file) if pairs else read_records(file):
                try:
                    if isinstance(record, BadRecord):
                        raise record
                    if isinstance(record, PairRecord):
                        documents = _render_pair(record, renderer, max_length, made)
                        margins.append(record.margin)
                    else:
                        documents = [_render(record, renderer, max_length, made)]
                except BadRecord as error:
                    if not skip_bad:
                        said = str(error).rstrip(".")
                        raise ConfigError(f"{said}. Mend it, or leave such records out with --skip-bad.") from None
                    made.left_out.append(str(error))
                    continue
                for rendered in documents:
                    writer.add_document(rendered.ids, rendered.weights)
                    made.tokens += len(rendered.ids)
                    made.targets += rendered.targets
                made.records += 1
                made.longest = max(made.longest, sum(len(rendered.ids) for rendered in documents))
                progress(made.records)
        if not made.records:
            raise ConfigError(f"{', '.join(files)}: no record is left to learn from.")
        Path(f"{prefix}.pairs").unlink(missing_ok=True)
    if pairs:
        np.asarray(margins, MARGINS).tofile(f"{prefix}.pairs")
    _write_note(note, {"recipe": recipe, "made": asdict(made)})
    return made


def _hold_pairs(files: Sequence[str]) -> bool:
    """Whether the first record that is one is a pair. Errors: as `read_values`"""
    values = (value for file in files for _, value in read_values(file))
    return is_pair(next((value for value in values if isinstance(value, dict)), None))


def _render(record: Record, renderer: Renderer, max_length: int | None, made: Prepared) -> Rendered:
    """Errors: BadRecord"""
    rendered = renderer.render(record)
    if max_length is not None and len(rendered.ids) > max_length:
        rendered = rendered.cut(max_length)
        made.cut += 1
        if not rendered.targets:
            raise BadRecord(f"{record.place}: all its targets lie behind {max_length} tokens: allow longer records.")
    return rendered


def _render_pair(pair: PairRecord, renderer: Renderer, max_length: int | None, made: Prepared) -> list[Rendered]:
    """Errors: BadRecord"""
    chosen, rejected = (_render(side, renderer, max_length, made) for side in (pair.chosen, pair.rejected))
    if np.array_equal(chosen.ids, rejected.ids):
        raise BadRecord(
            f"{pair.place}: chosen and rejected are the same tokens, so far as they are read: nothing to prefer."
        )
    made.longer += chosen.targets > rejected.targets
    return [chosen, rejected]


def find_template(tokenizer: Tokenizer, file: str | None) -> ChatTemplate:
    """Find the template of a file, or the one beside the tokenizer. Errors: ConfigError"""
    own = find_chat_template(tokenizer)
    if file is None:
        return own
    try:
        return ChatTemplate(Path(file).read_text(encoding="utf-8"), own.tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the chat template cannot be read: {error}.") from None


def describe_recipe(
    files: Sequence[str],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int | None,
    skip_bad: bool,
    pairs: bool = False,
) -> dict[str, Any]:
    """Describe all that decides the tokens, by content."""
    return {
        "version": VERSION,
        "files": [_digest_file(file) for file in files],
        "tokenizer": tokenizer.fingerprint(),
        "template": hashlib.sha256((template.template or "").encode()).hexdigest(),
        "tokens": dict(template.tokens),
        "max_length": max_length,
        "skip_bad": skip_bad,
        **({"pairs": True} if pairs else {}),
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
    """Read what an earlier call made of the same; None where it did not."""
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["recipe"] != recipe or not all(
            os.path.exists(f"{prefix}.{part}")
            for part in ("bin", "idx", "targets", *(["pairs"] if recipe.get("pairs") else []))
        ):
            return None
        return Prepared(**{**known["made"], "prefix": prefix, "reused": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_note(note: Path, content: dict[str, Any]) -> None:
    temporary = note.with_name(f"{note.name}.{os.getpid()}.partial")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, note)


def check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    """Errors: ConfigError where `prepare` made these tokens with another tokenizer."""
    try:
        made_with = json.loads(Path(f"{prefix}.recipe.json").read_text(encoding="utf-8"))["recipe"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if made_with != tokenizer.fingerprint():
        raise ConfigError(
            f"{prefix} was prepared with another tokenizer than data.tokenizer={tokenizer.path}: its tokens mean other words. "
            "Prepare the records again with the model's own tokenizer."
        )
