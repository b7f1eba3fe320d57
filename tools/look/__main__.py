"""Command line of `megalm look`."""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalm.config.errors import ConfigError
from megalm.corpus.dedup.files import write_whole

from ..arguments import ArgumentParser
from ..subcommands import run_reporting

if TYPE_CHECKING:
    from megalm.corpus.look.sample import Sample
    from megalm.corpus.look.view import View


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong input."""
    args = make_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    return run_reporting(lambda: run(args))


def make_parser() -> argparse.ArgumentParser:
    """Make the options."""
    parser = ArgumentParser(
        prog="megalm look",
        description="See what data holds, on a page of this machine (127.0.0.1): samples, search, sources side by side, "
        "distributions, clusters, repeats; label documents.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="DATA",
        help="texts as megalm tokenize takes them, or token files (a prefix, or a folder of MDS shards)",
    )
    parser.add_argument("--sample", type=int, default=2000, metavar="N", help="documents to show (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (%(default)s)")
    parser.add_argument("--field", default="text", help="key or column of the text (%(default)s)")
    parser.add_argument(
        "--by", default="", metavar="FIELD", help="field that names a document's source, such as meta.source"
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="of token files; default: the one left beside them"
    )
    parser.add_argument("--clusters", type=int, default=12, metavar="N", help="groups of texts (%(default)s)")
    parser.add_argument(
        "--labels",
        default="labels.jsonl",
        metavar="FILE",
        help="where labels are appended (%(default)s): a list for megalm filter's rule `labels`",
    )
    parser.add_argument(
        "--losses",
        metavar="FILE",
        help="JSON lines with key and loss of documents: the hardest and the easiest are shown",
    )
    parser.add_argument(
        "--index", metavar="FOLDER", help="build an index here while the page is open, for searches over everything"
    )
    parser.add_argument("--export", metavar="PAGE.html", help="write one page that needs nothing beside it, and end")
    parser.add_argument("--characters", type=int, default=2000, metavar="N", help="of a text that the page holds")
    parser.add_argument("--port", type=int, default=8766, help="of the page; 0: any that is free (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print what the page would show as JSON, and end")
    return parser


def run(args: argparse.Namespace) -> int:
    """Samples, measures, and serves, writes or prints."""
    from megalm.corpus.fields import unescape_template
    from megalm.corpus.look.labels import Labels
    from megalm.corpus.look.sample import sample_corpus
    from megalm.corpus.look.view import make_view, read_losses, render_page

    if args.clusters < 1 or args.characters < 1:
        raise ConfigError("--clusters and --characters must be 1 or more.")
    started = time.monotonic()
    labels = Labels(args.labels)
    losses = read_losses(args.losses) if args.losses else None
    field = unescape_template(args.field)
    sample = sample_corpus(args.inputs, args.sample, args.seed, field, args.by, args.tokenizer)
    view = make_view(sample, args.clusters, losses, args.characters)
    if args.json:
        print(json.dumps(view))
        return 0
    if args.export:
        page = render_page(view, {key: one.label for key, one in labels.latest.items()}, live=False)
        try:
            with write_whole(args.export) as file:
                file.write(page.encode("utf-8", "replace"))
        except OSError as error:
            raise ConfigError(f"{args.export} cannot be written ({error.strerror}): choose another place.") from error
        print(f"{args.export}: {len(sample.documents)} of {describe_size(sample)}")
        return 0
    return serve(args, sample, view, field, started)


def describe_size(sample: "Sample") -> str:
    """Describe how many documents there are."""
    about = "" if all(source.exact for source in sample.sources) else "about "
    return f"{about}{sample.documents_there:,} documents"


def serve(args: argparse.Namespace, sample: "Sample", view: "View", field: str, started: float) -> int:
    """Serves until interrupted; the index grows meanwhile."""
    from megalm.corpus.look.labels import Labels
    from megalm.corpus.look.search import Search
    from megalm.corpus.look.server import LookServer

    search = Search(sample.files, field, args.index) if sample.files else None
    server = LookServer(sample, view, Labels(args.labels), search, args.port)
    taken = time.monotonic() - started
    print(f"{describe_size(sample)}: {server.address} ({taken:.1f} s); Ctrl-C ends", flush=True)
    stop = threading.Event()
    builder = threading.Thread(target=search.build, args=(stop,), daemon=True) if search else None
    if builder:
        builder.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    stop.set()
    server.server_close()
    if builder:
        builder.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
