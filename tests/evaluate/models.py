"""A small model in a folder, with a tokenizer that puts a begin token before every text or does not."""

import json
from pathlib import Path

from tests.convert.chat_model import make_chat_model


def make_model(folder: Path, begin: bool = True) -> Path:
    """A random Llama of 64 positions and 300 tokens."""
    make_chat_model(folder, "string")
    if not begin:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["post_processor"] = None
        file.write_text(json.dumps(content))
    return folder
