"""Converts model weights between megalm's runs, Hugging Face folders and Megatron-LM checkpoints.

    megalm convert SmolLM2-135M runs/smollm --to megalm
    megalm convert runs/first exported --to huggingface --verify
    megalm convert runs/first megatron --to megatron --tensor 2 --pipeline 2
    megalm convert runs/first runs/mixture --to megalm --upcycle 8 --verify
    megalm convert runs/first/checkpoints/step-1000 mean --average runs/first/checkpoints/step-1100 --to huggingface
    megalm convert reshard runs/first/checkpoints/step-00000100 merged

Tensors pass one by one, on the CPU; memory stays near one layer. At the end the target is opened again, and each tensor of
the source must be accounted for.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalm.checkpoint.errors import CheckpointError
from megalm.config.console import escape_what_cannot_be_written
from megalm.config.errors import ConfigError
from megalm.config.plugins import load_plugins
from megalm.convert.choices import FORMATS, SPELLINGS

from ..arguments import ArgumentParser
from ..model_options import DTYPES, read_dtype

TOLERANCE = 1e-3
"""Largest difference of fp32 logits for which two models count as the same (they are of the order of 10)."""


def make_parser() -> argparse.ArgumentParser:
    made = ArgumentParser("megalm convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "source", type=Path, help="a run's folder or checkpoint, a Hugging Face folder, or a Megatron-LM checkpoint"
    )
    made.add_argument("target", type=Path, help="a new or empty folder")
    made.add_argument("--to", choices=FORMATS, required=True)
    made.add_argument(
        "--from", dest="format", choices=FORMATS, help="the source's format (default: by what lies in the folder)"
    )
    made.add_argument("--dtype", choices=DTYPES, help="number format to write (default: each tensor's own)")
    made.add_argument(
        "--optimizer",
        action="store_true",
        help="also the optimizer's state: between megalm and Megatron's torch_dist (fully reshardable)",
    )
    made.add_argument(
        "--upcycle", type=int, default=0, metavar="N",
        help="to megalm: a mixture in which each MLP of the dense model is N experts; it computes the same",
    )  # fmt: skip
    made.add_argument(
        "--average", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="write the mean of the source's weights and those of these, of the same model",
    )  # fmt: skip
    made.add_argument("--top-k", type=int, default=2, help="with --upcycle: experts for a token (default 2)")
    made.add_argument(
        "--verify", action="store_true", help="read every weight back, and compare the logits of both sides"
    )
    made.add_argument("--json", action="store_true", help="print the check as JSON")
    made.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting of a Hugging Face config.json that is not known here, and that you know to be harmless",
    )
    hugging = made.add_argument_group("to huggingface")
    hugging.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json or a folder with tokenizer files (default: the model's own)"
    )
    hugging.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a safetensors file (default 5)")
    megatron = made.add_argument_group("to or from megatron")
    megatron.add_argument("--vocab-size", type=int, help="from: the tokenizer's vocabulary; cuts the padding off")
    megatron.add_argument(
        "--torch-dist", action="store_true", help="to: the layout-free format instead of mp_rank_* files"
    )
    megatron.add_argument("--tensor", type=int, default=1, help="to: tensor-parallel ranks")
    megatron.add_argument("--pipeline", type=int, default=1, help="to: pipeline stages")
    megatron.add_argument("--virtual", type=int, default=1, help="to: model chunks on each stage")
    megatron.add_argument(
        "--names", choices=SPELLINGS, default="te", help="to: generation of tensor names (default te)"
    )
    megatron.add_argument(
        "--pad-vocabulary", type=int, default=128, help="to: --make-vocab-size-divisible-by (default 128)"
    )
    return made


@contextmanager
def show_progress() -> Iterator:
    """A bar on stderr where that is a terminal; gives a function as `convert` wants it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    ) as bar:  # fmt: skip

        def begin(total: int):
            task = bar.add_task("converting", total=total)
            return lambda name, size: bar.update(task, advance=size, description=name[-40:])

        yield begin


