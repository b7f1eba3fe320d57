"""What a configuration leaves open, decided: the length in steps and the size of every mesh axis."""

import math
from dataclasses import replace

from megalm.config.chaos import check_chaos
from megalm.config.errors import ConfigError
from megalm.config.phases import list_configured_spans
from megalm.config.root import Config

TOKENS_PER_PARAMETER = 20
"""Compute-optimal training length, Hoffmann et al. 2022 (arXiv:2203.15556)."""


def resolve(config: Config, world_size: int) -> list[str]:
    """Fill in `train.steps`, `train.tokens`, `optim.warmup_steps`, `parallel.data` and `world_size`, in place.

    Returns sentences on values that had to become others than asked for.
    Errors: ConfigError for a layout that the world or the model does not allow, or a batch that does not divide.
    """
    from megalm.config.layout import check_layout

    config.parallel = check_layout(config.model, config.parallel, world_size)
    config.world_size = world_size
    check_chaos(config.resilience.chaos, world_size)
    resolve_batch(config)
    check_fp8(config)
    resolve_length(config)
    return resolve_warmup(config)


def fit_world(config: Config, ranks: int) -> Config | None:
    """The resolved configuration on as many ranks as the layout allows, at most `ranks`: only the data axis gives way.

    None where that leaves less than resilience.min_ranks (0: all that it has).
    """
    from megalm.config.layout import check_layout

    least = config.resilience.min_ranks or config.world_size or 1
    for size in range(min(ranks, config.world_size or 1), least - 1, -1):
        if size == config.world_size:
            return config
        found = replace(config, world_size=size, train=replace(config.train))
        try:
            found.parallel = check_layout(config.model, replace(config.parallel, data="auto"), size)
            resolve_batch(found)
        except ConfigError:
            continue
        return found
    return None


def resolve_warmup(config: Config) -> list[str]:
    """Fit the warm-up into the run; returns a sentence where those asked for, or the usual ones, are too many."""
    from megalm.optim.lr import USUAL_WARMUP, count_warmup_steps

    optim, found = config.optim, list_configured_spans(config)
    total = found[-1].end_step if found else config.train.steps
    assert total is not None
    asked, optim.warmup_steps = optim.warmup_steps, count_warmup_steps(optim, total)
    if optim.warmup_steps == (USUAL_WARMUP if asked is None else asked):
        return []
    what = f"the usual {USUAL_WARMUP} steps" if asked is None else f"optim.warmup_steps={asked}"
    verb = "do" if asked is None else "does"
    return [
        f"Warm-up: {optim.warmup_steps} step{'s' * (optim.warmup_steps != 1)}, because {what} {verb} not fit into a run of "
        f"{total}."
    ]


def resolve_batch(config: Config) -> None:
    """Check that the global batch is made of whole micro-batches, at least one for each data rank."""
    train, data = config.train, config.parallel.data
    assert isinstance(data, int)
    phases = [phase.global_batch_size for phase in config.data.phases if phase.global_batch_size]
    train.fit_micro_batch([train.global_batch_size, *phases], data)
    if train.global_batch_size % train.micro_batch_size:
        divisors = [n for n in range(1, train.global_batch_size + 1) if train.global_batch_size % n == 0]
        near = sorted(sorted(divisors, key=lambda n: abs(n - train.micro_batch_size))[:4])
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size}. Micro-batch sizes near it that divide: {', '.join(map(str, near))}."
        )
    parallel = config.parallel
    # Ranks of a mixture's experts run every pass together: with tokens for each other, in equal numbers of passes.
    if parallel.expert * parallel.expert_tensor > parallel.tensor * parallel.context:
        for size in (train.global_batch_size, *phases):
            _check_even(size, train.micro_batch_size, data)
    micro_batches = train.global_batch_size // train.micro_batch_size
    if micro_batches < data:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} makes {micro_batches} micro-batches of "
            f"{train.micro_batch_size}, fewer than the {data} data-parallel ranks: set train.micro_batch_size="
            f"{max(1, train.global_batch_size // data)} or train.global_batch_size={data * train.micro_batch_size}."
        )


def _check_even(global_batch: int, micro_batch: int, data: int) -> None:
    if global_batch % (micro_batch * data):
        each = micro_batch * data
        near = " or ".join(str(n) for n in (global_batch // each * each, -(-global_batch // each) * each) if n)
        raise ConfigError(
            f"a global batch of {global_batch} gives the {data} data ranks different numbers of micro-batches of "
            f"{micro_batch}, and ranks that share experts (parallel.expert) need equal ones: use {near}."
        )


def check_fp8(config: Config) -> None:
    """Check that there are products for precision.fp8, and that their rows, a rank's tokens of a micro-batch, fit them."""
    from megalm.architecture.products import choose_fp8_products
    from megalm.config.precision import find_multiple

    fp8, train = config.precision.fp8, config.train
    if not choose_fp8_products(config.model, fp8):
        return
    multiple, context = find_multiple(fp8.recipe), config.parallel.context
    for length in dict.fromkeys(
        [config.model.seq_length, *(span.seq_length for span in list_configured_spans(config))]
    ):
        tokens = length // context * train.micro_batch_size
        if tokens % multiple:
            over = f" over parallel.context={context} ranks" if context > 1 else ""
            raise ConfigError(
                f"a micro-batch of {train.micro_batch_size} sequences of {length} tokens{over} gives matrices of {tokens} rows, "
                f"and precision.fp8.recipe={fp8.recipe} multiplies matrices whose sizes are multiples of {multiple}: choose "
                "another train.micro_batch_size or model.seq_length, or precision=bf16."
            )


def resolve_length(config: Config) -> None:
    """Work out steps from tokens, tokens from steps, or both from the number of parameters."""
    train = config.train
    if config.data.phases:
        _resolve_phases(config)
        return
    tokens_per_step = train.global_batch_size * config.model.seq_length
    if train.steps is None:
        if train.tokens is None:
            from megalm.architecture.tensors import count_parameters

            train.tokens = float(TOKENS_PER_PARAMETER * count_parameters(config.model).total)
        train.steps = math.ceil(train.tokens / tokens_per_step)
    train.tokens = float(train.steps * tokens_per_step)


def _resolve_phases(config: Config) -> None:
    """Take the curriculum's length, or what `train.steps` leaves of it; check that its batches and sequences fit the layout."""
    from megalm.config.layout import check_layout

    train, found = config.train, list_configured_spans(config)
    for span in found:
        if span.seq_length != config.model.seq_length:
            check_layout(replace(config.model, seq_length=span.seq_length), config.parallel, config.world_size or 1)
        micro_batches, data = span.global_batch_size // train.micro_batch_size, config.parallel.data
        if isinstance(data, int) and micro_batches < data:
            raise ConfigError(
                f"data.phases ({span.phase.name}): global_batch_size={span.global_batch_size} makes {micro_batches} "
                f"micro-batches of {train.micro_batch_size}, fewer than the {data} data-parallel ranks."
            )
    total = found[-1].end_step
    if train.steps is None:
        train.steps = total
    if train.steps > total:
        raise ConfigError(
            f"train.steps={train.steps}, but data.phases end after {total}: leave train.steps out, or make the last "
            f"phase ({found[-1].phase.name}) longer."
        )
    train.tokens = float(
        sum(
            max(0, min(span.end_step, train.steps) - span.first_step) * span.seq_length * span.global_batch_size
            for span in found
        )
    )
