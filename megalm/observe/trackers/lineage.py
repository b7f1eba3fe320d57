"""What a run came from, and its settings as a stranger may see them."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm import __version__
from megalm.config import Config

if TYPE_CHECKING:
    from megalm.train.trainer import Trainer

HIDDEN = "***"
_SECRET_KEY = re.compile(r"(^|[_.-])(key|token|secret|password|passwd|credentials?|auth)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_QUERY = re.compile(r"((?:key|token|secret|signature|sig|password|credential)[\w-]*=)[^&\s]+", re.IGNORECASE)


def describe_settings(config: Config) -> dict[str, Any]:
    """Describe every key with its value, without secrets: what a key's name calls one, and what an address carries."""
    found: dict[str, Any] = {}
    _flatten("", asdict(config), found)
    return found


def _flatten(prefix: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), inner, found)
    else:
        found[prefix] = HIDDEN if value and _SECRET_KEY.search(prefix) else hide_secrets(value)


def hide_secrets(value: Any) -> Any:
    """The value without users, passwords and signatures that stand in an address."""
    if isinstance(value, list | tuple):
        return [hide_secrets(inner) for inner in value]
    if isinstance(value, dict):
        return {key: HIDDEN if _SECRET_KEY.search(str(key)) else hide_secrets(inner) for key, inner in value.items()}
    return _QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", value)) if isinstance(value, str) else value


def collect_lineage(trainer: Trainer) -> dict[str, str]:
    """Collect what the run is made of: version and commit of the code, the data's digests, what it began with, where it lies."""
    config = trainer.config
    facts = {
        "megalm": __version__,
        "python": platform.python_version(),
        "model": config.model.name,
        "folder": str(trainer.folder.resolve()),
        "ranks": str(trainer.mesh.world_size),
        "device": trainer.mesh.device.type,
    }
    if commit := find_commit():
        facts["commit"] = commit
    if config.checkpoint.load_path is not None:
        facts["parent"] = str(hide_secrets(str(config.checkpoint.load_path)))
    for name, digest in trainer.batch_source.state_dict().get("contents", {}).items():
        facts[f"data/{name}"] = digest or "in a store: not read for a digest"
    return facts


def find_commit() -> str | None:
    """Find the commit of the code where this is a checkout, with + where files differ from it; None elsewhere."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
