"""Where tokens come from and in which order they are seen."""

from dataclasses import dataclass, field

from megalm.config.fields import choice
from megalm.config.phases import PhaseConfig


@dataclass
class DataConfig:
    """Tokenized corpora in Megatron's .bin/.idx form, their proportions and their order."""

    train: list[str] = field(default_factory=list)
    """Prefixes of tokenized data sets (PREFIX.bin and PREFIX.idx)."""
    weights: list[float] | None = None
    """Proportions of the sources; None: by their size."""
    phases: list[PhaseConfig] = field(default_factory=list)
    """A curriculum: phases one after another, each with its own length, mixture, sequence length and learning rate."""
    valid: str | None = None
    """Prefix of a held-out data set; None: the last `holdout` share of every source's documents."""
    holdout: float = 0.005
    """Share of each source's documents kept for evaluation when `valid` is not given."""
    tokenizer: str | None = None
    """Path of the tokenizer that made the data (to write samples and to check the vocabulary)."""
    order: str = choice("keyed", "megatron")
    """keyed: a pure function of (seed, step); megatron: Megatron-LM's own index order, for moved runs."""
    shuffle_window: int = 0
    """Samples that are read together, in random order, before others of the source come: for data in an object store that
    is larger than the cache; 0: each epoch shuffles the whole source."""
    split: str | None = None
    """order=megatron only: shares of training, validation and test as Megatron has them, '969,30,1'; None: by `holdout`."""
    packing: str = choice("stream", "documents", "best_fit")
    """stream: one long text, attention sees over document ends; documents: kept apart by attention mask and positions;
    best_fit: kept apart, and whole documents packed together, none cut that fits into a sample."""
    fim_rate: float = 0.0
    """Share of documents rearranged for fill-in-the-middle; code models take about 0.5."""
    fim_spm_rate: float = 0.5
    """Of these, the share with the suffix first (SPM); the others have the prefix first (PSM)."""
    fim_tokens: list[str] = field(default_factory=lambda: ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"])
    """Names in the tokenizer, or ids, of the marks before prefix, middle and suffix."""
    cache: str | None = None
    """Folder on this machine for data that comes from an object store (s3://...); None: ~/.cache/megalm/data."""
    cache_gb: float = 10.0
    """Gigabytes that folder may hold; what was used longest ago goes first."""
    retries: int = 5
    """Tries of a request to an object store."""
    mds_bytes: str = choice("int64", "uint16", "int32", "uint32", "uint8")
    """Type of the tokens in MDS shards whose column is raw bytes."""
    prefetch: int = 4
    """Batches prepared ahead by the background thread."""
