"""A layout: how a run's work is dealt over ranks, checked and resolved."""

from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from megalm.architecture.products import choose_fp8_products, list_products
from megalm.architecture.shape import resolve_shape
from megalm.architecture.tensors import count_elements, is_matrix, list_tensors
from megalm.config import Config, ConfigError, ModelConfig
from megalm.config.optim import STATES


def count_states(config: Config) -> float:
    """Count how many fp32 numbers the update rules keep beside each weight, on average over the model's weights.

    A rule for matrices alone (muon) leaves tables, the output matrix, norms, biases and routers to adamw.
    """
    own = len(STATES[config.optim.name])
    if config.optim.name != "muon":
        return float(own)
    every = list(list_tensors(config.model))
    matrices = sum(prod(shape) for name, shape in every if is_matrix(name, shape))
    total = count_elements(every)
    return (own * matrices + len(STATES["adamw"]) * (total - matrices)) / total


def count_orthogonal_steps(config: Config) -> int:
    """Newton-Schulz steps of a matrix's update."""
    return config.optim.muon.steps if config.optim.name == "muon" else 0


@dataclass(frozen=True)
class Narrow:
    """Which part of the layers' products is computed in 8-bit floats, and how."""

    recipe: str = "none"
    share: float = 0.0
    """Of the elements of the layers' matrices, those of experts left out: their products are emulated."""
    keeps_weights: bool = False
    """Weights lie beside themselves in 8 bits, in both orientations."""


def measure_narrow(config: Config) -> Narrow:
    """Measure what a configuration computes in 8-bit floats."""
    fp8 = config.precision.fp8
    chosen = choose_fp8_products(config.model, fp8)
    dense = [product for _, product in list_products(config.model) if product.split != "experts"]
    sizes = {product.name: product.rows * product.columns for product in dense}
    share = sum(size for name, size in sizes.items() if name in chosen) / max(sum(sizes.values()), 1)
    return Narrow(fp8.recipe, share, fp8.keep_weights and config.parallel.data_mode != "fully_shard" and share > 0)


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh's axes, the batches and the switches that decide memory and time."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    zero_stage: int = 0
    fully_shard: bool = False
    recompute: str = "none"
    micro_batch: int = 1
    global_batch: int = 1
    dtype: str = "bf16"
    states: float = 2.0
    """How many numbers the update rules keep beside each weight, fp32, on average over the model's weights."""
    expert_rows: int | None = None
    """Rows that a rank's experts compute at a time; None: all, kept for backward."""
    orthogonal_steps: int = 0
    """Newton-Schulz steps of every matrix's update (muon); 0: the rule has none."""
    narrow: Narrow = Narrow()
    """What is computed in 8-bit floats."""
    imbalance: float = 1.0
    """Rows of the fullest rank of experts over the mean."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def micro_batches(self) -> int:
        """Micro-batches that one data rank works through in a step (the last one may be smaller)."""
        return max(1, -(-self.global_batch // (self.data * self.micro_batch)))

    @property
    def shards(self) -> int:
        """Ranks that optimizer state is split over when it is split."""
        return self.data * self.context

    @property
    def expert_shards(self) -> int:
        """The same for the parameters of experts."""
        return max(1, self.data * self.context * self.tensor // (self.expert * self.expert_tensor))

    @property
    def weight_axes(self) -> tuple[int, int, int]:
        """The axes that a rank's parameters are counted by: tensor, expert, expert_tensor."""
        return self.tensor, self.expert, self.expert_tensor

    def describe(self) -> str:
        """One short line, only what differs from one rank."""
        parts = [
            f"{name} {size}"
            for name, size in (
                ("data", self.data),
                ("tensor", self.tensor),
                ("pipeline", self.pipeline),
                ("virtual", self.virtual),
                ("context", self.context),
                ("expert", self.expert),
                ("expert tensor", self.expert_tensor),
            )
            if size > 1
        ] or ["one rank"]
        if self.sequence and self.tensor > 1:
            parts.append("sequence")
        if self.pipeline > 1:
            parts.append(self.schedule)
        parts.append("fully sharded" if self.fully_shard else f"ZeRO-{self.zero_stage}")
        parts.append(f"recompute {self.recompute}")
        parts.append(f"micro-batch {self.micro_batch} x {self.micro_batches}")
        return ", ".join(parts)

    def overrides(self) -> list[str]:
        """The command-line overrides that choose this layout."""
        words = [
            f"parallel.data={self.data}",
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual}",
            f"parallel.context={self.context}",
            f"parallel.expert={self.expert}",
            f"parallel.expert_tensor={self.expert_tensor}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"parallel.schedule={self.schedule}",
            f"parallel.zero_stage={self.zero_stage}",
            f"parallel.data_mode={'fully_shard' if self.fully_shard else 'replicate'}",
            f"parallel.recompute={self.recompute}",
            f"train.micro_batch_size={self.micro_batch}",
            f"train.global_batch_size={self.global_batch}",
        ]
        return words

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "world": self.world, "micro_batches": self.micro_batches}