def run(arguments: argparse.Namespace) -> int:
    from megalm.convert.run import Options, convert

    options = Options(
        to=arguments.to,
        dtype=read_dtype(arguments.dtype) if arguments.dtype else None,
        optimizer=arguments.optimizer,
        upcycle=arguments.upcycle,
        top_k=arguments.top_k,
        tokenizer=arguments.tokenizer,
        max_shard_bytes=int(arguments.max_shard_gb * 1e9),
        torch_dist=arguments.torch_dist,
        tensor=arguments.tensor,
        pipeline=arguments.pipeline,
        virtual=arguments.virtual,
        spelling=arguments.names,
        pad_vocabulary=arguments.pad_vocabulary,
    )
    with show_progress() as bar:
        source, report = convert(
            arguments.source,
            arguments.target,
            options,
            format=arguments.format,
            vocab_size=arguments.vocab_size,
            accept=arguments.accept,
            others=arguments.average,
            bits=arguments.verify,
            progress=bar,
        )
    answer = dataclasses.asdict(report)
    lines = report.lines()
    status = 0
    if arguments.verify:
        from megalm.generate.compare import measure_largest_difference

        model = source.model
        difference, first, second = measure_largest_difference(
            arguments.source, arguments.target, vocab_size=model.vocab_size, seq_length=model.seq_length
        )
        # An optimizer's fp32 weights are not those that the source computes with, which were rounded.
        rounded = options.dtype is not None or options.optimizer
        good = difference <= TOLERANCE or (rounded and difference == difference)
        verdict = (
            "the same function"
            if difference <= TOLERANCE
            else ("rounded to the new dtype" if options.dtype is not None else "the source's weights are rounded")
            if good
            else "NOT the same function"
        )
        lines.append(f"logits differ by at most {difference:.2g} (source by {first}, target by {second}): {verdict}")
        answer |= {"logits_difference": difference, "source_run_by": first, "target_run_by": second}
        status = 0 if good else 1
    if options.to == "megalm":
        lines += _next_steps(arguments.target, arguments.optimizer)
    print(json.dumps(answer, indent=2) if arguments.json else "\n".join(lines))
    return status


def _next_steps(folder: Path, optimizer: bool) -> list[str]:
    """What to type to train on from an imported model."""
    from megalm.config.saved import load_config
    from megalm.convert.native import MODEL

    tokenizer = load_config(folder / "config.yaml").data.tokenizer
    lines, data = [], "data.train=[PREFIX] data.tokenizer=FILE"
    if tokenizer is not None:
        lines.append(f"tokenize: megalm tokenize TEXT --tokenizer {tokenizer} --output data/mine")
        data = f"data.train=[data/mine_text_document] data.tokenizer={tokenizer}"
    load = f"checkpoint.load_path={folder}" if optimizer else f"checkpoint.load=weights checkpoint.load_path={folder}"
    lines.append(f"train on: megalm train +model={folder / MODEL} {load} {data}")
    return lines


def reshard(arguments: Sequence[str]) -> int:
    from megalm.convert.native import merge

    made = ArgumentParser(
        "megalm convert reshard",
        description="Merges a checkpoint, which may be spread over many ranks' files, into one file: weights, optimizer and the "
        "run's state in a folder that any layout resumes from; or, to a name ending in .safetensors, the weights alone.",
    )
    made.add_argument("source", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint")
    made.add_argument("target", type=Path, help="a new or empty folder, or FILE.safetensors")
    given = made.parse_args(arguments)
    with show_progress() as bar:
        count, size = merge(given.source, given.target, bar)
    print(f"{given.target}: {count} tensors, {size / 1e6:.1f} MB, none left over")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    escape_what_cannot_be_written()
    load_plugins()  # formats of theirs are choices, too
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return reshard(argv[1:]) if argv[:1] == ["reshard"] else run(make_parser().parse_args(argv))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
