"""One small tensor, saved and loaded: what the tests of commits and of full disks begin with."""

import os

import torch

from megalm.checkpoint.checkpointer import Checkpointer
from megalm.config import CheckpointConfig
from megalm.parallel.slices import Box
from tools.bench.checkpoint._fake_ranks import FakeMesh, Layout

SINGLE = FakeMesh(Layout())


def make_checkpointer(folder, **options):
    events = []
    config = CheckpointConfig(**options)

    def record(kind, *, step, **fields):
        events.append((kind, step, fields))

    made = Checkpointer(folder, config, SINGLE, events=record)
    return made, events


def make_box(value, size=1000):
    return [Box("weight", (size,), (0,), torch.full((size,), float(value)))]


def save_steps(folder, steps, **options):
    made, events = make_checkpointer(folder, **options)
    for step in steps:
        made.save(step, make_box(step), {"step": step}, {"r": step}, wait=True)
    made.close()
    return events


def load_newest(folder, **options):
    made, events = make_checkpointer(folder)
    target = make_box(float("nan"))
    state, _ = made.load(target, **options)
    assert (target[0].tensor == target[0].tensor[0]).all()
    return state["step"], target[0].tensor[0].item(), events


def list_names(folder):
    return sorted(os.listdir(folder))
