"""The phases of a run as a table, before it starts."""

from collections.abc import Sequence

from megalm.config.errors import ConfigError
from megalm.page.document import Table
from megalm.page.plots import Bars, Lines
from megalm.plan.mixture import MOST_EPOCHS, WARN_EPOCHS
from megalm.plan.report import Report


def report_curriculum(overrides: Sequence[str], most_epochs: float = MOST_EPOCHS) -> Report:
    """What each phase of the run that these overrides describe draws from each source, and how it learns.

    Errors: ConfigError for what the run itself would refuse, for a run without phases, and for too many epochs.
    """
    from megalm.config.compose import compose_config
    from megalm.config.phases import list_configured_spans
    from megalm.data.openers import open_sources
    from megalm.data.phases import make_curriculum, tabulate_phases
    from megalm.launch.resolve import resolve_length
    from megalm.optim.lr import compute_phased_learning_rate

    config = compose_config(overrides)
    if not config.data.phases:
        raise ConfigError("this run has no data.phases: it is one phase with data.weights. See docs/data.md, Phases.")
    resolve_length(config)
    assert config.train.steps is not None
    found = list_configured_spans(config)
    sources = open_sources(config.data, config.model.seq_length)
    available = {source.name: source.train_tokens for source in sources}
    weights = {source.name: source.weight for source in sources}
    rows = tabulate_phases(make_curriculum(found, weights, available), available, config.train.steps)

    def rate(step: int) -> str:
        return f"{compute_phased_learning_rate(config.optim, found, step, found[-1].end_step):.2e}"

    lengths = [
        (
            span.phase.name,
            f"{span.first_step + 1:,}-{span.end_step:,}",
            f"{span.tokens:,}",
            span.seq_length,
            span.global_batch_size,
            span.phase.schedule or f"{config.optim.schedule} (the run's)",
            f"{rate(span.first_step)} - {rate(span.end_step - 1)}",
        )
        for span in found
    ]
    drawn = [
        (
            row["phase"],
            row["source"],
            f"{100 * row['share']:.2f}",
            f"{row['tokens']:,.0f}",
            "-" if row["epochs"] is None else f"{row['epochs']:.2f}",
            "-" if row["epochs_so_far"] is None else f"{row['epochs_so_far']:.2f}",
        )
        for row in rows
    ]
    final = {row["source"]: row["epochs_so_far"] or 0.0 for row in rows}
    for name, epochs in final.items():
        if epochs > most_epochs:
            raise ConfigError(
                f"{name} would be seen {epochs:.1f} times, and more than {most_epochs:g} epochs teach nothing new "
                "(Muennighoff et al. 2023): shorten the phases that use it, find more of it, or raise --most-epochs."
            )
    warnings = [
        f"{name}: {epochs:.2f} epochs; above {WARN_EPOCHS:g} repeated text teaches less than new text"
        for name, epochs in final.items()
        if epochs > WARN_EPOCHS
    ]
    stop = f"; this run stops after step {config.train.steps:,}" if config.train.steps < found[-1].end_step else ""
    by_phase = [
        (span.phase.name, [(row["source"], 100 * row["share"]) for row in rows if row["phase"] == span.phase.name])
        for span in found
    ]
    blocks: list[Table | Bars | Lines | str] = [
        Table(
            f"curriculum: {sum(span.tokens for span in found):,} tokens in {found[-1].end_step:,} steps{stop}",
            ("phase", "steps", "tokens", "sequence", "batch", "learning rate", "from - to"),
            lengths,
        ),
        Table("sources", ("phase", "source", "share (%)", "tokens", "epochs", "epochs so far"), drawn),
        Bars("proportions", "%", by_phase),
    ]
    return Report("curriculum", {"steps": config.train.steps, "rows": rows}, blocks, warnings)
