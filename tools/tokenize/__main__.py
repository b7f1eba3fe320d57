"""Command line of `megalm tokenize`."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from megalm.config.errors import ConfigError
from megalm.corpus import python_corpus
from megalm.corpus.engine import make_engine
from megalm.corpus.fields import unescape_template
from megalm.corpus.losses import describe_losses
from megalm.corpus.token_import import import_tokens
from megalm.corpus.tokenize_corpus import Settings, ShardResult
from megalm.corpus.tokenize_job import Job, Outcome, Progress, run_job, tabulate_fertility
from megalm.corpus.tokenizer_training import TRAINING_MEGABYTES
from megalm.data.formats.foreign_tokens import RAW_TYPES
from megalm.tokenizer.tiktoken_ranks import NAMES as ENCODING_NAMES
from megalm.tokenizer.tokenizer import FAST_BACKENDS

from ..arguments import ArgumentParser
from ..engine_options import add_worker_arguments
from ..interruption import INTERRUPTED, interrupt_promptly
from ..subcommands import run_reporting


class ConsoleProgress(Progress):
    """A bar with MB/s and the time left on a terminal, plain lines elsewhere; both on standard error."""

    def __init__(self) -> None:
        self._plain = not sys.stderr.isatty()
        self._task: Any = None
        if not self._plain:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self.console = Console(stderr=True)
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
            self._bar = Bar(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=self.console)
        self._total = self._done = self._documents = 0
        self._started = self._spoken = 0.0

    def say(self, message: str) -> None:
        print(message, file=sys.stderr) if self._plain else self.console.print(message)

    def start(self, total_bytes: int) -> None:
        self._total, self._started = total_bytes, time.monotonic()
        if not self._plain:
            self._bar.start()
            self._task = self._bar.add_task("encoding", total=total_bytes)

    def shard(self, result: ShardResult) -> None:
        self._done += result.input_bytes
        self._documents += result.documents
        if self._task is not None:
            self._bar.update(self._task, advance=result.input_bytes)
        now = time.monotonic()
        if self._plain and (now - self._spoken > 5 or self._done >= self._total):
            speed = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / max(speed, 1.0)
            self.say(
                f"encoding: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB, {self._documents} documents, "
                f"{speed / 1e6:.1f} MB/s, {left:.0f} s left"
            )
            self._spoken = now

    def finish(self) -> None:
        if self._task is not None:
            self._bar.stop()


def make_parser() -> argparse.ArgumentParser:
    """All options of the tool."""
    p = ArgumentParser(
        prog="megalm tokenize",
        description="Turn text into a token file (PREFIX_text_document.bin and .idx, Megatron's format). An interrupted run "
        "goes on when the same command is given again; a finished one is not repeated.",
    )
    p.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files, folders, globs, fsspec URLs or - (standard input): .txt .jsonl .json .csv .tsv .parquet .arrow .feather, "
        f"also compressed by .gz .zst .bz2 .xz .lzma; or {python_corpus.NAME}: sources and documentation of the installed Python",
    )
    p.add_argument("--output", metavar="PREFIX", help="where to write; without it nothing is kept (see --report)")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.json, SentencePiece .model, .tiktoken, or a folder with one"
    )
    which.add_argument(
        "--train-bpe", type=int, metavar="N", help="train a byte-level BPE of N tokens: PREFIX_tokenizer.json"
    )
    which.add_argument(
        "--from-tokens",
        action="store_true",
        help="the inputs are token files of other programs: llm.c's .bin, .npy, datatrove's .ds, or raw ones (--token-type)",
    )
    p.add_argument("--token-type", choices=RAW_TYPES, help="of raw tokens, which have no header that says it")
    p.add_argument(
        "--end-id",
        type=int,
        metavar="N",
        help="number of the token that ends (or begins) documents in such files; without it a file, or a row of an array, is one",
    )
    p.add_argument(
        "--train-megabytes",
        type=float,
        default=TRAINING_MEGABYTES,
        metavar="MB",
        help="text to train it on (%(default)g)",
    )
    p.add_argument(
        "--corpus-megabytes",
        type=float,
        default=python_corpus.DEFAULT_MEGABYTES,
        metavar="MB",
        help=f"size of {python_corpus.NAME} (%(default)g)",
    )
    p.add_argument(
        "--field",
        default="text",
        help='key or column of the text, a path such as meta.text or messages.0.content, or a template: "{title}\\n\\n{body}" '
        "(%(default)s)",
    )
    p.add_argument(
        "--eos",
        metavar="TOKEN",
        help="name of the end-of-document token; default: the tokenizer's own. Of a .tiktoken file of no public encoding, "
        'which holds no control tokens, with its number: "<|end_of_text|>=128001"',
    )
    p.add_argument(
        "--special",
        action="append",
        default=[],
        metavar="TOKEN=NUMBER",
        help="a further control token of a .tiktoken file; may be given several times",
    )
    p.add_argument("--no-eos", action="store_true", help="do not end documents with a token")
    p.add_argument("--bos", action="store_true", help="begin documents with the tokenizer's begin token")
    p.add_argument(
        "--control-tokens",
        action="store_true",
        help="make control tokens of their names in the text, such as <|endoftext|>; by default they are text",
    )
    p.add_argument("--min-characters", type=int, default=1, metavar="N", help="leave out shorter documents")
    p.add_argument("--max-characters", type=int, metavar="N", help="leave out longer documents")
    p.add_argument("--max-documents", type=int, metavar="N", help="stop after N documents")
    p.add_argument(
        "--language-field",
        metavar="KEY",
        help="key or column with the document's language, for --languages and --report",
    )
    p.add_argument("--languages", nargs="+", default=[], metavar="CODE", help="keep only these")
    p.add_argument(
        "--skip-bad", action="store_true", help="leave out and list documents that cannot be read, instead of stopping"
    )
    add_worker_arguments(p)
    p.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "tokenizers", "sentencepiece", "tiktoken", *FAST_BACKENDS),
        help="library that encodes; auto: the fastest that gives the same ids as the format's own",
    )
    p.add_argument(
        "--tiktoken-pattern",
        metavar="REGEX",
        help="how text is split, for a .tiktoken file of no public encoding; or the name of one that splits so "
        f"({', '.join(ENCODING_NAMES)})",
    )
    p.add_argument(
        "--mds", action="store_true", help="also write MDS shards, a sample a document, to the folder PREFIX_mds"
    )
    p.add_argument(
        "--report", action="store_true", help="print documents, tokens and bytes per token by source and language"
    )
    p.add_argument("--json", action="store_true", help="print the outcome as JSON")
    return p


def make_job(args: argparse.Namespace) -> Job:
    """Make the job that the options describe."""
    if args.token_type is not None or args.end_id is not None:
        raise ConfigError("--token-type and --end-id are for token files of other programs: give --from-tokens, too.")
    if args.output is None and not (args.report or args.json):
        raise ConfigError("give --output PREFIX to write a token file, or --report to only measure.")
    if args.languages and not args.language_field:
        raise ConfigError("--languages needs --language-field, the key that holds each document's language.")
    settings = Settings(
        tokenizer=args.tokenizer or "",
        field=unescape_template(args.field),
        append_eos=not args.no_eos,
        prepend_bos=args.bos,
        eos=args.eos,
        min_characters=args.min_characters,
        max_characters=args.max_characters,
        language_field=args.language_field,
        languages=tuple(args.languages),
        skip_bad=args.skip_bad,
        backend=args.backend,
        tiktoken_pattern=args.tiktoken_pattern,
        control_tokens=args.control_tokens,
        special=tuple(args.special),
    )
    return Job(
        inputs=tuple(args.inputs),
        output=args.output,
        settings=settings,
        train_bpe=args.train_bpe,
        training_megabytes=args.train_megabytes,
        corpus_megabytes=args.corpus_megabytes,
        workers=max(args.workers, 1),
        max_documents=args.max_documents,
        mds=args.mds,
    )


def show(outcome: Outcome, report: bool, seconds: float) -> None:
    """The outcome for people."""
    if outcome.reused:
        print(
            f"{outcome.prefix}: already there, made by the same recipe: {outcome.documents} documents, "
            f"{outcome.tokens} tokens"
        )
    else:
        where = f"{outcome.prefix}.bin and .idx" if outcome.prefix else "nothing kept (no --output)"
        print(
            f"{where}: {outcome.documents} documents, {outcome.tokens} tokens of a vocabulary of {outcome.vocab_size} "
            f"(encoded by {outcome.backend}) in {seconds:.1f} s, "
            f"{outcome.input_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
        )
    for name, count in (("empty", outcome.empty), ("filtered out", outcome.filtered), ("skipped as bad", outcome.bad)):
        if count:
            print(f"{count} documents {name}")
    for line in outcome.listed:
        print(f"  {line}")
    if report:
        rows = tabulate_fertility(outcome.tallies)
        width = max(len(row["source"]) for row in rows)
        lossy = any(row["unknown"] or row["dropped"] for row in rows)
        print(
            f"{'source':{width}}  language  documents          bytes         tokens  bytes/token  characters/token"
            + "  unknown tokens  dropped characters" * lossy
        )
        for row in rows:
            print(
                f"{row['source']:{width}}  {row['language']:8}  {row['documents']:9}  {row['bytes']:13}  "
                f"{row['tokens']:13}"
                f"  {row['bytes_per_token']:11.3f}  {row['characters_per_token']:16.3f}"
                + f"  {row['unknown']:14}  {row['dropped']:18}"
                * lossy
            )


def import_and_show(args: argparse.Namespace) -> int:
    """Writes token files of other programs as a pair of ours."""
    if args.output is None:
        raise ConfigError("give --output PREFIX: --from-tokens writes a token file.")
    made = import_tokens(args.inputs, args.output, args.token_type, args.end_id)
    if args.json:
        print(json.dumps(asdict(made)))
    else:
        print(
            f"{made.prefix}.bin and .idx: {made.documents} documents, {made.tokens} tokens, from {', '.join(made.formats)}"
        )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input, 130 interrupted (the same command goes on)."""
    args = make_parser().parse_args(argv)

    def action() -> int:
        start = time.monotonic()
        if args.from_tokens:
            return import_and_show(args)
        job = make_job(args)
        make = partial(make_engine, args.engine, args.workers, args.engine_address)
        outcome = run_job(job, ConsoleProgress(), make)
        for line in describe_losses(outcome.losses, outcome.round_trips, outcome.documents):
            print(line, file=sys.stderr)
        if args.json:
            print(json.dumps({**asdict(outcome), "report": tabulate_fertility(outcome.tallies)}))
        else:
            show(outcome, args.report, time.monotonic() - start)
        return 0

    with interrupt_promptly():
        status = run_reporting(action)
    if status == INTERRUPTED and args.output:
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
