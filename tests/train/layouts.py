"""A few steps of a small run with parts of one's own, on one rank and on two."""

import pytest

from megalm.config.compose import compose_config
from megalm.data.loader import Loader
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.small_run import small_run


def train(world, arguments, folder, names, objective, source, hook):
    config = compose_config(arguments)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    trainer = build_trainer(
        config,
        mesh,
        folder,
        objective=objective() if objective else None,
        batch_source=source(Loader(config, mesh.data)) if source else None,
        hooks=[hook()] if hook else [],
    )
    records = [trainer.train_step() for _ in range(8)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return [tuple(record[name] for name in names) for record in records]


def same_on_every_layout(folder, axis, names, *, objective=None, source=None, hook=None):
    """Numbers of each step on one rank, where two ranks along the axis found the same.

    objective, source (which wraps the loader), hook: classes of one's own.
    """
    arguments = small_run(folder, "train.eval_every=0", "train.eval_sequences=0", "guard=off", "train.steps=9")
    (alone,) = run_ranks(1, train, 1, arguments, folder, names, objective, source, hook)
    words = [*arguments, f"parallel.{axis}=2"]
    for found in run_ranks(2, train, 2, words, folder, names, objective, source, hook):
        assert found == [pytest.approx(step, rel=2e-5) for step in alone]
    return alone
