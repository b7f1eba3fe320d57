"""Command line of `megalm mix`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.config.phases import parse_quantity
from megalm.page.axis import format_count
from megalm.page.document import Table
from megalm.page.plots import Bars
from megalm.plan.mixture import (
    MOST_EPOCHS,
    Mixture,
    compare,
    measure_distance,
    parse_source,
    read,
    solve,
    write_data_yaml,
)
from megalm.plan.report import Report

from ..arguments import ArgumentParser
from ..subcommands import run_reporting

EPILOG = """examples:
  megalm mix web=2.4T@67% code=464B@100B wiki=4.87B@2x total=500B
  megalm mix mpt-30b llama                  compare two mixtures
  megalm mix mine.yaml --write conf/data/mine.yaml
  python -m megalm.launch +model=7b data=mine
  megalm mix --run +model=7b data=curriculum    the phases of a run, before it starts
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the arguments."""
    result = ArgumentParser(
        prog="megalm mix",
        description="Tokens, proportion and epochs of each source of a mixture; compares mixtures; writes the yaml for data=.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "words",
        nargs="+",
        metavar="MIX",
        help="a .yaml, .json or .csv file, an example (mpt-30b, llama), or sources NAME=AVAILABLE@WHAT and total=TOKENS",
    )
    result.add_argument(
        "--write", metavar="FILE", type=Path, help="write the yaml that data= reads, e.g. conf/data/mine.yaml"
    )
    result.add_argument(
        "--most-epochs", type=float, default=MOST_EPOCHS, help=f"refuse more epochs (default {MOST_EPOCHS:g})"
    )
    result.add_argument(
        "--run", action="store_true", help="MIX is a run's command line (+model=7b data=mine): show its data.phases"
    )
    result.add_argument("--json", action="store_true", help="print JSON; keys carry their units")
    result.add_argument("--html", metavar="FILE", help="also write a self-contained page with tables and plots")
    return result


def list_mixtures(words: Sequence[str], most_epochs: float) -> list[Mixture]:
    """List the mixtures that the command line names."""
    files = [word for word in words if "=" not in word]
    totals = [word.partition("=")[2] for word in words if word.startswith("total=")]
    sources = [parse_source(word) for word in words if "=" in word and not word.startswith("total=")]
    if len(totals) > 1:
        raise ConfigError("total= is given twice.")
    try:
        total = parse_quantity(totals[0]) if totals else None
    except ValueError:
        raise ConfigError(f"total={totals[0]}: tokens, such as 1T or 500B.") from None
    if total is not None and total <= 0:
        raise ConfigError(f"total={totals[0]}: tokens of the mixture must be above 0.")
    found = []
    for file in files:
        name, listed, own_total = read(file)
        found.append(solve(name, listed, total or own_total, most_epochs))
    if sources:
        found.append(solve("mixture", sources, total, most_epochs))
    return found


def tabulate_mixture(mixture: Mixture) -> Table:
    """One mixture."""
    rows = [
        (
            source.name,
            "-" if source.available is None else f"{source.available / 1e9:,.2f}",
            f"{100 * (source.proportion or 0):.2f}",
            "-" if source.tokens is None else f"{source.tokens / 1e9:,.2f}",
            "-" if source.epochs is None else f"{source.epochs:.2f}",
        )
        for source in mixture.sources
    ]
    whole = 100 * sum(source.proportion or 0.0 for source in mixture.sources)
    rows.append(("together", "", f"{whole:.2f}", "-" if mixture.total is None else f"{mixture.total / 1e9:,.2f}", ""))
    headers = ("source", "available (B tokens)", "proportion (%)", "tokens (B)", "epochs")
    return Table(mixture.name + (f": {format_count(mixture.total)} tokens" if mixture.total else ""), headers, rows)


def report(found: list[Mixture]) -> Report:
    """Every mixture's table, and the comparison of several."""
    blocks: list = [tabulate_mixture(mixture) for mixture in found]
    data: dict = found[0].as_dict() if len(found) == 1 else {"mixtures": [mixture.as_dict() for mixture in found]}
    if len(found) > 1:
        rows = [
            (name, *["-" if share is None else f"{100 * share:.2f}" for share in shares])
            for name, shares in compare(found)
        ]
        blocks.append(Table("proportions (%)", ("source", *[mixture.name for mixture in found]), rows))
        apart = [
            (f"{a.name} and {b.name}", measure_distance(a, b)) for i, a in enumerate(found) for b in found[i + 1 :]
        ]
        blocks += [f"{names}: {100 * share:.1f}% of the tokens come from elsewhere" for names, share in apart]
        data["distances"] = [{"mixtures": names, "share": share} for names, share in apart]
    blocks.append(
        Bars(
            "proportions",
            "%",
            [(mixture.name, [(s.name, 100 * (s.proportion or 0)) for s in mixture.sources]) for mixture in found],
        )
    )
    warnings = [warning for mixture in found for warning in mixture.warnings]
    return Report("mixture", data, blocks, warnings if len(found) > 1 or not warnings else warnings)


def run(argv: Sequence[str] | None) -> int:
    """Solve, print, write."""
    args = make_parser().parse_args(argv)
    if args.most_epochs <= 0:
        raise ConfigError(f"--most-epochs {args.most_epochs:g}: must be above 0.")
    if args.run:
        from .curriculum import report_curriculum

        return report_curriculum(args.words, args.most_epochs).show(as_json=args.json, page=args.html)
    found = list_mixtures(args.words, args.most_epochs)
    if args.write is not None:
        if len(found) != 1:
            raise ConfigError(f"--write writes one mixture; {len(found)} are given.")
        try:
            args.write.write_text(write_data_yaml(found[0]), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--write {args.write}: cannot be written ({error.strerror}).") from None
    answer = report(found)
    if args.write is not None:
        answer.blocks.append(f"wrote {args.write}; use it with data={args.write.stem} when it is in conf/data")
    return answer.show(as_json=args.json, page=args.html)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 when the input is wrong."""
    return run_reporting(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
