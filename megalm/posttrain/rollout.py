"""A source of batches that writes them: completions by the weights in training, judged, compared within groups, packed.

For each rollout
1. every data and context rank writes the completions of its groups (`megalm.generate.on_ranks`) and judges them,
2. all ranks learn of all of them, so that advantages, packing and counts are the same everywhere,
3. each data rank takes its rows.

The state is a position in the stream of groups. What a group's completions are depends on its number, the run's seed and the
weights, so a rollout that was cut short is written again, bit for bit; one that several updates learn from is kept in the
checkpoint while they do.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megalm.config import Config
from megalm.config.errors import ConfigError
from megalm.data.batch import Batch
from megalm.data.order import derive_key, permute
from megalm.data.phases import Phase, make_single_phase
from megalm.data.stream import merge_ranges, take
from megalm.generate.model import find_run_stops
from megalm.generate.on_ranks import Completion, RankWriter, Request
from megalm.parallel.collectives import all_reduce
from megalm.parallel.mesh import Mesh
from megalm.posttrain.advantages import compute_advantages
from megalm.posttrain.frozen import Reference
from megalm.posttrain.packing import Text, cut_rows, pack_texts
from megalm.posttrain.prepare import find_template
from megalm.posttrain.prompts import name_files, read_prompts
from megalm.posttrain.render import Renderer
from megalm.posttrain.rewards import Rewards
from megalm.posttrain.written import Written
from megalm.tokenizer.tokenizer import load_tokenizer
from megalm.train.batch_source import BatchSource, Engine

_MESSAGE = 1000
"""Bytes of what a reward did that all ranks are told."""


class RolloutSource(BatchSource):
    """Batches of the run's own completions. Positions of its stream are completions, skipped by whole groups.

    Errors: ConfigError for prompts, rewards or a tokenizer that cannot serve
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh, self.settings = config, mesh, config.rollout
        if config.data.tokenizer is None:
            raise ConfigError("objective.name=policy writes and reads texts: set data.tokenizer.")
        if config.parallel.data_mode == "fully_shard":
            raise ConfigError(
                "parallel.data_mode=fully_shard: no rank has whole weights to write with, as objective.name=policy does: use "
                "data_mode=replicate with zero_stage=2."
            )
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        renderer = Renderer(find_template(self.tokenizer, self.settings.template), self.tokenizer)
        longest = config.model.seq_length + 1 - self.settings.max_tokens
        self.prompts = read_prompts(self.settings.prompts, renderer, longest)
        self._file_names = name_files(self.settings.prompts)
        self.stop = find_run_stops(self.tokenizer)
        if not self.stop:
            raise ConfigError(f"{self.tokenizer.path} has no token that ends a text: a completion could not end.")
        self.unreadable = set(self.tokenizer.unknown_ids(config.model.vocab_size))
        self.rewards = Rewards(self.settings)
        size = self.settings.group_size
        self.groups = config.train.global_batch_size // size
        """Of one update."""
        self._phases = make_single_phase({"rollout": 1.0}, config.model.seq_length, config.train.global_batch_size)
        self._position = 0  # groups that are learned from or skipped
        self._ahead = 0  # position after the rollout under way
        self._update = 0  # updates made of the rollout under way
        self._skipped: list[tuple[int, int]] = []
        self._seeds: list[tuple[int, int]] = [(0, config.train.seed)]  # (from which group on, seed of the order)
        self._batches = 0
        self._engine: Engine | None = None
        self._writer: RankWriter | None = None
        self._reference: Reference | None = None
        self.written: Written | None = None
        """The rollout under way."""
        self._measured: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------------ the protocol
    def bind(self, engine: Engine) -> None:
        self._engine = engine
        if self.config.objective.policy.kl:
            self._reference = Reference(self.config, self.mesh)
        placement = engine.executor.schedule.placement
        self._writer = RankWriter(engine.model_chunks, placement, self.config, self.mesh, rows=self.settings.rows)

    @property
    def source_names(self) -> list[str]:
        return ["rollout"]

    @property
    def phase(self) -> Phase:
        return self._phases.at(self._batches)

    def phase_at(self, step: int) -> Phase:
        return self._phases.at(step)

    @property
    def samples_consumed(self) -> int:
        return self._position * self.settings.group_size

    @property
    def _updates(self) -> int:
        """Updates that one rollout serves."""
        return self.settings.updates * self.settings.epochs

    def next(self) -> list[Batch]:
        begun = time.perf_counter()
        if self.written is None or self._update == self._updates:
            groups, self._ahead = take(self._position, self.groups * self.settings.updates, self._skipped)
            self.written, self._update = self._roll_out(groups), 0
            self._measured = self._measure(self.written, time.perf_counter() - begun)
        else:
            self._measured = {}
        batches = self._make_batches(self.written)
        self._update += 1
        self._batches += 1
        if self._update == self._updates:
            self._position = self._ahead
        return batches

    def next_positions(self) -> np.ndarray:
        """The rollout's that the next update learns from."""
        size, count = self.settings.group_size, self.groups
        if self.written is not None and self._update < self._updates:
            groups = self.written.groups[self._part()]
        else:
            groups = take(self._position, count, self._skipped)[0]
        return (groups[:, None] * size + np.arange(size)).reshape(-1)

    def evaluation_batches(self, sequences: int | None = None) -> list[Batch]:
        return []

    def skip(self, first_sample: int, last_sample: int) -> None:
        size = self.settings.group_size
        self._skipped = merge_ranges([*self._skipped, (first_sample // size, -(-last_sample // size))])
        self.written = None

    def reseed(self, seed: int, position: int | None = None) -> bool:
        first = self._position if position is None else position // self.settings.group_size
        self._seeds = [entry for entry in self._seeds if entry[0] < first] + [(first, seed)]
        self.written = None
        return True

    def describe(self, positions: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        size = self.settings.group_size
        found = []
        for position in np.asarray(positions).tolist():
            prompt = self.prompts[int(self._prompts_of(np.array([position // size]))[0])]
            found.append({"position": position, "source": "rollout", "document": prompt.place, "offset": position % size,
                          "prompt": prompt.text})  # fmt: skip
        return found

    def state_dict(self) -> dict[str, Any]:
        under_way = self.written is not None and 0 < self._update < self._updates
        return {
            "groups": self._position,
            "ahead": self._ahead,
            "update": self._update if under_way else 0,
            "batches": self._batches,
            "skipped": [list(pair) for pair in self._skipped],
            "seeds": [list(pair) for pair in self._seeds],
            "written": self.written.as_dict() if under_way and self.written is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Errors: ConfigError where the state is that of a run that read its batches"""
        if "groups" not in state:
            raise ConfigError(
                "the checkpoint is of a run that read its data, and objective.name=policy writes its own: begin with its "
                "weights, checkpoint.load=weights checkpoint.load_path=RUN, under another run.name."
            )
        self._position, self._ahead, self._batches = state["groups"], state["ahead"], state["batches"]
        self._update = state["update"]
        self._skipped = [(a, b) for a, b in state["skipped"]]
        self._seeds = [(a, b) for a, b in state["seeds"]]
        self.written = None if state["written"] is None else Written.from_dict(state["written"])

    def measure(self) -> dict[str, float]:
        return self._measured

    def close(self) -> None:
        self.rewards.close()

    # ------------------------------------------------------------------------------------------------------- one rollout
    def _prompts_of(self, groups: np.ndarray) -> np.ndarray:
        """Which prompt each group of the stream writes on from. Shapes: int64 [N] -> int64 [N]"""
        count, found = len(self.prompts), np.empty(len(groups), np.int64)
        for place, group in enumerate(groups.tolist()):
            seed = next(seed for first, seed in reversed(self._seeds) if first <= group)
            epoch, index = divmod(group, count)
            found[place] = permute(np.array([index]), count, derive_key("prompts", seed, epoch))[0]
        return found

    def _roll_out(self, groups: np.ndarray) -> Written:
        """Write and judge the completions of these groups, this rank its own, and learn of all."""
        assert self._writer is not None and self._engine is not None, "the source was not bound to a run"
        self._engine.optimizer.wait_weights()
        size, axes = self.settings.group_size, (self.mesh.data, self.mesh.context)
        writers, own = axes[0].size * axes[1].size, axes[0].rank * axes[1].size + axes[1].rank
        places = [place for place in range(len(groups)) if place * writers // len(groups) == own]
        prompts = self._prompts_of(groups)
        requests = []
        for place in places:
            ids = self.prompts[prompts[place]].ids
            keys = [derive_key("rollout", self.config.train.seed, int(groups[place]), number) for number in range(size)]
            room = min(self.settings.max_tokens, self.config.model.seq_length + 1 - len(ids))
            requests.append(Request(ids, keys, room))
        found = self._writer.write(requests, self.stop, self.settings.temperature)
        return self._share(groups, prompts, places, found)

    def _share(
        self, groups: np.ndarray, prompts: np.ndarray, places: list[int], found: list[list[Completion]]
    ) -> Written:
        """Judge what this rank wrote, and tell all ranks.

        Comm: over the world, of N completions: [1], N x longest ids and numbers, N x (4 + rewards) numbers
        """
        size, count, world, device = self.settings.group_size, len(groups), self.mesh.world, self.mesh.device
        speaks = (
            self.mesh.tensor.rank == 0
            and self._writer is not None
            and self.mesh.pipeline.rank == self._writer.last_rank
        )
        longest = max([len(one.tokens) for group in found for one in group], default=1)
        longest = int(all_reduce(torch.tensor(float(longest), device=device), world, "max"))
        tokens = torch.zeros(count * size, longest, dtype=torch.int32)
        drawn = torch.zeros(count * size, longest)
        about = torch.zeros(count * size, 4 + len(self.rewards.names), dtype=torch.float64)
        message = ""
        for place, group in zip(places, found, strict=True) if speaks else ():
            prompt = self.prompts[prompts[place]]
            for number, one in enumerate(group):
                row, length = place * size + number, len(one.tokens)
                tokens[row, :length] = torch.tensor(one.tokens, dtype=torch.int32)
                drawn[row, :length] = torch.tensor(one.log_probabilities)
                judged = self.rewards.judge(prompt.text, self._read(one), prompt.record)
                if judged.failure is not None and not message:
                    message = f"{prompt.place}: the prompt {prompt.text[:80]!r}: {judged.failure}"
                numbers = (length, one.ended, float(np.mean(one.entropies)), judged.failure is not None, *judged.values)
                about[row] = torch.tensor(numbers, dtype=torch.float64)
        shared = [all_reduce(tensor.to(device), world).cpu().numpy() for tensor in (tokens, drawn, about)]
        failed = shared[2][:, 3] > 0
        if failed.any() and self.settings.reward_failure == "stop":
            raise ConfigError(
                f"a reward gave no number: {self._tell_all(message)}. Mend it, or let such completions be left out and counted: "
                "rollout.reward_failure=count."
            )
        written = Written(
            groups=np.asarray(groups, np.int64), tokens=shared[0], drawn=shared[1], lengths=shared[2][:, 0].astype(np.int64),
            ended=shared[2][:, 1] > 0, entropies=shared[2][:, 2], failed=failed, rewards=shared[2][:, 4:],
            advantages=np.zeros(count * size),
        )  # fmt: skip
        totals = np.array([self.rewards.total(values) for values in written.rewards])
        if self.settings.cut == "zero":
            totals[~written.ended] = 0.0
        shape = (count, size)
        advantages = compute_advantages(totals.reshape(shape), ~failed.reshape(shape), self.config.objective.policy)
        written.advantages = advantages.reshape(-1)
        return written

    def _tell_all(self, message: str) -> str:
        """The message of the first rank that has one, on every rank."""
        world, device = self.mesh.world, self.mesh.device
        first = torch.tensor(float(self.mesh.rank if message else self.mesh.world_size), device=device)
        speaker = int(all_reduce(first, world, "min"))
        letters = torch.zeros(_MESSAGE, dtype=torch.int32, device=device)
        if self.mesh.rank == speaker:
            own = message.encode()[:_MESSAGE]
            letters[: len(own)] = torch.tensor(list(own), dtype=torch.int32)
        return bytes(n for n in all_reduce(letters, world).tolist() if n).decode(errors="replace")

    def _read(self, completion: Completion) -> str:
        """Read the text, without the token that ends it."""
        ids = completion.tokens[:-1] if completion.ended else completion.tokens
        return self.tokenizer.decode([token for token in ids if token not in self.unreadable])

    # -------------------------------------------------------------------------------------------------------- one update
    def _part(self) -> slice:
        """The groups of the rollout that the next update learns from."""
        number = self._update % self.settings.updates
        return slice(number * self.groups, (number + 1) * self.groups)

    def _make_batches(self, written: Written) -> list[Batch]:
        config, size, part = self.config, self.settings.group_size, self._part()
        prompts = self._prompts_of(written.groups[part])
        texts = []
        for place, prompt in enumerate(prompts.tolist()):
            for number in range((part.start + place) * size, (part.start + place + 1) * size):
                learned = not written.failed[number] and (written.ended[number] or self.settings.cut != "mask")
                tokens, drawn = written.completion(number).tolist(), written.drawn[number, : written.lengths[number]]
                texts.append(
                    Text(
                        self.prompts[prompt].ids,
                        tokens,
                        drawn.tolist(),
                        float(written.advantages[number]),
                        bool(learned),
                    )
                )
        assert self._engine is not None
        placement = self._engine.executor.schedule.placement
        micro, ranks = config.train.micro_batch_size, self.mesh.data.size
        multiple = micro * ranks * (placement.ranks if placement.chunks > 1 else 1)
        whole = pack_texts(texts, config.model.seq_length, multiple, together=self.settings.packing)
        share = whole.tokens.shape[0] // ranks
        first = self.mesh.data.rank * share
        batches = [cut_rows(whole, at, at + micro) for at in range(first, first + share, micro)]
        return list(batches if self._reference is None else self._reference.score(batches))

    def _measure(self, written: Written, seconds: float) -> dict[str, float]:
        """Measure what the step's record tells of a rollout."""
        size = self.settings.group_size
        totals = np.array([self.rewards.total(values) for values in written.rewards]).reshape(-1, size)
        tokens = int(written.lengths.sum())
        values = {
            "reward/mean": float(totals.mean()),
            "reward/std": float(totals.std()),
            **{f"reward/{name}": float(written.rewards[:, i].mean()) for i, name in enumerate(self.rewards.names)},
            **self._rewards_by_file(written, totals),
            "rollout/length": float(written.lengths.mean()),
            "rollout/cut": float(1 - written.ended.mean()),
            "rollout/flat": float((np.ptp(totals, axis=1) == 0).mean()),
            "rollout/entropy": float(written.entropies.mean()),
            "rollout/repeated": written.repetition(),
            "rollout/seconds": seconds,
            "rollout/tokens_per_s": tokens / seconds,
        }
        if written.failed.any():
            values["reward/failed"] = float(written.failed.mean())
        return values

    def _rewards_by_file(self, written: Written, totals: np.ndarray) -> dict[str, float]:
        """Mean reward of each file's prompts in the rollout, where there are several. Shapes: totals [groups, G]"""
        if len(self._file_names) < 2:
            return {}
        files = np.array([self.prompts[prompt].file for prompt in self._prompts_of(written.groups)])
        return {f"prompts/{self._file_names[file]}": float(totals[files == file].mean()) for file in np.unique(files)}

    def samples(self, groups: int) -> list[dict[str, Any]]:
        """The first groups of the rollout under way, as texts."""
        written, size = self.written, self.settings.group_size
        if written is None:
            return []
        found = []
        for place, prompt in enumerate(self._prompts_of(written.groups[:groups]).tolist()):
            completions = []
            for number in range(place * size, (place + 1) * size):
                ended = bool(written.ended[number])
                text = self._read(Completion(written.completion(number).tolist(), ended=ended))
                rewards = dict(zip(self.rewards.names, written.rewards[number].tolist(), strict=True))
                completions.append({"text": text, "ended": ended, "rewards": rewards,
                                    "advantage": float(written.advantages[number])})  # fmt: skip
            found.append(
                {"prompt": self.prompts[prompt].text, "place": self.prompts[prompt].place, "completions": completions}
            )
        return found
