"""`python -m megalm.launch +model=NAME [group=choice] [key=value ...]`: compose -> validate -> plan -> run."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megalm.checkpoint.errors import CheckpointError
from megalm.config import Config, ConfigError, PrecisionConfig
from megalm.config.compose import compose_config, model_is_given
from megalm.config.console import escape_what_cannot_be_written
from megalm.config.groups import (
    find_conf_dir,
    find_group_files,
    find_own_files,
    find_search_path,
    list_groups,
    take_out_folders,
)
from megalm.config.saved import write_config_yaml
from megalm.config.words import read_words, take_out_search
from megalm.launch.forkserver import prepare_ranks
from megalm.launch.lock import refuse_if_held
from megalm.launch.options import read_options
from megalm.launch.resolve import resolve
from megalm.launch.run_folder import make_run_folder, remove_unused, run_folder
from megalm.launch.sweep import sweep, train_command
from megalm.launch.world import World, check_places, find_world

USAGE = """usage: python -m megalm.launch +model=NAME [group=choice ...] [key=value ...]

Trains a language model. Exit status: 0 done and saved; 1 it broke off, or could not be saved; 2 the configuration or input
is wrong; 3 the run gave up, with a report; 130 interrupted after a checkpoint (run the same command again to go on).

examples:
  python -m megalm.launch +model=tiny train.steps=200
  python -m megalm.launch +model=tiny world_size=2 parallel.tensor=2
  python -m megalm.launch +model=30b dry_run=true

groups (group=choice), from {conf}:
{groups}
options:
  --help KEY        what a key, or each key of a group, means: --help optim.lr, --help guard
  --cfg job         print the configuration that the words make, and stop
  --info            where configurations are looked for, and stop
  --config-dir DIR  a folder of your own with groups in it; looked at before $MEGALM_CONF, ./conf and megalm's own
  -m [--jobs N]     a run for each combination of values: -m +model=tiny optim.lr=1e-3,2e-3 train.seed=range(1,4)

