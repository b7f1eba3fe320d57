"""Which layouts there are: ways to spread a tiny model over at most eight ranks."""

import itertools
from dataclasses import asdict, dataclass, replace

from megalm.pipeline.schedule import KINDS

from ._models import GLOBAL_BATCH, MIXTURES

ZERO_STAGES = (0, 1, 2)
RECOMPUTE = ("none", "selective", "full")
CONTEXT_MODES = ("ring", "all_gather")


@dataclass(frozen=True)
class Layout:
    """One way to spread a model over ranks."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    expert_dispatch: str = "all_to_all"
    sequence: bool = False
    schedule: str = "1f1b"
    zero_stage: int = 0
    recompute: str = "none"
    context_mode: str = "ring"
    data_mode: str = "replicate"

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.data, self.tensor, self.pipeline, self.context

    @property
    def micro_batch_size(self) -> int:
        """Sequences that make 4 micro-batches of a data rank in a pipeline, else 2: that does not matter either."""
        return GLOBAL_BATCH // self.data // (4 if self.pipeline > 1 else 2)

    def overrides(self) -> list[str]:
        """The configuration of this layout."""
        parallel = [f"parallel.{name}={str(value).lower()}" for name, value in asdict(self).items()]
        return [*parallel, f"train.micro_batch_size={self.micro_batch_size}"]

    def __str__(self) -> str:
        words = [f"d{self.data} t{self.tensor} p{self.pipeline} c{self.context}"]
        words += [f"ep{self.expert} etp{self.expert_tensor}"] * (self.expert * self.expert_tensor > 1)
        words += [self.expert_dispatch] * (self.expert_dispatch != "all_to_all")
        words += ["sequence"] * self.sequence + [self.schedule] * (self.pipeline > 1)
        words += [f"zero{self.zero_stage}"] * (self.zero_stage > 0)
        words += [self.recompute] * (self.recompute != "none") + [self.context_mode] * (self.context > 1)
        words += [self.data_mode] * (self.data_mode != "replicate")
        return " ".join(words)


def list_layouts(full: bool = False) -> list[Layout]:
    """(data, tensor, pipeline, context) in {1, 2}^4 on at most 8 ranks, sequence parallelism on and off, each schedule.

    With `full` each of them with each ZeRO stage, recomputation and context mode; otherwise those are dealt out in
    turn, each schedule beginning at another one, so that every schedule meets every pair of ZeRO stage and
    recomputation.
    """
    layouts: list[Layout] = []
    pairs = list(itertools.product(RECOMPUTE, ZERO_STAGES))
    deals = {kind: itertools.cycle(pairs[2 * i :] + pairs[: 2 * i]) for i, kind in enumerate(KINDS)}
    alone = itertools.cycle(pairs)
    modes = itertools.cycle(CONTEXT_MODES)
    for data, tensor, pipeline, context in itertools.product((1, 2), repeat=4):
        if data * tensor * pipeline * context > 8:
            continue
        for sequence in (False, True) if tensor > 1 else (False,):
            for schedule in KINDS if pipeline > 1 else ("1f1b",):
                choices: list[tuple[str, int, str]]
                if full:
                    choices = list(
                        itertools.product(RECOMPUTE, ZERO_STAGES, CONTEXT_MODES if context > 1 else ("ring",))
                    )
                else:
                    recompute, zero = next(deals[schedule] if pipeline > 1 else alone)
                    choices = [(recompute, zero, next(modes) if context > 1 else "ring")]
                for recompute, zero, mode in choices:
                    layouts.append(
                        Layout(
                            data,
                            tensor,
                            pipeline,
                            context,
                            sequence=sequence,
                            schedule=schedule,
                            zero_stage=zero,
                            recompute=recompute,
                            context_mode=mode,
                        )  # fmt: skip
                    )
                if data > 1 and schedule == "1f1b" and sequence == (tensor > 1):
                    # torch's fully_shard in place of the sharded optimizer
                    recompute = RECOMPUTE[(tensor + pipeline + context) % 3]
                    layouts.append(
                        Layout(
                            data,
                            tensor,
                            pipeline,
                            context,
                            sequence=sequence,
                            recompute=recompute,
                            data_mode="fully_shard",
                        )
                    )
    return layouts


def fold_experts(model: str, layout: Layout, number: int) -> Layout:
    """The layout with its ranks dealt out over the experts of a mixture, another way for each number."""
    if model not in MIXTURES:
        return layout
    ranks, most = layout.data * layout.tensor * layout.context, 4
    pairs = [
        (expert, parts)
        for expert in (4, 2, 1)
        for parts in (1, 2, 4)
        if ranks % (expert * parts) == 0 and expert <= most
    ]
    expert, parts = pairs[number % len(pairs)]
    dispatch = "all_gather" if number % 5 == 4 else "all_to_all"
    return replace(layout, expert=expert, expert_tensor=parts, expert_dispatch=dispatch)
