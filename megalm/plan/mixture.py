"""A mixture of data sources: from proportions, target tokens or epochs to all three, with warnings and the yaml."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megalm.config import ConfigError
from megalm.config.phases import parse_quantity

WARN_EPOCHS = 4.0
"""Repeating a source up to four times is nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""
MOST_EPOCHS = 40.0
"""Beyond about forty epochs repetition adds nothing (the same paper): such a mixture is refused."""
SUM_TOLERANCE = 0.005
"""Published proportions are rounded to a tenth of a percent: ten of them may miss 1 by half a percent."""
EXAMPLES = Path(__file__).with_name("mixtures")


@dataclass
class TokenSupply:
    """One source; what is None is worked out from the others."""

    name: str
    available: float | None = None
    """Tokens there are."""
    proportion: float | None = None
    """Share of the mixture, 0..1."""
    tokens: float | None = None
    """Tokens drawn from it."""
    epochs: float | None = None
    """Times that it is seen."""
    prefix: str | None = None
    """PREFIX of the tokenized data set (PREFIX.bin and PREFIX.idx)."""


@dataclass
class Mixture:
    """Sources with everything known that can be known."""

    name: str
    sources: list[TokenSupply]
    total: float | None
    """Tokens of the mixture."""
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """With units in the keys."""
        return {
            "mixture": self.name,
            "tokens": self.total,
            "available_tokens": _sum(source.available for source in self.sources),
            "sources": [
                {
                    "source": source.name,
                    "available_tokens": source.available,
                    "proportion": source.proportion,
                    "proportion_percent": None if source.proportion is None else 100 * source.proportion,
                    "tokens": source.tokens,
                    "epochs": source.epochs,
                    "prefix": source.prefix,
                }
                for source in self.sources
            ],
            "warnings": self.warnings,
        }


def solve(
    name: str, sources: Sequence[TokenSupply], total: float | None = None, most_epochs: float = MOST_EPOCHS
) -> Mixture:
    """Work out tokens, proportion and epochs of each source.

    Each source gives its available tokens and one of proportion, target tokens or epochs; or, of a published table,
    proportion and epochs, from which the available tokens follow. The total is given, or the sum of the targets.

    Errors: ConfigError for proportions that do not sum to 1, sources that say too little or contradict themselves,
    negative figures, and more epochs than `most_epochs`.
    """
    if not sources:
        raise ConfigError(f"{name}: a mixture needs at least one source.")
    for source in sources:
        _check(name, source)
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError(f"{name}: two sources have the same name.")
    if total is not None and not 0 < total < float("inf"):
        raise ConfigError(f"{name}: total={total:g}: tokens of the mixture must be above 0.")
    drawn = [_drawn(source) for source in sources]
    if total is None:
        total = _total(name, sources, drawn)
    answers = []
    for source, tokens in zip(sources, drawn, strict=True):
        share = source.proportion
        if tokens is None and share is not None and total is not None:
            tokens = share * total
        if share is None and tokens is not None and total is not None:
            share = tokens / total
        if share is None:
            raise ConfigError(
                f"{name}: {source.name} says neither its proportion, nor target tokens, nor epochs of known available tokens."
            )
        available, epochs = source.available, source.epochs
        if available is None and epochs and tokens is not None:
            available = tokens / epochs
        if epochs is None and available and tokens is not None:
            epochs = tokens / available
        answers.append(TokenSupply(source.name, available, share, tokens, epochs, source.prefix))
    shares = sum(source.proportion or 0.0 for source in answers)
    if abs(shares - 1) > SUM_TOLERANCE:
        raise ConfigError(
            f"{name}: the proportions sum to {shares:.4g}, not 1"
            f" ({', '.join(f'{s.name} {100 * (s.proportion or 0):.4g}%' for s in answers)})."
            " Change them, or give target tokens in their place."
        )
    mixture = Mixture(name, answers, total)
    for source in answers:
        if source.epochs is not None and source.epochs > most_epochs:
            raise ConfigError(
                f"{name}: {source.name} would be seen {source.epochs:.1f} times, and more than {most_epochs:g} epochs"
                " teach nothing new (Muennighoff et al. 2023): lower its proportion or the total, find more of it,"
                " or raise --most-epochs."
            )
        if source.epochs is not None and source.epochs > WARN_EPOCHS:
            mixture.warnings.append(
                f"{source.name}: {source.epochs:.2f} epochs; above {WARN_EPOCHS:g} repeated text teaches less than new text"
            )
    return mixture


