"""A tokenizer.json made to read names of control tokens in a text as plain text, with every id as the file has it.

Two things would make a control token of its name. The library cuts the names of added tokens out of a text before the
model sees it: `tokenizers` can leave those that are special alone (`encode_special_tokens`), which keeps all numbers;
taking them off the list would not, since it numbers what is left anew. And the model may find the name in its own
vocabulary: Unigram and WordLevel take it as a word, WordPiece as the longest beginning, BPE where merges lead to it or
whole words are looked up. There the entry gets a name that no text spells, under the same number. So the model splits the
control token's name into the pieces that it has besides, as SentencePiece does; where it has none it writes its unknown
token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def list_added_tokens(config: dict[str, Any]) -> list[dict[str, Any]]:
    """List the tokens that a tokenizer.json adds to its model's vocabulary."""
    return config.get("added_tokens") or []


def read_model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    """Number of each piece of the model's own vocabulary. Unigram lists pieces with their scores."""
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: number for number, entry in reversed(list(enumerate(vocabulary)))}


def remove_additions(config: dict[str, Any]) -> dict[str, Any]:
    """Without what the library would put before, behind or in place of a text's own tokens."""
    return {**config, "post_processor": None, "truncation": None, "padding": None}


def find_misnumbered(config: dict[str, Any]) -> dict[str, int]:
    """Find the added tokens that the library gives other numbers than the file, with the library's numbers.

    It takes the model's own number of a name, else the next that is free behind the vocabulary, whatever the file says.
    """
    vocabulary = read_model_vocabulary(config["model"])
    size = len(config["model"].get("vocab") or ())
    highest = -1
    seen: set[str] = set()
    wrong: dict[str, int] = {}
    for token in list_added_tokens(config):
        name = token["content"]
        if not name or name in seen:
            continue
        seen.add(name)
        number = vocabulary.get(name)
        if number is None:
            number = highest + 1 if highest >= size or not size else size
        highest = max(highest, number)
        if number != token["id"]:
            wrong[name] = number
    return wrong


def make_plain_text_config(config: dict[str, Any], control: Collection[str] = ()) -> dict[str, Any]:
    """Make the tokenizer.json for `tokenizers` with `encode_special_tokens`: control tokens are those that are special in the
    file, and those named here."""
    added = [
        {**token, "special": bool(token.get("special")) or token["content"] in control}
        for token in list_added_tokens(config)
    ]
    special = {token["content"] for token in added if token["special"]}
    model, renamed = _without_names(config, special | set(control))
    # Of a renamed entry the added token is numbered anew, so it stands behind those whose numbers matter.
    added = [t for t in added if t["content"] not in renamed] + [t for t in added if t["content"] in renamed]
    return {**remove_additions(config), "model": model, "added_tokens": added}


def remove_special_tokens(plain: dict[str, Any]) -> dict[str, Any]:
    """The same for libraries that go by the numbers in the file and have no such switch."""
    return {**plain, "added_tokens": [token for token in list_added_tokens(plain) if not token["special"]]}


def _without_names(config: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], set[str]]:
    """The model with other names for those of these entries that it would find in a text, and what was renamed."""
    model = config["model"]
    vocabulary = read_model_vocabulary(model)
    there = {name for name in names if name in vocabulary and _is_name(name, config)}
    if model.get("type") == "BPE" or "merges" in model:
        found = {name for name in there if model.get("ignore_merges") or len(name) == 1}
        found |= _find_merged(model, there - found)
    else:
        found = there
    if not found:
        return model, set()
    spelt = {name: f"\U0010fffe{vocabulary[name]}\U0010ffff" for name in found}
    changed = dict(model)
    if isinstance(model["vocab"], dict):
        changed["vocab"] = {spelt.get(name, name): number for name, number in vocabulary.items()}
    else:
        changed["vocab"] = [[spelt.get(entry[0], entry[0]), *entry[1:]] for entry in model["vocab"]]
    if model.get("unk_token") in spelt:
        changed["unk_token"] = spelt[model["unk_token"]]
    if model.get("merges"):
        kept = [merge not in found and not found & set(parts) for parts, merge in _merges(model)]
        changed["merges"] = [merge for merge, keep in zip(model["merges"], kept, strict=True) if keep]
    return changed, found


def _is_name(name: str, config: dict[str, Any]) -> bool:
    """False for an entry that stands for a byte, whose name no text spells."""
    if config["model"].get("byte_fallback") and BYTE_PIECE.fullmatch(name):
        return False
    return len(name) > 1 or not any(part.get("type") == "ByteLevel" for part in walk_parts(config))


def _find_merged(model: dict[str, Any], names: Collection[str]) -> set[str]:
    """Find those of the names that a merge leads to. Asks for each name's cuts, as there are far fewer than merges."""
    merges = {merge if isinstance(merge, str) else " ".join(merge) for merge in (model.get("merges") or ()) if names}
    prefix = model.get("continuing_subword_prefix") or ""
    return {
        name
        for name in names
        if any(f"{name[:at]} {before}{name[at:]}" in merges for at in range(1, len(name)) for before in {"", prefix})
    }


def _merges(model: dict[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(parts, result) of each merge of a BPE; files write the parts as a list or with a space between."""
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield (left, right), left + right.removeprefix(prefix)


def walk_parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Normalizers and pre-tokenizers of a tokenizer.json, those inside sequences too."""
    waiting = [config.get("normalizer"), config.get("pre_tokenizer")]
    while waiting:
        part = waiting.pop(0)
        if part:
            yield part
            waiting = [*(part.get("normalizers") or part.get("pretokenizers") or []), *waiting]
