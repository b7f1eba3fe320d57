"""The options by which the data tools say where their stages run."""

import argparse
import os

from megalm.corpus.engine import ENGINES


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """`--workers`, `--engine` and `--engine-address`."""
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (%(default)s); the result is the same",
    )
    parser.add_argument(
        "--engine",
        default="local",
        choices=ENGINES,
        help="who runs the stages: a pool on this machine (%(default)s), Spark (`pip install pyspark`, Java 17) or Ray "
        "(`pip install ray`); the result is the same",
    )
    parser.add_argument(
        "--engine-address",
        metavar="URL",
        help="Spark's master or Ray's cluster; default: what spark-submit says, else one started on this machine",
    )
