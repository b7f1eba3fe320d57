"""The yaml groups of conf/ and their choices."""

from pathlib import Path

from megalm.config.errors import ConfigError


def find_conf_dir() -> Path:
    """Folder of the yaml groups: beside the package in a source tree, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"conf/config.yaml was found neither in {package} nor beside it. Install megalm again: pip install ."
    )


def list_groups() -> dict[str, list[str]]:
    """The choices of each configuration group, by name: {"model": ["125m", ...], ...}."""
    root = find_conf_dir()
    found: dict[str, list[str]] = {}
    for file in sorted(root.glob("*/**/*.yaml")):
        group, _, choice = file.relative_to(root).with_suffix("").as_posix().partition("/")
        found.setdefault(group, []).append(choice)
    return found
