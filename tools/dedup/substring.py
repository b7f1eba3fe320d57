"""Spans that occurred before: of bytes in texts, of tokens in a token file."""

import argparse
import json
import os

from ..corpus_options import (
    ConsoleProgress,
    add_result_arguments,
    check_targets,
    open_corpus,
    parse_memory,
    print_unusual,
    report_unusual,
)

HELP = "spans of bytes of a text, or of tokens of a token file, that occurred before; they are cut out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="with --bytes: files, folders, globs or URLs; else the prefix of a .bin/.idx pair",
    )
    parser.add_argument("--bytes", type=int, metavar="N", help="search the texts; N: bytes of the shortest span")
    parser.add_argument(
        "--length", type=int, default=50, help="tokens of the shortest span in a token file (%(default)s)"
    )
    add_result_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return _cut_tokens(args) if args.bytes is None else _cut_texts(args)


def _cut_texts(args: argparse.Namespace) -> int:
    from megalm.corpus.dedup.spans import chunk_of
    from megalm.corpus.dedup.text_spans import cut_repeated_text

    with open_corpus(args, "substring", bytes=args.bytes) as corpus:
        cuts = cut_repeated_text(corpus, args.bytes, args.output, args.removed, chunk_of(corpus.share))
    result = {
        name: getattr(cuts, name) for name in ("documents", "documents_gone", "bytes", "spans", "bytes_cut", "bad")
    }
    if args.json:
        print(json.dumps({**result, **report_unusual(cuts.bad, cuts.listed, cuts.written)}))
        return 0
    print(
        f"{cuts.documents} documents, {cuts.spans} repeated spans of {args.bytes} bytes or more, {cuts.bytes_cut:,} of "
        f"{cuts.bytes:,} bytes ({cuts.bytes_cut / max(cuts.bytes, 1):.1%}), {cuts.documents_gone} documents are nothing else"
    )
    print_unusual(cuts.bad, cuts.listed, cuts.written)
    return 0


def _cut_tokens(args: argparse.Namespace) -> int:
    from megalm.config.errors import ConfigError
    from megalm.corpus.dedup.corpus import share_of
    from megalm.corpus.dedup.spans import chunk_of
    from megalm.corpus.dedup.substring import cut_spans, find_repeated_token_spans
    from megalm.corpus.engine import make_engine
    from megalm.corpus.results import Results
    from megalm.data.tokens import TokenFile

    if len(args.inputs) > 1 or (os.path.isfile(args.inputs[0]) and not args.inputs[0].endswith((".bin", ".idx"))):
        raise ConfigError(
            f"{' '.join(args.inputs[:3])}: without --bytes this takes the prefix of one .bin/.idx pair. To search texts, give "
            "the least number of bytes of a span, for example --bytes 200."
        )
    if args.removed and not args.output:
        raise ConfigError("--removed lists what was cut out of --output: give both.")
    check_targets(args)
    file = TokenFile(args.inputs[0])
    folder = f"{args.output}.parts" if args.output else None
    if args.output:
        written = (f"{args.output}.bin", f"{args.output}.idx", *filter(None, [args.removed]))
        Results(written, (f"{args.output}.parts",)).refuse_inputs((file.tokens_path, file.index_path))
    with make_engine(args.engine, args.workers, args.engine_address) as engine:
        chunk = chunk_of(share_of(parse_memory(args), engine))
        spans = find_repeated_token_spans(file, args.length, engine, folder, chunk, ConsoleProgress())
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
