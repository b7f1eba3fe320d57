"""What README, CONTRIBUTING and the pages of docs/ name in backquotes is there."""

import re
from pathlib import Path

import pytest

from tests.test_arrows import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PATH = re.compile(r"[A-Za-z][\w.*-]*(?:/[\w.*-]*)+|[\w-]+\.(?:py|toml|sh|h|cuh|cpp|cu)")
MADE = {"runs", "data", "configs", "logs", "tensorboard", "checkpoints", "huggingface", "samples"}
"""What runs and tools make."""
OTHERS = {
    "encodings",
    "eval",
    "gone_back",
    "events",
    "loss",
    "router",
    "prediction",
    "preference",
    "policy",
    "prompts",
    "reward",
}
"""A folder of Python's sources, and names of curves and events."""


def paths_in(text: str) -> set[str]:
    """Paths in backquotes, outside of code blocks; words in capitals (NAME, OP) stand for any name."""
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    words = {word for word in re.findall(r"`([^`\s]+)`", outside) if PATH.fullmatch(word)}
    general = {re.sub(r"\b[A-Z][A-Z_]+\b", "*", word) for word in words}
    return {word for word in general if word.split("/")[0] not in MADE | OTHERS and not word.startswith("*")}


def is_there(path: str) -> bool:
    """In the repository or in a folder of it, as `train/trainer.py` is in megalm; a lone file anywhere."""
    path = path.rstrip("/")
    return any(ROOT.glob(path)) or any(ROOT.glob(f"*/{path}")) or ("/" not in path and any(ROOT.glob(f"*/**/{path}")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_backquotes_exist(page):
    missing = sorted(path for path in paths_in(page.read_text(encoding="utf-8")) if not is_there(path))
    assert not missing


def test_a_path_that_is_not_there_is_found():
    found = paths_in("`megalm/model/nowhere.py`, `csrc/OP/op.h`, `runs/first/`, `tools/NAME/`\n```\n`a/b`\n```\n")
    assert found == {"megalm/model/nowhere.py", "csrc/*/op.h", "tools/*/"}
    assert [path for path in sorted(found) if not is_there(path)] == ["megalm/model/nowhere.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_picture_of_the_rooms_is_that_of_the_arrows():
    picture = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    assert [line.split()[0] for line in picture.strip().splitlines()] == ROOMS[::-1]
