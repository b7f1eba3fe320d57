"""`megalm filter train`: a classifier out of good and bad texts."""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.files import write_whole

from ..arguments import ArgumentParser

if TYPE_CHECKING:
    from megalm.corpus.dedup.texts import Texts
    from megalm.corpus.filter.classifier import Quality


def make_training_parser() -> argparse.ArgumentParser:
    """Make the options."""
    parser = ArgumentParser(
        prog="megalm filter train",
        description="Train a quality classifier: which of two sets of texts does a text resemble?",
    )
    parser.add_argument("--good", nargs="+", required=True, metavar="INPUT", help="texts as they should be")
    parser.add_argument("--bad", nargs="+", required=True, metavar="INPUT", help="texts that are usual, or worse")
    parser.add_argument("--output", required=True, metavar="MODEL.safetensors", help="write the classifier here")
    parser.add_argument("--field", default="text", help="key or column of the text (%(default)s)")
    parser.add_argument("--max-documents", type=int, default=50_000, metavar="N", help="of each set (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    return parser


def train(args: argparse.Namespace) -> int:
    """Trains, writes the classifier, and prints how well it tells held-out texts apart."""
    from megalm.corpus.filter.classifier import gather_features, train_classifier

    if args.max_documents < 1:
        raise ConfigError(f"--max-documents is {args.max_documents}: give at least 1.")
    sets = [gather_features(_read(inputs, args.field), args.max_documents) for inputs in (args.good, args.bad)]
    classifier, quality = train_classifier(*sets)
    try:
        with write_whole(args.output) as file:
            file.write(classifier.encode(quality))
    except OSError as error:
        raise ConfigError(f"{args.output} cannot be written ({error.strerror}): choose another place.") from error
    print_quality(quality, args.json)
    return 0


def _read(inputs: Sequence[str], field: str) -> "Iterator[Texts]":
    from megalm.corpus.dedup.corpus import CorpusShard
    from megalm.corpus.documents import find_files
    from megalm.corpus.fields import unescape_template
    from megalm.corpus.filter.reading import read_documents

    pieces = tuple(find_files(inputs))
    shard = CorpusShard(0, pieces, unescape_template(field), False)
    return (documents.texts for documents in read_documents(shard, False))


def print_quality(quality: "Quality", as_json: bool) -> None:
    """AUC, accuracy, calibration, and thresholds by what they keep."""
    if as_json:
        print(json.dumps(dataclasses.asdict(quality)))
        return
    print(f"{quality.texts} held-out texts: AUC {quality.auc:.4f}, accuracy {quality.accuracy:.1%} at 0.5")
    print(f"calibration error {quality.calibration_error:.3f}; by predicted probability:")
    for one in quality.bins:
        print(f"  {one.predicted:.2f}: {one.good:.2f} are good, of {one.texts}")
    print("at_least   keeps of the bad   of the good")
    for rate, limit, kept in quality.thresholds:
        print(f"  {limit:.4f}  {rate:>16.0%}   {kept:>11.1%}")
