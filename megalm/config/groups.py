"""The yaml groups of conf/ and of a user's own folders, and their choices.

A choice is looked for in `--config-dir FOLDER`, then in the folders of `$MEGALM_CONF`, then in `./conf`, then in megalm's
own conf/. A folder of one's own has the same groups (`model/`, `data/`, `experiment/`, ...); others in it are not ours.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from megalm.config.errors import ConfigError

VARIABLE = "MEGALM_CONF"
OPTION = "--config-dir"


def find_conf_dir() -> Path:
    """Folder of the yaml groups: beside the package in a source tree, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(
        f"conf/config.yaml was found neither in {package} nor beside it. Install megalm again: pip install ."
    )


def take_out_folders(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Take words without `--config-dir FOLDER` (or `-cd FOLDER`), and those folders.

    Errors: ConfigError where no folder follows.
    """
    rest: list[str] = []
    folders: list[Path] = []
    following = iter(words)
    for word in following:
        name, equals, value = word.partition("=")
        if name not in (OPTION, "-cd"):
            rest.append(word)
            continue
        folder = Path(value if equals else next(following, ""))
        if not folder.name or not folder.is_dir():
            raise ConfigError(
                f"{OPTION} {folder}: is no folder. Give one that has groups in it, such as {folder}/model/."
            )
        folders.append(folder)
    return rest, folders


def find_search_path(folders: Sequence[Path] = ()) -> list[Path]:
    """Find the folders in which choices are looked for; the first that has one wins.

    folders: those of the command line. Errors: ConfigError for a folder of $MEGALM_CONF that is not there.
    """
    found = [*folders]
    for name in os.environ.get(VARIABLE, "").split(os.pathsep):
        if name and not Path(name).is_dir():
            raise ConfigError(
                f"{VARIABLE}={os.environ[VARIABLE]}: {name} is no folder. Correct the variable, or unset it."
            )
        found += [Path(name)] if name else []
    if Path("conf").is_dir():
        found.append(Path("conf"))
    own = find_conf_dir()
    return [*(folder for folder in found if folder.resolve() != own), own]


def find_group_files(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """`GROUP/CHOICE` -> the yaml file that is meant, over the whole search path."""
    own = find_conf_dir()
    known = {path.name for path in own.iterdir() if path.is_dir()}
    found: dict[str, Path] = {}
    for root in reversed(find_search_path(folders)):
        for file in sorted(root.glob("*/**/*.yaml")):
            name = file.relative_to(root).with_suffix("").as_posix()
            if name.partition("/")[0] in known:
                found[name] = file
    return found


def list_groups(folders: Sequence[Path] = ()) -> dict[str, list[str]]:
    """List the choices of each configuration group, by name: {"model": ["125m", ...], ...}."""
    found: dict[str, list[str]] = {}
    for name in sorted(find_group_files(folders)):
        group, _, choice = name.partition("/")
        found.setdefault(group, []).append(choice)
    return found


def find_own_files(choices: dict[str, str], folders: Sequence[Path] = ()) -> dict[str, Path]:
    """Of the choices made, `GROUP=CHOICE` -> file for those that a user's own folder gives."""
    files, own = find_group_files(folders), find_conf_dir()
    return {
        f"{group}={choice}": file
        for group, choice in choices.items()
        if (file := files.get(f"{group}/{choice}")) is not None and not file.is_relative_to(own)
    }
