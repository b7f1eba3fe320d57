"""The whole of `tools/tokenize`: find the input, have a tokenizer, encode, merge, remember the recipe, report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus import python_corpus
from megalm.corpus.documents import Piece, cut_into_pieces, find_files
from megalm.corpus.engine import Engine, LocalEngine
from megalm.corpus.files import is_stream, spool
from megalm.corpus.losses import Losses, RoundTrips
from megalm.corpus.merge import merge
from megalm.corpus.results import Results
from megalm.corpus.shards import WorkFolder, check_unchanged, hash_json, make_shards, stamp_files
from megalm.corpus.tokenize_corpus import (
    Settings,
    ShardResult,
    ShardRun,
    Tally,
)
from megalm.corpus.tokenizer_training import TRAINING_MEGABYTES, sample_texts, train_byte_level_bpe
from megalm.data.tokens import TokenFile
from megalm.tokenizer.tokenizer import compute_fingerprint

_OF_MDS = re.compile(r"index\.json|tokens\.idx|shard\.[0-9]+\.mds(\.[a-z0-9]+)?")  # files of a folder of shards
RECIPE_FORMAT = 3  # raised when the same request would give other tokens


@dataclass(frozen=True)
class Job:
    """One run of the tool. `settings.tokenizer` is empty when a tokenizer is to be trained."""

    inputs: tuple[str, ...]
    output: str | None
    settings: Settings
    train_bpe: int | None = None
    training_megabytes: float = TRAINING_MEGABYTES
    corpus_megabytes: float = python_corpus.DEFAULT_MEGABYTES
    workers: int = 1
    max_documents: int | None = None
    mds: bool = False
    """Also as MDS shards, in OUTPUT_mds."""


@dataclass
class Outcome:
    """What the tool did, for people and programs."""

    prefix: str | None
    tokenizer: str
    backend: str
    vocab_size: int
    documents: int
    tokens: int
    input_bytes: int
    empty: int
    filtered: int
    bad: int
    listed: list[str]
    tallies: dict[str, Tally]
    losses: Losses = field(default_factory=Losses)
    """What of the texts does not come back from the tokens."""
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    reused: bool = False


class Progress:
    """Told what happens; does nothing by itself."""

    def say(self, message: str) -> None:
        """A sentence on what begins now."""

    def start(self, total_bytes: int) -> None:
        """The encoding begins."""

    def shard(self, result: ShardResult) -> None:
        """A shard is done."""

    def finish(self) -> None:
        """The encoding is over."""


def run_job(job: Job, progress: Progress | None = None, engine: Callable[[], Engine] | None = None) -> Outcome:
    """Does the job, or finds that it was done: the same recipe and its files whole.

    `engine` makes what runs the shards, if there is anything to run; None: a local pool of `job.workers`.

    Errors: ConfigError for input, tokenizer or options that cannot be used.
    """
    progress = progress or Progress()
    if job.output is None:
        with tempfile.TemporaryDirectory(prefix="tokenize-") as folder:
            return replace_prefix(run_job(replace(job, output=os.path.join(folder, "data")), progress, engine), None)
    if "://" in job.output:
        raise ConfigError(
            f"--output {job.output}: the output is written to a folder of this machine. Write it there, and copy the files."
        )
    if job.max_documents is not None and job.max_documents < 1:
        raise ConfigError(f"--max-documents is {job.max_documents}: at least one document must be left.")
    try:
        Path(job.output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {job.output}: {error.filename}: {error.strerror}. Choose another place."
        ) from error
    with contextlib.ExitStack() as ends:
        return _run(job, job.output, progress, engine, ends)


def _run(
    job: Job, output: str, progress: Progress, engine: Callable[[], Engine] | None, ends: contextlib.ExitStack
) -> Outcome:
    prefix = f"{output}_text_document"
    tokenizer_path = job.settings.tokenizer or f"{output}_tokenizer.json"
    own_corpus = tuple(job.inputs) == (python_corpus.NAME,)
    if python_corpus.NAME in job.inputs and not own_corpus:
        raise ConfigError(f"{python_corpus.NAME} is an input of its own: tokenize other text in another run.")
    files = [] if own_corpus else _files(job.inputs, output, _results(job, output), ends, progress)
    recipe = _recipe(job, files)
    recipe_path = f"{output}_recipe.json"
    done = _already_done(recipe_path, recipe, prefix, tokenizer_path)
    if done is not None:
        return done
    if own_corpus:
        progress.say("choosing among the sources and documentation of the installed Python and packages")
        files = python_corpus.choose_python_files(job.corpus_megabytes)
    pieces = cut_into_pieces(files)
    if job.train_bpe is not None and not job.settings.tokenizer:
        _train(job, pieces, tokenizer_path, recipe, progress)
    settings = replace(job.settings, tokenizer=tokenizer_path)
    shards = make_shards(pieces)
    cut = hash_json([[len(shard), shard[0].block] for shard in shards])
    work = WorkFolder(f"{output}.parts", {**recipe, "tokenizer": compute_fingerprint(tokenizer_path), "cut": cut})
    whole = ends.enter_context(contextlib.ExitStack())
    whole.callback(work.close, keep=True)
    if work.kept:
        progress.say("going on with an interrupted run")
    elif work.of_another:
        progress.say(f"{work.path} is of another command, or the input has changed since: beginning from the start")
    progress.start(sum(piece.size for piece in pieces))
    with engine() if engine else LocalEngine(job.workers) as running:
        try:
            stage = ShardRun(shards, settings, work.path, running, progress.shard, job.max_documents)
            if stage.rejected:
                why = "; ".join(f"not by {name}, because {reason}" for name, reason in stage.rejected.items())
                progress.say(f"encoding by {stage.backend}: {why}")
            results = merge(work.path, stage, prefix, stage.vocab_size, lambda: check_unchanged(files))
        finally:
            progress.finish()
    if not any(result.documents for result in results):
        left_out = {name: sum(getattr(result, name) for result in results) for name in ("empty", "filtered", "bad")}
        counts = ", ".join(f"{count} {name}" for name, count in left_out.items() if count) or "there is none"
        first = next((f" ({line})" for result in results for line in result.listed), "")
        raise ConfigError(
            f"no document with text in {', '.join(job.inputs)}: {counts}{first}. Look at --field and the filters."
        )
    if job.mds:
        _write_mds(prefix, f"{output}_mds")
    outcome = _outcome(results, prefix, tokenizer_path, stage)
    sizes = {name: os.path.getsize(f"{prefix}.{name}") for name in ("bin", "idx")}
    _write_json(recipe_path, {"recipe": recipe, "sizes": sizes, "outcome": asdict(outcome)})
    whole.pop_all()
    work.close(keep=False)
    Path(f"{tokenizer_path}.recipe").unlink(missing_ok=True)
    return outcome


def replace_prefix(outcome: Outcome, prefix: str | None) -> Outcome:
    """The outcome with another place of the data."""
    return replace(outcome, prefix=prefix)


def _train(job: Job, pieces: Sequence[Piece], path: str, recipe: dict[str, Any], progress: Progress) -> None:
    assert job.train_bpe is not None
    mark = Path(f"{path}.recipe")
    if os.path.exists(path) and mark.exists() and mark.read_text() == hash_json(recipe):
        return  # trained by an interrupted run
    progress.say(f"training a byte-level BPE of {job.train_bpe} on up to {job.training_megabytes:g} MB")
    size = train_byte_level_bpe(sample_texts(pieces, job.settings.field, job.training_megabytes), job.train_bpe, path)
    mark.write_text(hash_json(recipe))
    if size < job.train_bpe:
        progress.say(f"the text was only enough for {size} tokens")


def _recipe(job: Job, files: Sequence[Piece]) -> dict[str, Any]:
    """Everything that decides the output, except for the tokenizer's file itself, which is known by its fingerprint."""
    settings = asdict(job.settings)
    del settings["backend"]  # proven to make no difference
    recipe: dict[str, Any] = {
        "format": RECIPE_FORMAT,
        "inputs": list(job.inputs),
        "settings": {**settings, "languages": list(job.settings.languages), "special": list(job.settings.special)},
        "max_documents": job.max_documents,
    }
    if job.settings.tokenizer:
        recipe["fingerprint"] = compute_fingerprint(job.settings.tokenizer)
    else:
        recipe["train_bpe"], recipe["training_megabytes"] = job.train_bpe, job.training_megabytes
    if job.mds:
        recipe["mds"] = f"{job.output}_mds"
    if files:
        recipe["files"] = hash_json(stamp_files(files))
    else:
        recipe["corpus_megabytes"] = job.corpus_megabytes
    return recipe


