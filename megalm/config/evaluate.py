"""Tasks that a run is asked while it trains."""

from dataclasses import dataclass

from megalm.config.fields import choice, number


@dataclass
class EvaluateConfig:
    """A suite asked of the weights under training, on the run's own layout."""

    every: int = number(0, at_least=0)
    """Steps between evaluations of the suite, and one at the end; 0: none. Training is the same to the bit either way."""
    suite: str = "smoke"
    """smoke (shipped), inner, core, gauntlet (megalm evaluate fetch NAME), or a file: a suite's or an lm-eval task's .yaml,
    or .jsonl."""
    protocol: str = choice("auto", "lm_eval", "gauntlet", "core", "olmes")
    """How items are asked and scored; auto: the way that the suite is meant for."""
    limit: int = number(200, at_least=0)
    """Only the first items of each task; 0: all."""
    data: str = "data/evaluation"
    """Folder of fetched sets."""
    batch_tokens: int = number(8192, at_least=1)
    """Tokens of one forward pass of a data rank; a pipeline takes the run's own micro-batches instead."""
