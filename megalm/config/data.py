"""Where tokens come from and in which order they are seen."""

from dataclasses import dataclass, field

from megalm.config.effects import Aside, Content, Course, Fixed, Measured, Order
from megalm.config.fields import choice
from megalm.config.phases import PhaseConfig


@dataclass
class DataConfig:
    """Tokenized corpora in Megatron's .bin/.idx form, their proportions and their order."""

    train: Content[list[str]] = field(default_factory=list)
    """Prefixes of tokenized data sets (PREFIX.bin and PREFIX.idx)."""
    weights: Course[list[float] | None] = None
    """Proportions of the sources; None: by their size."""
    phases: Course[list[PhaseConfig]] = field(default_factory=list)
    """A curriculum: phases one after another, each with its own length, mixture, sequence length and learning rate."""
    valid: Measured[str | None] = None
    """Prefix of a held-out data set; None: the last `holdout` share of every source's documents."""
    holdout: Order[float] = 0.005
    """Share of each source's documents kept for evaluation when `valid` is not given."""
    tokenizer: Measured[str | None] = None
    """Path of the tokenizer that made the data (to write samples and to check the vocabulary)."""
    order: Fixed[str] = choice("keyed", "megatron")
    """keyed: a pure function of (seed, step); megatron: Megatron-LM's own index order, for moved runs."""
    shuffle_window: Fixed[int] = 0
    """Samples that are read together, in random order, before others of the source come: for data in an object store that
    is larger than the cache; 0: each epoch shuffles the whole source."""
    split: Order[str | None] = None
    """order=megatron only: shares of training, validation and test as Megatron has them, '969,30,1'; None: by `holdout`."""
    packing: Order[str] = choice("stream", "documents", "best_fit")
    """stream: one long text, attention sees over document ends; documents: kept apart by attention mask and positions;
    best_fit: kept apart, and whole documents packed together, none cut that fits into a sample."""
    fim_rate: Order[float] = 0.0
    """Share of documents rearranged for fill-in-the-middle; code models take about 0.5."""
    fim_spm_rate: Order[float] = 0.5
    """Of these, the share with the suffix first (SPM); the others have the prefix first (PSM)."""
    fim_tokens: Order[list[str]] = field(default_factory=lambda: ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"])
    """Names in the tokenizer, or ids, of the marks before prefix, middle and suffix."""
    cache: Aside[str | None] = None
    """Folder on this machine for data that comes from an object store (s3://...); None: ~/.cache/megalm/data."""
    cache_gb: Aside[float] = 10.0
    """Gigabytes that folder may hold; what was used longest ago goes first."""
    retries: Aside[int] = 5
    """Tries of a request to an object store."""
    mds_bytes: Order[str] = choice("int64", "uint16", "int32", "uint32", "uint8")
    """Type of the tokens in MDS shards whose column is raw bytes."""
    prefetch: Aside[int] = 4
    """Batches prepared ahead by the background thread."""
