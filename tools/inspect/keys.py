"""Every configuration key: what it means, its default, its range, and what another value does to a run that goes on."""

import argparse
import json
from dataclasses import asdict

from megalm.config.reference import describe, list_keys, write_reference_page

HELP = "what configuration keys mean"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The keys to tell of, and in which form."""
    parser.add_argument("key", nargs="*", help="a key, or a group of keys (default: all groups)")
    parser.add_argument("--json", action="store_true", help="print all keys as one JSON list")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/reference.md")


def run(args: argparse.Namespace) -> int:
    """Print what was asked for. Errors: ConfigError for an unknown key."""
    if args.json:
        keys = [{**asdict(key), "effect": key.effect.value if key.effect else None} for key in list_keys()]
        print(json.dumps(keys, indent=2))
    elif args.markdown:
        print(write_reference_page(), end="")
    else:
        groups = dict.fromkeys(key.name.partition(".")[0] for key in list_keys())
        print("\n\n".join(describe(name) for name in args.key or groups))
    return 0
