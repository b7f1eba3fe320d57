"""Where tokens come from and in which order they are seen."""

import math
from dataclasses import dataclass, field

from megalm.config.effects import Aside, Content, Course, Fixed, Measured, Order
from megalm.config.errors import ConfigError
from megalm.config.fields import choice, number
from megalm.config.phases import PhaseConfig


@dataclass
class DataConfig:
    """Tokenized corpora in Megatron's .bin/.idx form, their proportions and their order."""

    train: Content[list[str]] = field(default_factory=list)
    """Prefixes of tokenized data sets (PREFIX.bin and PREFIX.idx)."""
    weights: Course[list[float] | None] = number(None, at_least=0)
    """Proportions of the sources; None: by their size."""
    phases: Course[list[PhaseConfig]] = field(default_factory=list)
    """A curriculum: phases one after another, each with its own length, mixture, sequence length and learning rate."""
    valid: Measured[str | None] = None
    """Prefix of a held-out data set; None: the last `holdout` share of every source's documents."""
    holdout: Order[float] = number(0.005, at_least=0, below=1)
    """Share of each source's documents kept for evaluation when `valid` is not given."""
    tokenizer: Measured[str | None] = None
    """Path of the tokenizer that made the data (to write samples and to check the vocabulary)."""
    order: Fixed[str] = choice("keyed", "megatron")
    """keyed: a pure function of (seed, step); megatron: Megatron-LM's own index order, for moved runs."""
    shuffle_window: Fixed[int] = number(0, at_least=0)
    """Samples that are read together, in random order, before others of the source come: for data in an object store that
    is larger than the cache; 0: each epoch shuffles the whole source."""
    split: Order[str | None] = None
    """order=megatron only: shares of training, validation and test as Megatron has them, '969,30,1'; None: by `holdout`."""
    packing: Order[str] = choice("stream", "documents", "best_fit", "pairs")
    """stream: one long text, attention sees over document ends; documents: kept apart by attention mask and positions;
    best_fit: kept apart, and whole documents packed together, none cut that fits into a sample;
    pairs: chosen and rejected answers, kept apart, both of a pair in one sample."""
    fim_rate: Order[float] = number(0.0, at_least=0, at_most=1)
    """Share of documents rearranged for fill-in-the-middle; code models take about 0.5."""
    fim_spm_rate: Order[float] = number(0.5, at_least=0, at_most=1)
    """Of these, the share with the suffix first (SPM); the others have the prefix first (PSM)."""
    fim_tokens: Order[list[str]] = field(default_factory=lambda: ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"])
    """Names in the tokenizer, or ids, of the marks before prefix, middle and suffix."""
    cache: Aside[str | None] = None
    """Folder on this machine for data that comes from an object store (s3://...); None: ~/.cache/megalm/data."""
    cache_gb: Aside[float] = number(10.0, above=0)
    """Gigabytes that folder may hold; what was used longest ago goes first."""
    retries: Aside[int] = number(5, at_least=1)
    """Tries of a request to an object store."""
    mds_bytes: Order[str] = choice("int64", "uint16", "int32", "uint32", "uint8")
    """Type of the tokens in MDS shards whose column is raw bytes."""
    prefetch: Aside[int] = number(4, at_least=0)
    """Batches prepared ahead by the background thread."""


def split_shares(split: str) -> list[float]:
    """Megatron's shares of training, validation and test.

    Errors: ConfigError for what is not up to three finite numbers, the first of them positive.
    """
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or shares[0] == 0:
        raise ConfigError(f"data.split={split}: give up to three shares, the first above 0, for example '969,30,1'.")
    return shares