def _already_done(path: str, recipe: dict[str, Any], prefix: str, tokenizer: str) -> Outcome | None:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        sizes = {name: os.path.getsize(f"{prefix}.{name}") for name in ("bin", "idx")}
        if content["recipe"] != recipe or content["sizes"] != sizes or not os.path.exists(tokenizer):
            return None
        if "mds" in recipe and not os.path.exists(os.path.join(recipe["mds"], "index.json")):
            return None
        outcome = content["outcome"]
        trips = outcome["round_trips"]
        return Outcome(
            **{
                **outcome,
                "tallies": {key: Tally(**tally) for key, tally in outcome["tallies"].items()},
                "losses": Losses(**outcome["losses"]),
                "round_trips": RoundTrips(**{**trips, "example": tuple(trips["example"])}),
                "reused": True,
            }
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_mds(prefix: str, folder: str) -> None:
    from megalm.data.formats.mds import write_token_documents

    shutil.rmtree(folder + ".partial", ignore_errors=True)
    file = TokenFile(prefix)
    write_token_documents(file, folder + ".partial", file.dtype.newbyteorder("="), hashes=["xxh64"])
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(folder + ".partial", folder)


def _outcome(results: Sequence[ShardResult], prefix: str, tokenizer: str, stage: ShardRun) -> Outcome:
    tallies: dict[str, Tally] = {}
    losses = Losses()
    for result in results:
        for key, tally in result.tallies.items():
            tallies.setdefault(key, Tally()).add(tally)
        losses.add(result.losses)
    listed = [line for result in results for line in result.listed]
    total = {
        name: sum(getattr(r, name) for r in results)
        for name in ("documents", "tokens", "input_bytes", "empty", "filtered", "bad")
    }
    return Outcome(
        prefix, tokenizer, stage.backend, stage.vocab_size, listed=listed, tallies=tallies, losses=losses,
        round_trips=stage.round_trips, **total,
    )  # fmt: skip


def _files(
    inputs: Sequence[str], output: str, results: Results, ends: contextlib.ExitStack, progress: Progress
) -> list[Piece]:
    """The input's files; a stream, which can be read only once, becomes a hidden file beside the output until the end, which
    no later run reads if this one is killed."""
    spooled = {}
    folder, name_of_output = os.path.split(output)
    for number, item in enumerate(inputs):
        if is_stream(item):
            found = spool(item, os.path.join(folder, f".{name_of_output}.stdin{number or ''}"))
            ends.callback(os.unlink, found.path)
            spooled[item] = found
    name = {found.path: "standard input" if item == "-" else item for item, found in spooled.items()}
    stamp = {found.path: found.stamp for found in spooled.values()}
    own = (*results.files, *results.folders)
    matches = find_files([spooled[item].path if item in spooled else item for item in inputs], progress.say, own)
    files = results.input_files(matches, progress.say)
    return [
        replace(f, name=name[f.path], source=name[f.path], stamp=stamp[f.path]) if f.path in name else f for f in files
    ]


def _results(job: Job, output: str) -> Results:
    """What the job writes.

    Errors: ConfigError if the folder of MDS shards, which is replaced, holds anything else.
    """
    names = ["_text_document.bin", "_text_document.idx", "_recipe.json"]
    if job.train_bpe is not None and not job.settings.tokenizer:
        names.append("_tokenizer.json")
    folders = [f"{output}.parts", *([f"{output}_mds"] if job.mds else [])]
    if job.mds and os.path.exists(folders[1]):
        others = [name for name in sorted(os.listdir(folders[1])) if not _OF_MDS.fullmatch(name)]
        if others:
            raise ConfigError(
                f"{folders[1]}, which the MDS shards replace, holds other files ({', '.join(others[:3])}): choose another "
                "output, or move them."
            )
    return Results(tuple(f"{output}{name}" for name in names), tuple(folders))


def _write_json(path: str, content: Any) -> None:
    with open(path + ".partial", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.replace(path + ".partial", path)


def tabulate_fertility(tallies: dict[str, Tally]) -> list[dict[str, Any]]:
    """One row a source and language, the largest first, and their sum: documents, tokens, bytes and characters per
    token."""
    rows = []
    whole = Tally()
    for key, tally in sorted(tallies.items(), key=lambda item: -item[1].bytes):
        source, language = key.split("\t")
        whole.add(tally)
        rows.append({"source": source, "language": language, **_figures(tally)})
    return [*rows, {"source": "all", "language": "-", **_figures(whole)}]


def _figures(tally: Tally) -> dict[str, Any]:
    tokens = max(tally.tokens, 1)
    return {
        "documents": tally.documents,
        "bytes": tally.bytes,
        "tokens": tally.tokens,
        "unknown": tally.unknown,
        "dropped": tally.dropped,
        "bytes_per_token": round(tally.bytes / tokens, 4),
        "characters_per_token": round(tally.characters / tokens, 4),
    }