Every key: docs/reference.md; its value in a run: runs/NAME/config.yaml.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    escape_what_cannot_be_written()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = read_options(arguments)
        if options.help:
            return show_help(options.words)
        if options.info:
            return show_search_path(options.words)
        if options.show:
            return show_configuration(options.words)
        return sweep(options, train_command) if options.several else launch(options.words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def show_help(words: Sequence[str]) -> int:
    """Print the usage, or what the named keys mean."""
    from megalm.config.reference import describe

    rest, folders = take_out_folders(words)
    names = [name for word in rest if (name := word.lstrip("+").partition("=")[0]) and name != "model"]
    if names:
        print("\n\n".join(describe(name) for name in names))
        return 0
    choices = "".join(
        f"  {group:<11} {' '.join(names)}\n" for group, names in list_groups(folders).items() if group != "experiment"
    )
    print(USAGE.format(conf=find_conf_dir(), groups=choices))
    return 0


def show_search_path(words: Sequence[str]) -> int:
    """Print the folders that choices are looked for in, the first first, and what each one gives."""
    _, folders = take_out_folders(words)
    files = find_group_files(folders)
    for folder in find_search_path(folders):
        own = [name for name, file in files.items() if file.is_relative_to(folder)]
        shown = f"{len(own)} choices" if folder == find_conf_dir() else ", ".join(own) or "no choice that counts"
        print(f"{folder}: {shown}")
    return 0


def show_configuration(words: Sequence[str]) -> int:
    """Print the configuration that the words make, as a run's config.yaml has it before the machine is known."""
    print(write_config_yaml(compose_config(expand_auto_layout(words))), end="")
    return 0


def expand_auto_layout(words: Sequence[str]) -> list[str]:
    """The words with a layout of the planner's in place of `parallel=auto`."""
    from megalm.plan.search import expand_auto

    return expand_auto(list(words))


def launch(arguments: Sequence[str]) -> int:
    """Compose, resolve, plan and start: all between command line and exit status. Errors: ConfigError."""
    from megalm.plan.fit import check_fits
    from megalm.plan.machine import find_machine, make_planned_machine, resolve_precision
    from megalm.plan.screen import plan_screen
    from megalm.plan.summary import plan

    if not model_is_given(arguments):
        raise ConfigError(_choose_a_model())
    config = compose_config(expand_auto_layout(arguments))
    world = find_world(config, os.environ)
    if not (world.external or config.dry_run):
        prepare_ranks(max(1, (os.cpu_count() or 1) // world.size))
    check_places(config, world)
    notes = resolve(config, world.size)
    machine = find_machine(config, world.size)
    if config.dry_run and machine.is_cpu and world.size > machine.cores:
        machine = make_planned_machine("h100", world.size)  # no machine is named, and this one cannot be meant
    resolve_precision(config, machine)
    planned = plan(config, machine)
    console = Console(quiet=world.rank != 0, width=None if sys.stdout.isatty() else 140)
    if config.dry_run:
        from megalm.launch.dry_run import describe_ranks

        console.print(plan_screen(planned))
        console.print(describe_ranks(config))
        return 0
    try:
        check_fits(config, machine)
    except ConfigError as error:
        console.print(plan_screen(planned))
        raise ConfigError(f"{error}\n\n{describe_what_it_takes(config)}") from None
    for note in [*notes, *_own(arguments)]:
        console.print(note, highlight=False)
    _check_data(config)
    folder = run_folder(config)
    new = not folder.exists()
    make_run_folder(folder)
    if not world.external:  # there, another rank of this very run may have it already
        refuse_if_held(folder, config.run.name)
    console.print(plan_screen(planned))
    status = 2
    try:
        status = _start(config, folder, world, planned.as_dict())
    finally:
        if status == 2 and new and not world.external:
            remove_unused(folder, config.run.name)
    return status


def _own(words: Sequence[str]) -> list[str]:
    """Say which choices come from files of the user's own, since a name may be one of megalm's, too."""
    rest, folders = take_out_folders(take_out_search(words)[0])
    return [
        f"{choice}: {file}"
        for choice, file in find_own_files(read_words(rest, list_groups(folders)).choices, folders).items()
    ]


def describe_what_it_takes(config: Config) -> str:
    """Say how many H100s hold the run at least, and how long it takes and what it costs on more of them."""
    from megalm.plan.machine import make_planned_machine
    from megalm.plan.render import format_duration
    from megalm.plan.search import search

    lines = []
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
        machine = make_planned_machine("h100", 8 * nodes)
        found = search(replace(config, precision=PrecisionConfig(dtype="bf16")), machine, top=1)
        if not found.best:
            continue
        best = found.best[0]
        assert config.train.steps is not None and machine.price is not None
        seconds = best.seconds * config.train.steps
        dollars = seconds / 3600 * machine.gpus * machine.price
        lines.append(
            f"  {machine.gpus:>5} H100-80GB   {format_duration(seconds):>12}   ${dollars:>13,.0f}   {best.layout.describe()}"
        )
        if len(lines) == 4:
            break
    if not lines:
        return "Not even 1,024 H100s hold it: see megalm plan search --help."
    assert config.train.tokens is not None
    return (
        f"What it takes, for {config.train.tokens:,.0f} tokens without failures (megalm plan search):\n\n"
        + "\n".join(lines)
    )


def _start(config: Config, folder: Path, world: World, plan: dict[str, Any]) -> int:
    """Be a rank where another launcher (torchrun, Slurm, ...) started this process as one; else supervise ranks of our own."""
    if world.external:
        from megalm.launch.worker import run_rank

        return run_rank(config, folder, world, plan)
    from megalm.launch.supervisor import supervise

    return supervise(config, folder, world.size, plan)


def _choose_a_model() -> str:
    from megalm.plan.machine import measure_this_machine
    from megalm.plan.models import tabulate_models
    from megalm.plan.render import format_gib

    machine = measure_this_machine()
    lines = [f"{'model':<12} {'parameters':>15} {'memory':>11}  fits here"]
    for row in tabulate_models(machine):
        fits = "yes" if row.fits else "no"
        lines.append(f"{row.name:<12} {row.parameters:>15,} {format_gib(row.bytes_needed):>11}  {fits}")
    return (
        "choose a model with +model=NAME, for example: python -m megalm.launch +model=tiny train.steps=200\n\n"
        + "\n".join(lines)
        + f"\n\nmemory: at least, to train on {machine.describe()}"
    )


def _check_data(config: Config) -> None:
    """Open every data set once, so that a missing or broken file is reported before any process starts."""
    from megalm.config.phases import list_configured_spans
    from megalm.data.fim import make_fill_in_the_middle
    from megalm.data.openers import open_sources
    from megalm.data.phases import make_curriculum
    from megalm.posttrain.prepare import check_tokenizer
    from megalm.tokenizer.tokenizer import load_tokenizer

    if config.objective.name == "policy":
        _check_rollout(config)
        return
    sources = open_sources(config.data, config.model.seq_length)
    make_fill_in_the_middle(config.data, config.train.seed, config.model.vocab_size)
    if config.data.phases:
        weights = {source.name: source.weight for source in sources}
        make_curriculum(
            list_configured_spans(config), weights, {source.name: source.train_tokens for source in sources}
        )
    if config.data.tokenizer is not None:
        tokenizer = load_tokenizer(config.data.tokenizer)
        for source in sources:
            check_tokenizer(str(source.file.prefix), tokenizer)
    _check_vocabulary(config)


def _check_rollout(config: Config) -> None:
    """Read the prompts, and start the reward functions once."""
    from megalm.parallel.mesh import Mesh
    from megalm.posttrain.rollout import RolloutSource

    _check_vocabulary(config)
    RolloutSource(config, Mesh.single()).close()


def _check_vocabulary(config: Config) -> None:
    from megalm.tokenizer.tokenizer import load_tokenizer

    if config.data.tokenizer is not None:
        size = load_tokenizer(config.data.tokenizer).vocab_size
        if size > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer {config.data.tokenizer} has {size} tokens, more than model.vocab_size="
                f"{config.model.vocab_size}: set model.vocab_size={-(-size // 128) * 128}, or tokenize with a smaller one."
            )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
