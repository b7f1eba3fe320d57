"""The page that shows what rules would do: distributions, thresholds, texts from both sides."""

from collections.abc import Iterable, Sequence

from megalm.corpus.filter.job import Outcome
from megalm.corpus.filter.statistics import SHARES, Distribution, Side, Threshold
from megalm.page.document import Block, Facts, Fold, Heading, Table, render_page
from megalm.page.plots import Line, Lines, Mark

LIMIT = "#c0392b"


def render_statistics(
    outcome: Outcome,
    distributions: Iterable[Distribution],
    thresholds: Sequence[Threshold],
) -> str:
    """One self-contained page: the rules first, then every score with the limits that the rules set for it."""
    stays = outcome.documents - outcome.dropped
    blocks: list[Block] = [
        Facts(
            {
                "documents": f"{outcome.documents:,}",
                "stay": f"{stays / max(outcome.documents, 1):.1%}",
                "of the characters": f"{outcome.characters_left / max(outcome.characters, 1):.1%}",
                "changed": f"{outcome.changed:,}",
                "could not be read": f"{outcome.bad:,}",
            }
        ),
        _rules(outcome),
    ]
    for distribution in distributions:
        blocks += _score(distribution, [one for one in thresholds if one.column == distribution.column])
    return render_page("What the rules do", blocks)


def _rules(outcome: Outcome) -> Table:
    share = 100 / max(outcome.documents, 1)
    rows = [
        (
            name,
            f"{first * share:.2f}",
            f"{outcome.alone[name].drops * share:.2f}",
            f"{outcome.alone[name].only * share:.2f}",
        )
        for name, first in outcome.by_rule.items()
    ]
    note = "In the order of the rules. `first`: no rule before it dropped the document; `only`: no other rule would."
    return Table("Rules", ("rule", "first, %", "alone, %", "only, %"), rows, note)


def _score(found: Distribution, thresholds: Sequence[Threshold]) -> list[Block]:
    blocks: list[Block] = [Heading(found.column)]
    if not found.known:
        return [*blocks, "No document has a number here."]
    marks = [
        Mark(one.limit, "limit", f"{one.rule}: at {'least' if one.is_least else 'most'} {one.limit:g}", LIMIT)
        for one in thresholds
    ]
    total = found.counts.sum()
    middles = ((found.edges[1:] + found.edges[:-1]) / 2).tolist()
    below = (100 * found.counts.cumsum() / total).tolist()
    is_long = found.edges[0] >= 0 and found.edges[-1] - found.edges[-2] > 2 * (found.edges[2] - found.edges[1])
    log = "x" if is_long else ""
    histogram = Line("documents", list(zip(middles, (100 * found.counts / total).tolist(), strict=True)))
    lower = Line("at_least", list(zip(found.edges[1:].tolist(), below, strict=True)))
    upper = Line("at_most", [(edge, 100 - share) for edge, share in lower.points])
    label = f"{found.column} (mean {found.mean:.4g})"
    blocks.append(Lines("How it is distributed", label, "documents, %", [histogram], log, marks))
    blocks.append(Lines("What a limit would drop", found.column, "dropped, %", [lower, upper], log, marks))
    rows = [
        (f"{100 * share:g}", f"{low:.6g}", f"{high:.6g}")
        for share, low, high in zip(SHARES, found.below, found.above, strict=True)
    ]
    blocks.append(Table("Limits by what they drop", ("dropped, %", "at_least", "at_most"), rows))
    for one in thresholds:
        word = "at least" if one.is_least else "at most"
        blocks.append(Fold(f"{one.rule}: dropped, nearest to {word} {one.limit:g}", _texts(one.dropped)))
        blocks.append(Fold(f"{one.rule}: kept, nearest to {word} {one.limit:g}", _texts(one.kept)))
    return blocks


def _texts(side: Side) -> str:
    if not side.samples:
        return "There is none."
    shown = [f"{one.value:.6g}  {one.file}: {one.place}\n{one.text}" for one in side.samples]
    return "\n\n----\n\n".join(shown)
