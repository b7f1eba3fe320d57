"""Every valid layout of a model on a machine, pruned by memory, ranked by predicted step time, each with its reasons."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from megalm.config import Config, ModelConfig
from megalm.config.words import take_out_search
from megalm.plan.fit import format_gib
from megalm.plan.layout import Layout, count_orthogonal_steps, explain_indivisible, measure_narrow
from megalm.plan.machine import Machine
from megalm.plan.memory import PARTS as MEMORY_PARTS
from megalm.plan.memory import MemoryEstimate, count_guard_snapshots, estimate_layout
from megalm.plan.models import find_largest_fitting, measure_fit
from megalm.plan.stages import count_stage_layers
from megalm.plan.time import PARTS as TIME_PARTS
from megalm.plan.time import StepTime, estimate_step_time

RECOMPUTE = ("none", "selective", "full")
EXACT = 24
"""Of the fastest by closed forms, how many pipelines are simulated before the final ranking."""


@dataclass
class Candidate:
    """One layout with its figures."""

    layout: Layout
    time: StepTime
    memory: MemoryEstimate
    fits: bool
    reason: str = ""
    name: str = ""

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return self.time.total

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **({"name": self.name} if self.name else {}),
            "layout": self.layout.as_dict(),
            "overrides": self.layout.overrides(),
            "step_seconds": self.seconds,
            "bytes_per_gpu": round(self.memory.bytes_per_gpu),
            "fits": self.fits,
            "time": self.time.as_dict(),
            "reason": self.reason,
        }


@dataclass
class SearchResult:
    """The ranking, the obvious alternatives, and how many layouts were looked at."""

    model: ModelConfig
    machine: Machine
    global_batch: int
    best: list[Candidate]
    alternatives: list[Candidate]
    considered: int
    too_large: int
    dominated: int
    smallest: Candidate | None = field(default=None)

    def why_none(self) -> str:
        """Why there is no layout at all, and what would work."""
        if self.smallest is None:
            return (
                f"no layout divides: {self.machine.gpus} ranks, {self.model.num_layers} layers, {self.model.num_heads} heads,"
                f" a global batch of {self.global_batch}. Use a number of ranks with more small factors, or a larger batch."
            )
        needed, there = self.smallest.memory.bytes_per_gpu, self.machine.memory
        more = next(
            (
                n
                for k in range(1, 12)
                if measure_fit(self.model, self.machine.with_gpus(n := self.machine.gpus * 2**k))[0]
            ),
            None,
        )
        largest = find_largest_fitting(self.machine)
        return (
            f"{self.model.name} fits {self.machine.describe()} in no layout: the most frugal one needs {format_gib(needed)} a"
            f" rank, and there are {format_gib(there)} ({self.smallest.layout.describe()})."
            + (f" {more} ranks would do." if more and not self.machine.is_cpu else "")
            + (f" The largest model of conf/model that fits here is {largest}." if largest else "")
        )


def search(
    config: Config,
    machine: Machine,
    *,
    top: int = 10,
    micro_batch: int | None = None,
    fixed: dict[str, Any] | None = None,
) -> SearchResult:
    """Rank every valid layout of a configuration's model on a machine by predicted step time.

    fixed: fields of Layout that are not to be chosen, such as {"tensor": 4, "recompute": "full"}.
    """
    return _Search(config, machine, top, micro_batch, fixed or {}).run()


FIXABLE = {
    "data": "data", "tensor": "tensor", "pipeline": "pipeline", "virtual_pipeline": "virtual", "context": "context",
    "expert": "expert", "expert_tensor": "expert_tensor",
    "sequence": "sequence", "schedule": "schedule", "zero_stage": "zero_stage", "recompute": "recompute",
}  # fmt: skip
"""parallel.KEY -> field of Layout, for what a command line may hold on to while the rest is searched."""


def list_fixed(overrides: Sequence[str], config: Config) -> dict[str, Any]:
    """Fields of Layout that `parallel.KEY=...` overrides have fixed, with the values of the composed configuration."""
    keys = [
        word.lstrip("+").partition("=")[0].partition(".")[2]
        for word in overrides
        if word.lstrip("+").startswith("parallel.")
    ]
    fixed = {FIXABLE[key]: getattr(config.parallel, key) for key in keys if key in FIXABLE}
    return {field: value for field, value in fixed.items() if value != "auto"}


def choose_auto_overrides(config: Config, machine: Machine, fixed: dict[str, Any] | None = None) -> list[str]:
    """Choose the command-line overrides of the fastest layout that fits: what `parallel=auto` means.

    Errors: ConfigError when none fits.
    """
    from megalm.config import ConfigError

    result = search(config, machine, top=1, fixed=fixed)
    if not result.best:
        raise ConfigError(result.why_none())
    return result.best[0].layout.overrides()


def expand_auto(overrides: list[str]) -> list[str]:
    """Command-line overrides with `parallel=auto` replaced by the fastest layout that fits; others come back as they are.

    What the command line says of parallel.* is held on to while the rest is searched.

    Errors: ConfigError when no layout fits.
    """
    given, searched = take_out_search(overrides)
    if not searched:
        return overrides
    from megalm.config.compose import compose_config
    from megalm.plan.machine import find_machine, resolve_precision

    config = compose_config(given)
    machine = find_machine(config)
    resolve_precision(config, machine)
    return [*choose_auto_overrides(config, machine, list_fixed(given, config)), *given]


class _Search:
    def __init__(
        self, config: Config, machine: Machine, top: int, micro_batch: int | None, fixed: dict[str, Any]
    ) -> None:
        self.fixed = fixed
        self.config, self.model, self.machine, self.top = config, config.model, machine, top
        self.batch = config.train.global_batch_size
        self.micro_batch = micro_batch
        self.snapshots = count_guard_snapshots(config)
        self.bucket = config.parallel.bucket_mb * 1e6
        self.considered = self.too_large = self.dominated = 0
        self.smallest: Candidate | None = None

    def run(self) -> SearchResult:
        found: list[Candidate] = []
        for mesh in self.list_meshes():
            for family in self.list_families(mesh):
                found.extend(self.list_members(family))
        found.sort(key=lambda candidate: (candidate.seconds, candidate.memory.bytes_per_gpu))
        finalists = [self.evaluate(c.layout, exact=True) for c in found[: max(EXACT, self.top)]]
        finalists.sort(key=lambda candidate: (candidate.seconds, candidate.memory.bytes_per_gpu))
        best = finalists[: self.top]
        alternatives = self.alternatives(best[0]) if best else []
        for rank, candidate in enumerate(best):
            other = best[1] if rank == 0 and len(best) > 1 else best[0]
            candidate.reason = (
                explain_win(candidate, other) if rank == 0 else explain_defeat(candidate, best[0], self.machine)
            )
        return SearchResult(
            self.model, self.machine, self.batch, best, alternatives, self.considered, self.too_large, self.dominated,
            self.smallest,
        )  # fmt: skip

    def list_meshes(self) -> Iterator[Layout]:
        """List every way to deal the ranks over tensor, pipeline, context, expert and data that divides."""
        ranks, node = self.machine.gpus, self.machine.accelerator.gpus_per_node
        dtype, narrow = self.config.precision.dtype, measure_narrow(self.config)
        experts = _divisors(self.model.moe.num_experts) if self.model.moe.num_experts else [1]
        for tensor in _divisors(ranks):
            if tensor > node or self.model.num_heads % tensor:
                continue
            for context in _divisors(ranks // tensor):
                if context > 1 and self.model.seq_length // context < 2048:
                    continue
                for pipeline in _divisors(ranks // tensor // context):
                    data = ranks // tensor // context // pipeline
                    if pipeline > self.model.num_layers or data > self.batch:
                        continue
                    parts = sorted({1, tensor}) if self.model.moe.num_experts else [1]
                    for expert, expert_tensor in product(experts, parts):
                        layout = Layout(
                            data=data, tensor=tensor, pipeline=pipeline, context=context, expert=expert,
                            expert_tensor=expert_tensor, sequence=tensor > 1, global_batch=self.batch, dtype=dtype,
                            narrow=narrow, orthogonal_steps=count_orthogonal_steps(self.config),
                            imbalance=self.config.parallel.expert_imbalance if expert > 1 else 1.0,
                        )  # fmt: skip
                        if "sequence" in self.fixed:
                            layout = replace(layout, sequence=self.fixed["sequence"])
                        axes = ("data", "tensor", "context", "pipeline", "expert", "expert_tensor")
                        if self._allowed(layout, *axes) and not explain_indivisible(self.model, layout):
                            yield layout

    def _allowed(self, layout: Layout, *names: str) -> bool:
        return all(getattr(layout, name) == self.fixed.get(name, getattr(layout, name)) for name in names)

    def list_families(self, mesh: Layout) -> Iterator[Layout]:
        """Schedules, chunks and micro-batches of a mesh."""
        schedules: list[tuple[str, int]] = [("1f1b", 1)]
        if mesh.pipeline > 1:
            most = self.model.num_layers // mesh.pipeline
            schedules += [("zb-h1", 1)]
            if most >= 2:
                schedules += [("zb-v", 2), ("dualpipe-v", 2)]
            schedules += [("interleaved", chunks) for chunks in _divisors(most) if 2 <= chunks <= 8]
            schedules = [(kind, chunks) for kind, chunks in schedules if self._even(mesh.pipeline * chunks)]
        share = self.batch // mesh.data
        sizes = [self.micro_batch] if self.micro_batch else [2**k for k in range(8)]
        for kind, chunks in schedules:
            for size in sizes:
                if size <= share and (self.batch % (mesh.data * size) == 0 or size == 1):
                    family = replace(mesh, schedule=kind, virtual=chunks, micro_batch=size)
                    if self._allowed(family, "schedule", "virtual"):
                        yield family

    def _even(self, stages: int) -> bool:
        """Whether the layers can be cut so that no stage has twice the layers of the others."""
        return (
            stages <= self.model.num_layers and max(cut := count_stage_layers(self.model, stages)) <= 2 * min(cut) + 1
        )

    def list_members(self, family: Layout) -> Iterator[Candidate]:
        """ZeRO stages and recompute modes of a family: a costlier one only where the cheaper does not fit.

        Recomputing never saves time, and a higher ZeRO stage never does, so what fits without them dominates.
        """
        shardings: list[dict[str, Any]] = [{"zero_stage": 1 if family.shards > 1 else 0}]
        if family.shards > 1:
            shardings.append({"zero_stage": 2})
            if family.pipeline == 1 and family.tensor == 1 and family.context == 1 and not self.machine.is_cpu:
                shardings.append({"zero_stage": 2, "fully_shard": True})
        stage, mode = self.fixed.get("zero_stage"), self.fixed.get("recompute")
        if stage is not None:
            shardings = [sharding for sharding in shardings if sharding["zero_stage"] == stage] or [
                {"zero_stage": stage}
            ]
        for index, sharding in enumerate(shardings):
            for number, recompute in enumerate([mode] if mode else RECOMPUTE):
                layout = replace(family, recompute=recompute, **sharding)
                self.considered += 1
                memory = self.memory(layout, distinct_only=True)
                if memory.bytes_per_gpu > self.machine.memory:
                    self.too_large += 1
                    if self.smallest is None or memory.bytes_per_gpu < self.smallest.memory.bytes_per_gpu:
                        self.smallest = Candidate(
                            layout, estimate_step_time(self.model, layout, self.machine, exact=False), memory, False
                        )
                    continue
                yield Candidate(layout, estimate_step_time(self.model, layout, self.machine, exact=False), memory, True)
                self.dominated += len(RECOMPUTE) - 1 - number
                if number == 0 and not mode:
                    self.dominated += len(RECOMPUTE) * (len(shardings) - 1 - index)
                    return
                break

    def memory(self, layout: Layout, *, distinct_only: bool = False) -> MemoryEstimate:
        return estimate_layout(
            self.model,
            layout,
            cpu=self.machine.is_cpu,
            bucket_bytes=self.bucket,
            snapshots=self.snapshots,
            distinct_only=distinct_only,
        )

    def evaluate(self, layout: Layout, *, exact: bool, name: str = "") -> Candidate:
        memory = self.memory(layout)
        seconds = estimate_step_time(self.model, layout, self.machine, exact=exact)
        return Candidate(layout, seconds, memory, memory.bytes_per_gpu <= self.machine.memory, name=name)

    def alternatives(self, best: Candidate) -> list[Candidate]:
        """What anybody would ask about the winner: the same with one thing changed, and the plain layouts."""
        at, ranks, node = best.layout, self.machine.gpus, min(self.machine.accelerator.gpus_per_node, self.machine.gpus)
        plain = replace(at, tensor=1, pipeline=1, context=1, virtual=1, sequence=False, schedule="1f1b", data=ranks)
        ideas: list[tuple[str, Layout]] = [
            ("data parallel only, ZeRO-1", replace(plain, zero_stage=1, fully_shard=False)),
            ("data parallel only, fully sharded", replace(plain, zero_stage=2, fully_shard=True)),
            ("no recompute", replace(at, recompute="none")),
            ("full recompute", replace(at, recompute="full")),
            ("ZeRO-0", replace(at, zero_stage=0, fully_shard=False)),
            ("ZeRO-2", replace(at, zero_stage=2, fully_shard=False)),
            ("half the micro-batch", replace(at, micro_batch=max(1, at.micro_batch // 2))),
            ("twice the micro-batch", replace(at, micro_batch=at.micro_batch * 2)),
            ("tensor over the whole node", self._with(at, tensor=node)),
            ("no tensor parallelism", self._with(at, tensor=1)),
            ("no pipeline", self._with(at, pipeline=1)),
            ("a pipeline of twice the stages", self._with(at, pipeline=2 * at.pipeline)),
            ("no sequence parallelism", replace(at, sequence=False)),
            ("plain 1F1B", replace(at, schedule="1f1b", virtual=1)),
            ("context parallelism 2", self._with(at, context=2)),
        ]
        seen = {_identity(best.layout)}
        answers = []
        for name, layout in ideas:
            if _identity(layout) in seen or layout.world != ranks:
                continue
            seen.add(_identity(layout))
            problems = explain_indivisible(self.model, layout)
            if problems:
                continue
            candidate = self.evaluate(layout, exact=True, name=name)
            candidate.reason = explain_defeat(candidate, best, self.machine)
            answers.append(candidate)
        return answers

    def _with(self, layout: Layout, **axes: int) -> Layout:
        changed = replace(layout, **axes)  # type: ignore[arg-type]
        if changed.pipeline == 1 or changed.virtual * changed.pipeline > self.model.num_layers:
            changed = replace(changed, virtual=1, schedule="1f1b")
        changed = replace(changed, data=max(1, self.machine.gpus // changed.model_ranks), sequence=changed.tensor > 1)
        share = max(1, self.batch // changed.data)
        fully = changed.fully_shard and changed.model_ranks == 1
        return replace(changed, micro_batch=min(changed.micro_batch, share), fully_shard=fully)


def explain_win(best: Candidate, second: Candidate) -> str:
    """Explain why the first is first."""
    shares = sorted(((getattr(best.time, part) / best.seconds, part) for part in TIME_PARTS), reverse=True)[:3]
    where = ", ".join(f"{_word(part)} {100 * share:.0f}%" for share, part in shares)
    if second is best or not list_differences(second, best):
        return f"spends its step on {where}"
    ahead = 100 * (second.seconds / best.seconds - 1)
    return f"ahead of the next by {ahead:.1f}% ({list_differences(second, best)}); {where}"


def explain_defeat(candidate: Candidate, best: Candidate, machine: Machine) -> str:
    """Explain why a layout comes behind the best: what does not fit, or what takes longer."""
    if not candidate.fits:
        worst = candidate.memory.worst
        part = max(MEMORY_PARTS, key=lambda name: getattr(worst, name))
        return (
            f"does not fit: {format_gib(candidate.memory.bytes_per_gpu)} of {format_gib(machine.memory)}"
            f" ({part} {format_gib(getattr(worst, part))} on stage {worst.stage})"
        )
    slower = 100 * (candidate.seconds / best.seconds - 1)
    sign = f"{slower:.1f}% slower" if slower >= 0.05 else f"{-slower:.1f}% faster" if slower <= -0.05 else "as fast"
    return f"{sign}: {list_differences(candidate, best) or 'the same work'}"


def list_differences(candidate: Candidate, best: Candidate) -> str:
    """List the parts that make the difference, in percent of the best step."""
    changes = [
        (100 * (getattr(candidate.time, part) - getattr(best.time, part)) / best.seconds, part) for part in TIME_PARTS
    ]
    largest = sorted((change for change in changes if abs(change[0]) >= 0.1), key=lambda change: -abs(change[0]))[:3]
    return ", ".join(f"{_word(part)} {value:+.1f}%" for value, part in largest)


def _word(part: str) -> str:
    return part.replace("_", " ")


def _identity(layout: Layout) -> Layout:
    return replace(layout, sequence=layout.sequence and layout.tensor > 1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
