"""Which format a folder is, and opening it as a Source."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megalm.checkpoint.commit import list_committed
from megalm.checkpoint.manifest import MANIFEST
from megalm.config.errors import ConfigError, explain_missing_folder
from megalm.config.plugins import load_plugins
from megalm.convert.choices import FORMATS
from megalm.convert.source import Source


def detect(path: Path) -> str:
    """Tell `huggingface`, `megalm` or `megatron` by what lies there; ConfigError if the folder is none of them."""
    from megalm.convert.megatron_legacy import TRACKER

    load_plugins()
    if not path.is_dir():
        raise explain_missing_folder(
            path,
            "a run's folder such as runs/first, a checkpoint of one, or the folder of a Hugging Face or Megatron-LM model",
        )
    if (path / MANIFEST).is_file() or list_committed(path) or (path / "config.yaml").is_file():
        return "megalm"
    if (path / TRACKER).is_file() or any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():
        return "megatron"
    if (path / "config.json").is_file():
        return "huggingface"
    for name, format in FORMATS.items():
        if format is not None and format.is_one(path):
            return name
    raise ConfigError(
        f"{path}: neither a run of megalm's (config.yaml and checkpoints/), nor a Hugging Face folder (config.json), nor a "
        "Megatron-LM checkpoint (latest_checkpointed_iteration.txt, mp_rank_*, or .metadata)"
    )


def open_source(
    path: Path, format: str | None = None, *, vocab_size: int | None = None, accept: Collection[str] = ()
) -> Source:
    """Open the folder as a Source.

    `format` None: by what lies in it. `vocab_size` cuts Megatron's padding off. `accept`: settings
    of a Hugging Face config.json that are not known here and may be passed over.
    """
    format = format or detect(path)
    if vocab_size is not None and format != "megatron":
        raise ConfigError(f"a vocabulary size is only needed for Megatron-LM checkpoints; {path} is {format}")
    if accept and format != "huggingface":
        raise ConfigError(f"--accept is about the config.json of a Hugging Face folder; {path} is {format}")
    if format == "huggingface":
        from megalm.convert.huggingface import open_folder

        return open_folder(path, accept)
    if format == "megatron":
        from megalm.convert.megatron_dist import is_torch_dist, open_dist
        from megalm.convert.megatron_legacy import find_iteration_folder, open_legacy

        folder = find_iteration_folder(path)
        return (open_dist if is_torch_dist(folder) else open_legacy)(folder, vocab_size)
    if format == "megalm":
        from megalm.convert.native import open_native

        return open_native(path)
    found = FORMATS.find(format)
    assert found is not None, "megalm's own are read above"
    return found.open(path)