def _check(name: str, source: TokenSupply) -> None:
    for what in ("available", "proportion", "tokens", "epochs"):
        value = getattr(source, what)
        if value is not None and not (0 <= value < float("inf")):
            raise ConfigError(f"{name}: {source.name}: {what} {value:g}: must be at least 0.")
    if source.available == 0:
        raise ConfigError(f"{name}: {source.name} has no tokens.")
    if source.proportion is not None and source.proportion > 1:
        raise ConfigError(f"{name}: {source.name}: proportion {source.proportion:g}: from 0 to 1 (or write 33.5%).")
    if source.tokens is not None and source.epochs is not None and source.available is not None:
        by_epochs = source.epochs * source.available
        if abs(by_epochs - source.tokens) > 0.02 * max(by_epochs, source.tokens):
            raise ConfigError(
                f"{name}: {source.name}: {source.tokens:g} tokens are not {source.epochs:g} epochs of"
                f" {source.available:g}: give one of them."
            )


def _drawn(source: TokenSupply) -> float | None:
    """Tokens of a source that follow without the total."""
    if source.tokens is not None:
        return source.tokens
    if source.epochs is not None and source.available is not None and source.proportion is None:
        return source.epochs * source.available
    return None


def _total(name: str, sources: Sequence[TokenSupply], drawn: list[float | None]) -> float | None:
    """The total when it is not given: the sum of the targets, or what a target and its proportion imply."""
    if all(tokens is not None for tokens in drawn):
        return sum(tokens for tokens in drawn if tokens is not None)
    implied = [t / s.proportion for s, t in zip(sources, drawn, strict=True) if t is not None and s.proportion]
    implied += [
        s.epochs * s.available / s.proportion
        for s in sources
        if s.epochs and s.available and s.proportion and s.tokens is None
    ]
    if implied:
        return sum(implied) / len(implied)
    if all(source.proportion is not None for source in sources):
        return None
    raise ConfigError(f"{name}: some sources give proportions and others targets: add the total (total=1T).")


def _sum(values: Any) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else float(sum(known))


def compare(mixtures: Sequence[Mixture]) -> list[tuple[str, list[float | None]]]:
    """(source, proportion in each mixture) over all their sources, largest first."""
    names = list(dict.fromkeys(source.name for mixture in mixtures for source in mixture.sources))
    rows = [
        (name, [next((s.proportion for s in mixture.sources if s.name == name), None) for mixture in mixtures])
        for name in names
    ]
    return sorted(rows, key=lambda row: -max(share or 0.0 for share in row[1]))


def measure_distance(first: Mixture, second: Mixture) -> float:
    """Total variation distance of two mixtures: the share of tokens that would have to change its source."""
    return sum(abs((a or 0.0) - (b or 0.0)) for _, (a, b) in compare([first, second])) / 2


