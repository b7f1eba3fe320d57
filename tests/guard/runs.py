"""Small runs with the guard attached, damaged on purpose."""

import json
from dataclasses import dataclass
from pathlib import Path

from megalm.config.compose import compose_config
from megalm.data.loader import Loader
from megalm.guard.hook import GuardHook
from megalm.launch.resolve import resolve
from megalm.ops import use_backend
from megalm.parallel.mesh import Mesh, build_mesh
from megalm.resilience.chaos.provoke import make_provoke_hooks, provoke_source
from megalm.train.hooks import Hook
from megalm.train.parts import build_trainer
from tests.small_run import small_run

P = "guard.provoke."
STEP, END = 40, 54
KINDS = {
    "clean": [],
    "bad_shard": [P + "kind=random_tokens", P + "steps=12"],
    "one_bad_batch": [P + "kind=random_tokens"],
    "second_moment": [P + "kind=zero_second_moment", P + "times=2"],
    "learning_rate": [P + "kind=lr_jump", P + "steps=3", P + "times=2"],
    "bit_flip": [P + "kind=bit_flip"],
    "nan": [P + "kind=gradient_scale", P + "factor=inf"],
}


class Recorder(Hook):
    def __init__(self):
        self.records = []

    def on_step_end(self, trainer, record):
        self.records.append(record)


class Crash(Exception):
    """The process dies."""


@dataclass
class Outcome:
    status: int
    records: list
    events: list
    folder: Path
    guard: GuardHook

    def kinds(self):
        return [e["kind"] for e in self.events if e["kind"] in ("skip", "replay", "rollback", "verdict", "give_up")]

    def of(self, kind):
        return [e for e in self.events if e["kind"] == kind]

    @property
    def final(self):
        return self.records[-1]["eval/loss"]


def overrides(folder, kind, *more, steps=END):
    return small_run(
        folder,
        f"train.steps={steps}",
        "train.eval_every=0",
        "train.eval_sequences=32",
        "train.micro_batch_size=4",
        "data.holdout=0.05",
        "checkpoint.every=0",
        "optim.warmup_steps=4",
        "guard.detector.window=32",
        "guard.detector.min_window=16",
        "guard.snapshot_lags=[8,16,32]",
        "guard.skip_before=4",
        "guard.skip_after=4",
        "guard.probe_sequences=4",
        f"guard.provoke.step={STEP}",
        f"run.name={kind}",
        *KINDS[kind],
        *more,
    )


def train(arguments, *hooks, mesh=None):
    config = compose_config(arguments)
    resolve(config, mesh.world_size if mesh else 1)
    folder = Path(config.run.dir) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    with use_backend("reference"):
        return _train(config, folder, mesh, hooks)


def _train(config, folder, mesh, hooks):
    mesh = mesh or Mesh.single()
    source = provoke_source(config, Loader(config, mesh.data), mesh)
    trainer = build_trainer(config, mesh, folder, batch_source=source, peak_flops=1e11)
    guard, recorder = GuardHook(config.guard), Recorder()
    trainer.hooks += [guard, *make_provoke_hooks(config.guard), recorder, *hooks]
    status = trainer.train()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return Outcome(status, recorder.records, events, folder, guard)


def train_on_ranks(arguments):
    """Body of a multi-rank test: what this rank decided."""
    config = compose_config(arguments)
    resolve(config, 2)
    outcome = train(arguments, mesh=build_mesh(config.parallel, "cpu"))
    return outcome.guard.policy.state_dict(), [r["step"] for r in outcome.records], outcome.events