def read_layout(config: Config, gpus: int) -> Layout:
    """Read the layout that a configuration asks for on `gpus` ranks.

    Errors: ConfigError when the axes do not multiply to the ranks, with the nearest numbers that work.
    """
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if parallel.data == "auto":
        if gpus % model_ranks:
            below, above = gpus // model_ranks * model_ranks, -(-gpus // model_ranks) * model_ranks
            near = " or ".join(str(n) for n in (below, above) if n)
            raise ConfigError(
                f"{gpus} ranks cannot be dealt over tensor {parallel.tensor} x pipeline {parallel.pipeline} x context"
                f" {parallel.context} = {model_ranks}: use {near} ranks, or smaller axes."
            )
        data = gpus // model_ranks
    else:
        data = int(parallel.data)
        if data * model_ranks != gpus:
            raise ConfigError(
                f"parallel.data={data} x tensor {parallel.tensor} x pipeline {parallel.pipeline} x context"
                f" {parallel.context} = {data * model_ranks} ranks, but there are {gpus}:"
                f" set parallel.data=auto or start {data * model_ranks} ranks."
            )
    return Layout(
        states=count_states(config),
        data=data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        expert_rows=parallel.expert_rows,
        imbalance=parallel.expert_imbalance if config.model.moe.num_experts else 1.0,
        sequence=parallel.sequence,
        schedule=parallel.schedule,
        zero_stage=parallel.zero_stage,
        fully_shard=parallel.data_mode == "fully_shard",
        recompute=parallel.recompute,
        micro_batch=min(train.micro_batch_size, max(1, -(-train.global_batch_size // data))),
        global_batch=train.global_batch_size,
        dtype=config.precision.dtype,
        narrow=measure_narrow(config),
        orthogonal_steps=count_orthogonal_steps(config),
    )


def explain_indivisible(model: ModelConfig, layout: Layout, *, uneven: bool = False) -> list[str]:
    """Explain what does not divide, each with the nearest thing that does; empty when all is well.

    uneven: also take key/value heads that the tensor ranks do not divide, but that are enough for each to have one:
    it works, and the ranks with fewer wait for the others.
    """
    problems = []
    t, shape = layout.tensor, resolve_shape(model)
    kv = shape.num_kv_heads
    dealt = uneven and kv >= t
    if model.num_heads % t and not dealt:
        problems.append(
            f"num_heads {model.num_heads} by tensor {t}: tensor {_near_divisors(model.num_heads, t)} divide"
        )
    if kv % t and t % kv and not dealt:
        problems.append(f"num_kv_heads {kv} and tensor {t}: one must divide the other")
    width = shape.ffn_hidden_size
    if width % t:
        problems.append(f"ffn_hidden_size {width} by tensor {t}: tensor {_near_divisors(width, t)} divide")
    chunks = layout.pipeline * layout.virtual
    if chunks > model.num_layers:
        problems.append(
            f"num_layers {model.num_layers} over pipeline {layout.pipeline} x virtual {layout.virtual}:"
            f" at most {model.num_layers} chunks"
        )
    pieces = 2 * layout.context * (t if layout.sequence else 1)
    if layout.context > 1 and model.seq_length % pieces:
        problems.append(f"seq_length {model.seq_length} by 2 x context {layout.context} pieces ({pieces})")
    elif layout.sequence and t > 1 and model.seq_length % (layout.context * t):
        problems.append(
            f"seq_length {model.seq_length} by tensor {t} x context {layout.context} (sequence parallelism)"
        )
    if model.moe.num_experts:
        if model.moe.num_experts % layout.expert:
            problems.append(f"num_experts {model.moe.num_experts} by expert {layout.expert}")
        ranks, block = layout.data * layout.context * layout.tensor, layout.expert * layout.expert_tensor
        if ranks % block:
            problems.append(f"data x context x tensor {ranks} by expert x expert tensor {block}")
        if shape.expert_ffn_hidden_size % layout.expert_tensor:
            problems.append(f"an expert's width {shape.expert_ffn_hidden_size} by expert tensor {layout.expert_tensor}")
    elif layout.expert * layout.expert_tensor > 1:
        problems.append(f"expert {layout.expert} x {layout.expert_tensor} in a dense model: 1")
    if layout.global_batch < layout.data:
        problems.append(
            f"global batch {layout.global_batch} over data {layout.data}: at least one sequence a data rank"
        )
    if layout.schedule == "interleaved" and layout.micro_batches % layout.pipeline:
        problems.append(f"interleaved schedule: {layout.micro_batches} micro-batches by pipeline {layout.pipeline}")
    return problems


def _near_divisors(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    near = sorted(divisors, key=lambda d: abs(d - wanted))[:2]
    return " or ".join(map(str, sorted(near)))


def shrink_to_one_rank(config: Config) -> Layout:
    """The layout of the same run on one rank."""
    return replace(read_layout(config, 1), data=1)
