"""The files behind an input: a file, a folder with all below it, a glob, a URL. What is no document of the person's is left
out of folders and globs, and told: hidden and temporary files, notes that other libraries keep beside their data, results
of these tools. A file that is named itself is taken as it is.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus.files import ENDINGS, TEXT_ENDINGS, Found, find_ending

HIDDEN, UNKNOWN, OWN = "hidden or temporary", "of no known format", "results of these tools"
NOTES, PIPES = "notes beside a data set", "pipes, sockets or devices"
FOLDERS = "folders, which a glob without ** does not search"
TEMPORARY_ENDINGS = (
    "~", ".part", ".partial", ".tmp", ".temp", ".download", ".crdownload", ".aria2", ".incomplete", ".lock", ".bak", ".old",
    ".orig", ".rej", ".swp", ".swo", ".crc", ".md5", ".sha1", ".sha256", ".sha512",
)  # fmt: skip
TEMPORARY_FOLDERS = (".tmp", ".temp", ".partial", ".incomplete")  # of those endings, the ones of folders
TEMPORARY_NAMES = (
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "_success", "_metadata", "_common_metadata", "_committed_*",
    "_started_*", "_temporary", "_delta_log", "_spark_metadata", "__macosx", "__pycache__", "lost+found", "$recycle.bin",
    "system volume information", "@eadir", "~$*", "#*#",
)  # fmt: skip
DATASET_NOTES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")  # as `datasets` writes them
READ_FIRST = ("readme", "license", "licence", "citation", "notice", "changelog", "contributing", "datasheet")
WORK_ENDING = ".parts"  # of the folder in which the parts of a result wait
WORK_MARK = "recipe"  # the file in it that says what they are of
SHOWN = 5  # names of each kind that are told


@dataclass
class LeftOut:
    """What folders and globs hold besides documents, by what it is."""

    paths: dict[str, set[str]] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        """One more of this kind."""
        self.paths.setdefault(kind, set()).add(path)

    def __str__(self) -> str:
        said = []
        for kind, paths in self.paths.items():
            names = ", ".join(sorted(paths)[:SHOWN]) + (", ..." if len(paths) > SHOWN else "")
            said.append(f"{len(paths)} {kind} ({names})")
        return "; ".join(said)


def list_files(item: str, left_out: LeftOut | None = None, results: Sequence[str] = ()) -> list[Found]:
    """List the files behind a path, folder, glob or URL, sorted; empty where there are none.

    results: what the command itself writes, files or folders; they are no input, though they lie in its folder.
    Errors: ConfigError for what cannot be listed, such as a folder that may not be read or a link that points nowhere.
    """
    left_out = LeftOut() if left_out is None else left_out
    return _list_remote(item, left_out) if "://" in item else _list_local(item, left_out, results)


def is_temporary(name: str, pattern: str = "", folder: bool = False) -> bool:
    """Whether a file or folder of this name is hidden, or waits for its end, or is a by-product of what wrote it; not, where
    the pattern that found it asks for such names."""
    if name.startswith("."):
        return not pattern.startswith(".")
    low, asked = name.lower(), pattern.lower()
    endings = TEMPORARY_FOLDERS if folder else TEMPORARY_ENDINGS
    ends = any(low.endswith(end) and not asked.endswith(end) for end in endings)
    return ends or any(fnmatch.fnmatchcase(low, known) for known in TEMPORARY_NAMES)


def is_work_folder(path: str) -> bool:
    """Whether the parts of an interrupted run wait here."""
    return path.endswith(WORK_ENDING) and os.path.isfile(os.path.join(path, WORK_MARK))


def _refuse(error: OSError) -> None:
    path = error.filename or "a folder"
    hint = ", a link that points nowhere" if os.path.islink(path) else ""
    raise ConfigError(
        f"{path}: cannot be read ({error.strerror}{hint}), so part of the input would be missing. Mend it, remove it, or name "
        "the files that you mean."
    ) from error


def _list_local(item: str, left_out: LeftOut, results: Sequence[str]) -> list[Found]:
    own = {os.path.abspath(path) for path in results}
    if os.path.isdir(item):
        paths = _sorted_out(_walk(item, left_out, own), left_out, os.path.exists, ENDINGS)
    elif os.path.lexists(item):
        if os.path.abspath(item) in own:
            raise ConfigError(f"input {item} is what this command writes: give the output another name.")
        return [_found(item)]
    else:
        paths = _sorted_out(_expand("", item.split("/"), left_out, own), left_out, os.path.exists, None)
        if "**" in item.split("/"):
            left_out.paths.pop(FOLDERS, None)
    return [found for path in sorted(paths) if (found := _found(path, left_out))]


def _found(path: str, left_out: LeftOut | None = None) -> Any:
    """The file with its size; None for what is in a folder and no file."""
    try:
        status = os.stat(path)
    except OSError as error:
        return _refuse(error)
    if left_out is not None and not stat.S_ISREG(status.st_mode):
        left_out.add(PIPES, path)  # opening it could wait for ever
        return None
    return Found(path, status.st_size, str(status.st_mtime_ns))


def _walk(folder: str, left_out: LeftOut, own: set[str]) -> Iterator[str]:
    """All files below, also through links to folders; a folder that is linked to twice comes once."""
    seen = set()
    for inside, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = _status(inside)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not _passed_over(inside, name, "", left_out, own, folder=True)]
        folders.sort(
            key=lambda name: (os.path.islink(os.path.join(inside, name)), name)
        )  # the folder before links to it
        for name in names:
            if not _passed_over(inside, name, "", left_out, own):
                path = os.path.join(inside, name)
                if find_ending(path) not in ENDINGS and os.path.islink(path):
                    _status(path)  # it may have been a folder
                yield path


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        _refuse(error)
        raise


def _passed_over(inside: str, name: str, pattern: str, left_out: LeftOut, own: set[str], folder: bool = False) -> bool:
    path = os.path.join(inside, name)
    if own and os.path.abspath(path) in own or is_work_folder(path):
        left_out.add(OWN, path)
    elif is_temporary(name, pattern, folder):
        left_out.add(HIDDEN, path)
    else:
        return False
    return True


def _expand(folder: str, parts: list[str], left_out: LeftOut, own: set[str]) -> Iterator[str]:
    """The files that a glob names: its parts, from this folder on."""
    head, rest = parts[0], parts[1:]
    if not any(character in head for character in "*?["):
        path = f"{folder}{head}/" if rest else f"{folder}{head}"
        if _is_there(path):
            yield from _expand(path, rest, left_out, own) if rest else _file_or_none(path, left_out)
        return
    if head == "**":
        for inside in _folders_below(folder or ".", left_out, own):
            prefix = "" if inside == "." else f"{inside.removeprefix('./').rstrip('/')}/"
            yield from _expand(prefix, rest or ["*"], left_out, own)
        return
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError as error:
        _refuse(error)
    for name in names:
        path = f"{folder}{name}"
        if not fnmatch.fnmatchcase(name, head):
            continue
        is_folder = os.path.isdir(path)
        if _passed_over(folder, name, head, left_out, own, is_folder):
            continue
        if not rest:
            yield from _file_or_none(path, left_out)
        elif is_folder or stat.S_ISDIR(_status(path).st_mode):
            yield from _expand(f"{path}/", rest, left_out, own)


def _is_there(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        _refuse(error if isinstance(error, OSError) else OSError(0, str(error), path))
    return True


def _file_or_none(path: str, left_out: LeftOut) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    left_out.add(FOLDERS, path)
    return []


def _folders_below(folder: str, left_out: LeftOut, own: set[str]) -> Iterator[str]:
    """The folder and all below it, each once."""
    seen = set()
    for inside, folders, _ in os.walk(folder, onerror=_refuse, followlinks=True):
        status = _status(inside)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not _passed_over(inside, name, "", left_out, own, True))
        yield inside


def _sorted_out(
    paths: Iterable[str], left_out: LeftOut, exists: Callable[[str], bool], endings: Sequence[str] | None
) -> list[str]:
    """Those that are documents; in a glob also those of unknown endings. `exists` says what lies beside them."""
    there = sorted(set(paths))
    folders_of_shards = {_folder(path) for path in there if ".mds" in os.path.basename(path)}
    kept = []
    for path in there:
        if endings is not None and find_ending(path) not in endings:
            left_out.add(UNKNOWN, path)
        elif _is_own(path, exists):
            left_out.add(OWN, path)
        elif _is_note(path, exists, folders_of_shards):
            left_out.add(NOTES, path)
        else:
            kept.append(path)
    notes = _read_first(kept)
    for path in notes:
        left_out.add(NOTES, path)
    return [path for path in kept if path not in notes]


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _beside(path: str, name: str) -> str:
    return f"{path[: len(path) - len(os.path.basename(path))]}{name}"


def _is_own(path: str, exists: Callable[[str], bool]) -> bool:
    """What `tools/tokenize` writes beside a token file."""
    stems = (path.removesuffix(end) for end in ("_recipe.json", "_tokenizer.json") if path.endswith(end))
    return any(exists(f"{stem}_text_document.idx") for stem in stems)


def _is_note(path: str, exists: Callable[[str], bool], folders_of_shards: set[str]) -> bool:
    """What the libraries `datasets` and mosaicml-streaming keep beside their data."""
    name = os.path.basename(path)
    if name in DATASET_NOTES:
        return True
    if name == "state.json" or (name.startswith("cache-") and name.endswith(".arrow")):
        return exists(_beside(path, "dataset_info.json")) or (
            name != "state.json" and exists(_beside(path, "state.json"))
        )
    if name != "index.json":
        return False
    beside = any(
        exists(_beside(path, f"shard.00000.mds{end}")) for end in ("", ".zstd", ".gz", ".bz2", ".br", ".snappy")
    )
    folder = _folder(path)
    return beside or any(_folder(inside) == folder or inside == folder for inside in folders_of_shards)


def _read_first(paths: Sequence[str]) -> set[str]:
    """README and the like, where all else at and below their folder is tables and JSON: they are about the data."""

    def is_one(path: str) -> bool:
        return os.path.basename(path).lower().split(".")[0] in READ_FIRST and find_ending(path) in TEXT_ENDINGS

    candidates = {path for path in paths if is_one(path)}
    if not candidates:
        return set()
    texts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for path in paths:
        if path in candidates:
            continue
        count, folder = texts if find_ending(path) in TEXT_ENDINGS else others, _folder(path)
        while True:
            count[folder] += 1
            if not folder:
                break
            folder = _folder(folder)
    return {path for path in candidates if others[_folder(path)] and not texts[_folder(path)]}


def _list_remote(item: str, left_out: LeftOut) -> list[Found]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(item)
        if "file" in (system.protocol if isinstance(system.protocol, (tuple, list)) else (system.protocol,)):
            found = _list_local(path, left_out, ())
            return [Found(system.unstrip_protocol(one.path), one.size, one.stamp) for one in found]
        details = _remote_details(system, path, left_out)
        return [
            Found(system.unstrip_protocol(name), int(about["size"] or 0), _stamp(about))
            for name, about in sorted(details.items())
        ]
    except ConfigError:
        raise
    except Exception as error:  # each store's library raises its own kinds
        raise ConfigError(
            f"input {item!r} cannot be listed: {error}. Check the address and the credentials; s3:// needs `pip "
            f"install s3fs`."
        ) from error


def _remote_details(system: Any, path: str, left_out: LeftOut) -> dict[str, dict[str, Any]]:
    """Name and facts of the files behind a path in a store."""
    pattern = "" if system.exists(path) else path
    if pattern and not any(character in path for character in "*?["):
        return {path: system.info(path)}  # which says what is wrong
    if not pattern and not system.isdir(path):
        return {path: system.info(path)}
    found = system.glob(path, detail=True) if pattern else system.find(path, detail=True)
    root = path.rstrip("/")
    if pattern:
        parts = root.split("/")
        root = "/".join(parts[: next(at for at, part in enumerate(parts) if any(c in part for c in "*?["))])
    asked = pattern.rpartition("/")[2]
    details: dict[str, dict[str, Any]] = {}
    for name, about in sorted(found.items()):
        *above, last = name[len(root) :].strip("/").split("/")
        if about["type"] != "file":
            continue
        if any(is_temporary(part, folder=True) for part in above) or is_temporary(last, asked):
            left_out.add(HIDDEN, name)
        else:
            details[name] = about
    kept = _sorted_out(details, left_out, details.__contains__, None if pattern else ENDINGS)
    return {name: details[name] for name in kept}


def _stamp(details: dict[str, Any]) -> str:
    return "".join(
        str(details[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if details.get(key)
    )
