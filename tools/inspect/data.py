"""What a token file holds: documents, tokens, lengths, sampled documents with their places, the most repeated spans."""

import argparse
import json

HELP = "what a token file holds: documents, tokens, lengths, sampled documents, the most repeated spans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        help="prefix of the .bin/.idx pair (also with an ending, or without _text_document), or a folder of MDS shards; also "
        "by URL",
    )
    parser.add_argument(
        "--tokenizer", help="decode with this one; default: the one that tools/tokenize left beside the data"
    )
    parser.add_argument("--samples", type=int, default=3, help="documents to show (%(default)s)")
    parser.add_argument("--tokens", type=int, default=80, help="tokens of each to show (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which documents (%(default)s)")
    parser.add_argument(
        "--spans", type=int, default=5, help="repeated spans to show; 0: do not look for them (%(default)s)"
    )
    parser.add_argument(
        "--span-length", type=int, default=32, help="tokens of the shortest repeated span (%(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything and check the index and every token")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    from megalm.config.data import DataConfig
    from megalm.config.errors import ConfigError
    from megalm.data import look
    from megalm.data.openers import open_tokens
    from megalm.tokenizer.tokenizer import load_tokenizer

    if min(args.samples, args.spans) < 0 or min(args.tokens, args.span_length) < 1:
        raise ConfigError("--samples and --spans must be 0 or more, --tokens and --span-length 1 or more.")
    file = open_tokens(args.path, DataConfig())
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else look.find_tokenizer(file.prefix)
    if args.verify:
        file.verify(tokenizer.vocab_size if tokenizer else None)
    result = look.summarize(file)
    result["verified"] = args.verify
    result["samples"] = look.sample_documents(file, args.samples, args.seed, args.tokens, tokenizer)
    result["repeated_spans"] = look.find_repeated_spans(file, args.span_length, args.spans) if args.spans else []
    for span in result["repeated_spans"]:
        ids = file.read(span["token"], span["token"] + span["tokens"])
        span["text"] = tokenizer.decode(ids[: args.tokens]) if tokenizer else " ".join(map(str, ids[: args.tokens]))
    if args.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['prefix']}: {result['documents']:,} documents, {result['tokens']:,} tokens ({result['token_type']}, "
        f"{result['bytes'] / 1e6:,.1f} MB)" + (", verified" if args.verify else "")
    )
    print(
        f"length: mean {result['mean_length']:,.1f}, median {result['median_length']:,.0f}, longest {result['longest']:,}"
    )
    most = max(row["documents"] for row in result["histogram"])
    for row in result["histogram"]:
        bar = "#" * round(40 * row["documents"] / most)
        print(
            f"  {row['from']:>9,} .. {row['to'] - 1:<9,} {row['documents']:>11,} documents {row['tokens']:>15,} tokens  {bar}"
        )
    for row in result["samples"]:
        source = f" of {row['source']}" if "source" in row else ""
        place = f"{row['tokens']} tokens from token {row['token']} (byte {row['byte']})"
        print(f"\n--- document {row['document']}{source}: {place} ---")
        print(row["text"])
    for row in result["repeated_spans"]:
        print(f"\n--- {row['times']} times: {row['tokens']} tokens, for example from token {row['token']} ---")
        print(row["text"])
    return 0
