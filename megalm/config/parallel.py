"""How the work is laid out over ranks. No choice here changes the loss that a run follows."""

from dataclasses import dataclass

from megalm.config.effects import Aside
from megalm.config.fields import choice, number


@dataclass
class ParallelConfig:
    """Sizes of the mesh's axes and the way each is used; data x tensor x pipeline x context = world_size."""

    data: int | str = number("auto", at_least=1)
    """Data-parallel replicas; auto: what is left of the world."""
    tensor: int = number(1, at_least=1)
    """Ranks that share each matrix (Shoeybi et al. 2019)."""
    pipeline: int = number(1, at_least=1)
    """Ranks that the layers are cut over (Narayanan et al. 2021)."""
    virtual_pipeline: int = number(1, at_least=1)
    """Chunks of layers on each pipeline rank (interleaved and V schedules)."""
    context: int = number(1, at_least=1)
    """Ranks that each sequence is cut over."""
    expert: int = number(1, at_least=1)
    """Ranks that a layer's experts are spread over, folded over data x context x tensor (arXiv:2504.14960)."""
    expert_tensor: int = number(1, at_least=1)
    """Ranks that share each expert's matrices; expert x expert_tensor divides data x context x tensor."""
    expert_dispatch: str = choice("all_to_all", "all_gather")
    """How tokens come to their experts: each to the ranks that have them, or all tokens to all ranks of the experts."""
    expert_rows: int | None = number(None, at_least=1)
    """Rows that a rank's experts compute at a time; what lies between is then computed again in backward, so that the rank
    with the largest load needs no more. None: all at once, kept."""
    expert_imbalance: Aside[float] = number(1.5, at_least=1)
    """What the planner counts on: rows of the fullest rank of experts over the mean. router/max_load is what was measured."""
    sequence: bool = False
    """Sequence parallelism around tensor-parallel blocks (Korthikanti et al. 2022)."""
    schedule: str = choice("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v", "dualpipe-v")
    """Order of forward and backward passes over the pipeline."""
    zero_stage: int = number(0, at_least=0, at_most=2)
    """0: each replica holds all optimizer state; 1: it is split; 2: gradients too (ZeRO, arXiv:1910.02054)."""
    data_mode: str = choice("replicate", "fully_shard")
    """replicate: weights on every data rank; fully_shard: torch's fully_shard."""
    recompute: str = choice("none", "selective", "full")
    """Activations computed again in backward: none, the attention core, norms and activations, or whole layers."""
    context_mode: str = choice("ring", "all_gather")
    """How keys and values travel under context parallelism."""
    bucket_mb: float = number(25.0, above=0)
    """Megabytes of gradients that are reduced at a time, while backward goes on."""
    loss_chunk: int | None = number(None, at_least=0)
    """Positions whose logits are held at a time, their gradients made at once; 0: all; None: all while they take at most
    512 MB, else as many as take 64 MB, and no fewer than 256."""

    def loss_positions(self, positions: int, columns: int, bytes_each: int) -> int:
        """How many of a micro-batch's positions have their logits held at a time; `columns` is this rank's vocabulary."""
        if self.loss_chunk is not None:
            return min(self.loss_chunk, positions) or positions
        row = max(1, columns * bytes_each)
        return positions if positions * row <= 512 * 2**20 else min(positions, max(256, 64 * 2**20 // row))
