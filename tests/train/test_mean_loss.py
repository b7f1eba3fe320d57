"""Evaluation and the guard's probe give one number, on every layout."""

import pytest

from megalm.config.compose import compose_config
from megalm.guard.probe import Probe
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.small_run import small_run

LAYOUTS = {
    "context": ["parallel.context=2"],
    "tensor": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "data": ["parallel.data=2"],
}
PACKINGS = ["stream", "documents", "best_fit"]


def losses(ranks, arguments, folder):
    config = compose_config(arguments)
    resolve(config, ranks)
    mesh = build_mesh(config.parallel, "cpu")
    trainer = build_trainer(config, mesh, folder)
    probe = Probe(trainer.evaluator, trainer.batch_source.evaluation_batches(6))
    found = trainer.evaluate()["eval/loss"], probe.loss(), trainer.evaluate()["eval/loss"]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return found


@pytest.mark.parametrize("packing", PACKINGS)
def test_evaluation_and_the_probe_agree_on_every_layout(tmp_path, packing):
    arguments = small_run(tmp_path, "train.eval_sequences=6", "data.holdout=0.1", f"data.packing={packing}")
    (alone,) = run_ranks(1, losses, 1, arguments, tmp_path)
    assert alone[0] == alone[1] == alone[2]
    for words in LAYOUTS.values():
        for found in run_ranks(2, losses, 2, [*arguments, *words], tmp_path):
            assert found == pytest.approx(alone, rel=2e-6)


def test_packing_shows_in_the_evaluated_loss(tmp_path):
    found = set()
    for packing in PACKINGS:
        words = ["train.eval_sequences=40", "data.holdout=0.1", f"data.packing={packing}"]
        ((loss, *_),) = run_ranks(1, losses, 1, small_run(tmp_path, *words), tmp_path)
        found.add(loss)
    assert len(found) == 3
