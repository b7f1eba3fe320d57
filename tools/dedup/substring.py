"""Spans of tokens that occurred before, in any document of a token file."""

import argparse
import json

from tools.engine_options import add_worker_arguments

HELP = "spans of tokens of a token file that occurred before; they are cut out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PREFIX", help="prefix of a .bin/.idx pair")
    parser.add_argument("--length", type=int, default=50, help="tokens of the shortest span (%(default)s)")
    parser.add_argument("--output", metavar="PREFIX", help="write the token file without the spans here")
    parser.add_argument(
        "--removed", metavar="FILE", help="write what was cut, and where it was first, as JSON lines (with --output)"
    )
    add_worker_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run(args: argparse.Namespace) -> int:
    from megalm.config.errors import ConfigError
    from megalm.data.dedup.substring import cut_spans, repeated_token_spans
    from megalm.data.engine import make_engine
    from megalm.data.tokens import TokenFile

    if args.removed and not args.output:
        raise ConfigError("--removed lists what was cut out of --output: give both.")
    file = TokenFile(args.path)
    if args.output and str(file.prefix) in (args.output, f"{args.output}_text_document"):
        raise ConfigError(f"--output is the input {file.prefix}: write the result to another prefix.")
    folder = f"{args.output}.parts" if args.output else None
    with make_engine(args.engine, args.workers, args.engine_address) as engine:
        spans = repeated_token_spans(file, args.length, engine, folder)
    cut = sum(span.stop - span.start for span in spans)
    result = {"documents": file.num_documents, "tokens": file.num_tokens, "spans": len(spans), "tokens_cut": cut}
    if args.output:
        result = cut_spans(file, spans, args.output, args.removed)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{file.prefix}: {result['spans']} repeated spans of {args.length} tokens or more, {cut:,} of "
            f"{file.num_tokens:,} tokens ({cut / file.num_tokens:.1%})"
            + (f"; {args.output} is without them" if args.output else "")
        )
    return 0