def write_data_yaml(mixture: Mixture) -> str:
    """The yaml of conf/data that `data=NAME` reads: prefixes and weights."""
    lines = [f"# {mixture.name}: written by megalm mix" + (f"; {mixture.total:.4g} tokens" if mixture.total else "")]
    for source in mixture.sources:
        seen = f", {source.epochs:.2f} epochs" if source.epochs is not None else ""
        lines.append(f"#   {source.name}: {100 * (source.proportion or 0):.2f}%{seen}")
    whole = sum(source.proportion or 0.0 for source in mixture.sources)
    content = {
        "train": [source.prefix or source.name for source in mixture.sources],
        "weights": [round((source.proportion or 0.0) / whole, 8) for source in mixture.sources],
    }
    return "\n".join(lines) + "\n" + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def read(name: str) -> tuple[str, list[TokenSupply], float | None]:
    """(name, sources, total) of a mixture file (.yaml, .json or .csv) or of an example's name.

    Errors: ConfigError for what cannot be read.
    """
    path = Path(name)
    if not path.suffix and (EXAMPLES / f"{name}.yaml").is_file():
        path = EXAMPLES / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in EXAMPLES.glob("*.yaml")))
        raise ConfigError(
            f"{name}: cannot be read ({error.strerror}). Give a .yaml or .csv file, or an example: {known}."
        ) from None
    try:
        if path.suffix == ".csv":
            return path.stem, _from_csv(path, text), None
        content = yaml.safe_load(text)
        sources = [make_source(str(path), dict(entry)) for entry in content["sources"]]
        total = parse_quantity(content["total"]) if content.get("total") is not None else None
        return str(content.get("name") or path.stem), sources, total
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path}: not a mixture ({error}). Write `sources:` with name, available and one of"
            " proportion, tokens, epochs; and `total:`."
        ) from None


def make_source(where: str, entry: dict[str, Any]) -> TokenSupply:
    """Make a source out of a mapping; figures may be words such as 335B or 33.5%."""
    unknown = set(entry) - {"name", "available", "proportion", "tokens", "epochs", "prefix"}
    if unknown or "name" not in entry:
        raise ConfigError(
            f"{where}: a source has name, available, proportion, tokens, epochs, prefix; got {', '.join(map(str, entry))}."
        )
    figures = {
        key: parse_quantity(entry[key])
        for key in ("available", "proportion", "tokens", "epochs")
        if entry.get(key) is not None
    }
    return TokenSupply(str(entry["name"]), prefix=entry.get("prefix"), **figures)


def _from_csv(path: Path, text: str) -> list[TokenSupply]:
    sources = []
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        clean = {key.strip(): value.strip() for key, value in row.items() if key and value and value.strip()}
        entry: dict[str, Any] = {"name": clean.get("name") or clean.get("source")}
        for key, scale in (("available", 1.0), ("available_tokens", 1.0), ("available_tokens_B", 1e9)):
            if key in clean:
                entry["available"] = parse_quantity(clean[key]) * scale
        for key, scale in (("tokens", 1.0), ("tokens_B", 1e9), ("effective_tokens_B", 1e9)):
            if key in clean:
                entry["tokens"] = parse_quantity(clean[key]) * scale
        if "proportion" in clean:
            entry["proportion"] = clean["proportion"]
        if "proportion_percent" in clean:
            entry["proportion"] = float(clean["proportion_percent"]) / 100
        if "epochs" in clean and not ("tokens" in entry and "available" in entry):
            entry["epochs"] = clean["epochs"]
        sources.append(make_source(str(path), entry))
    return sources


def parse_source(word: str) -> TokenSupply:
    """NAME=AVAILABLE@WHAT on the command line: web=2.4T@33.5%, wiki=4.87B@2x, code=464B@100B; AVAILABLE may be ?.

    Errors: ConfigError for a word that is not of this form.
    """
    match = re.fullmatch(r"([^=]+)=([^@]+)@(.+)", word)
    try:
        if match is None:
            raise ValueError
        name, available, what = match.groups()
        known = None if available.strip() == "?" else parse_quantity(available)
        if what.endswith("x"):
            return TokenSupply(name, known, epochs=float(what[:-1]))
        number = parse_quantity(what)
        if what.endswith("%") or number <= 1:
            return TokenSupply(name, known, proportion=number)
        return TokenSupply(name, known, tokens=number)
    except ValueError:
        raise ConfigError(
            f"{word!r}: write NAME=AVAILABLE@WHAT, WHAT a proportion (33.5%), target tokens (335B) or epochs (2.5x),"
            " for example wiki=4.87B@4%; or name a .yaml file."
        ) from None
