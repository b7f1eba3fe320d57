"""A run over a curriculum: it trains over its phases, and resumes in the middle, also on other layouts."""

import json
import shutil
from pathlib import Path

import pytest

from megalm.config.errors import ConfigError
from megalm.data.tokens import TokenFile, TokenWriter
from tests.distributed import run_ranks
from tests.small_run import small_run
from tests.train.test_trainer import _on_ranks, train

PHASES = (
    "data.phases=["
    "{name: general, steps: 3, seq_length: 16, mixture: {numbers: 0.75, backwards: 0.25}},"
    "{name: quality, tokens: 1024, mixture: {backwards: 768, numbers: 10%}, schedule: linear, min_lr: 0.0},"
    "{name: end, steps: 2, global_batch_size: 4, schedule: constant, lr: 0.001}]"
)


def phased_run(folder: Path, *overrides: str) -> list[str]:
    run = small_run(folder)
    prefix = folder / "backwards_text_document"
    with TokenWriter(prefix, "uint16") as writer:
        for document in TokenFile(folder / "numbers"):
            writer.add_document(document[::-1])
    sources = f"data.train=[{folder}/numbers_text_document,{prefix}]"
    return [
        *[o for o in run if not o.startswith(("train.steps", "data.train", "checkpoint.every"))],
        sources,
        PHASES,
        "checkpoint.every=0",
        "optim.schedule=constant",
        "optim.warmup_steps=1",
        *overrides,
    ]


def test_phases_change_mixture_length_batch_and_learning_rate(tmp_path):
    trainer, recorder, status = train(phased_run(tmp_path))
    records = recorder.records
    assert status == 0 and [record["phase"] for record in records] == ["general"] * 3 + ["quality"] * 4 + ["end"] * 2
    assert [record["samples"] for record in records] == [8, 16, 24, 32, 40, 48, 56, 60, 64]
    assert [record["tokens"] for record in records] == [128, 256, 384, 640, 896, 1152, 1408, 1536, 1664]
    rates = [record["lr"] for record in records]
    assert rates[:3] == [0.005, 0.01, 0.01] and rates[3] == 0.01 and rates[6] == 0.0 and rates[4] > rates[5] > 0
    assert rates[7:] == [0.001, 0.001]
    counts = [trainer.batch_source._stream.counts(position) for position in (24, 56)]
    assert counts == [{"numbers": 9, "backwards": 3}, {"numbers": 9 + 8, "backwards": 3 + 24}]
    events = [json.loads(line) for line in (trainer.folder / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["name"]) for e in events if e["kind"] == "phase"] == [
        (1, "general"),
        (4, "quality"),
        (8, "end"),
    ]


def test_a_curriculum_resumes_anywhere_and_on_other_layouts(tmp_path):
    overrides = [*phased_run(tmp_path), "checkpoint.every=2", "checkpoint.keep=100", "train.eval_every=0"]
    _, whole, _ = train(overrides)
    checkpoints = tmp_path / "runs/small/checkpoints"
    for step in range(3, 10):  # as if stopped after the second step, in the first phase
        shutil.rmtree(checkpoints / f"step-{step:08}", ignore_errors=True)
    _, again, _ = train(overrides)
    assert again.losses == whole.losses[2:]
    for step in range(5, 10):
        shutil.rmtree(checkpoints / f"step-{step:08}", ignore_errors=True)
    both = run_ranks(2, _on_ranks, [*overrides, "parallel.pipeline=2"])
    assert both[0] == both[1] == pytest.approx(whole.losses[4:], rel=1e-4)


def test_phases_may_be_changed_in_a_running_job(tmp_path):
    """Sources keep their counts: what was consumed is not repeated, and a new phase begins where the job stands."""
    overrides = phased_run(tmp_path)
    train([*overrides, "train.steps=4"])
    other = PHASES.replace("backwards: 768, numbers: 10%", "numbers: 100%")
    trainer, recorder, _ = train([other if o == PHASES else o for o in overrides])
    assert len(recorder.records) == 5
    counts = trainer.batch_source._stream.counts(56)
    assert counts == {"numbers": 9 + 2 + 24, "backwards": 3 + 6}


def _losses_by_source(overrides: list[str]) -> list[dict]:
    from megalm.config.compose import compose_config
    from megalm.launch.resolve import resolve
    from megalm.parallel.mesh import build_mesh

    config = compose_config(overrides)
    resolve(config, 2)
    _, recorder, _ = train(overrides, mesh=build_mesh(config.parallel, "cpu"))
    return [{k: v for k, v in record.items() if k.startswith("loss/")} for record in recorder.records]


def test_losses_by_source_are_the_same_on_every_layout(tmp_path):
    overrides = phased_run(tmp_path, "train.steps=4")
    _, alone, _ = train(overrides)
    expected = [{k: v for k, v in record.items() if k.startswith("loss/")} for record in alone.records]
    for step, record in enumerate(alone.records):
        shares = (
            {"loss/numbers": 0.75, "loss/backwards": 0.25}
            if step < 3
            else {"loss/numbers": 0.25, "loss/backwards": 0.75}
        )
        assert set(expected[step]) == set(shares)
        assert sum(expected[step][k] * share for k, share in shares.items()) == pytest.approx(record["loss"], rel=1e-6)
    for layout in ("parallel.tensor=2", "parallel.context=2"):
        for got in run_ranks(2, _losses_by_source, [*overrides, layout, f"run.name=s{layout[9:12]}"]):
            for a, b in zip(got, expected, strict=True):
                assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(
    "phases, match",
    [
        ("[{name: a}]", "either its tokens or its steps"),
        ("[{steps: 3}]", "a name of its own"),
        ("[{name: a, steps: 3}, {name: a, steps: 3}]", "a name of its own"),
        ("[{name: a, tokens: many}]", "tokens='many'"),
        ("[{name: a, steps: 3, seq_length: 24}]", "seq_length=24 does not divide model.seq_length=32"),
        ("[{name: a, steps: 3, global_batch_size: 3}]", "not a multiple of train.micro_batch_size=2"),
        ("[{name: a, steps: 3, mixture: {numbers: lots}}]", "'lots' is neither a proportion"),
        ("[{name: a, steps: 3, lr: 0.1}]", "belong to a schedule"),
        ("[{name: a, steps: 3, schedule: wavy}]", "schedule=wavy: not one of"),
        ("[{name: a, steps: 3, schedule: linear, lr: 0.1, min_lr: 0.2}]", "min_lr=0.2 lies above"),
        ("[{name: a, steps: 3, colour: red}]", "colour"),
        ("[{name: a, steps: 3, mixture: {web: 1}}]", "no source 'web'. Sources in data.train: numbers, backwards"),
        ("[{name: a, steps: 3, mixture: {numbers: 5000}}]", "ask for 5000 tokens"),
        ("[{name: a, steps: 3, mixture: {numbers: 100}}]", "the phase has 768"),
    ],
)
def test_what_cannot_work_is_explained(tmp_path, phases, match):
    overrides = [o for o in phased_run(tmp_path) if o != PHASES]
    with pytest.raises(ConfigError, match=match):
        train([*overrides, f"data.phases={phases}"])


def test_a_run_longer_than_its_phases_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train.steps=10, but data.phases end after 9"):
        train(phased_run(tmp_path, "train.steps=10"))


def test_the_curriculum_is_shown_before_it_starts(tmp_path, capsys):
    from tools.mix.__main__ import main

    overrides = phased_run(tmp_path)
    assert main(["--run", *overrides]) == 0
    shown = capsys.readouterr().out
    assert "1,664 tokens in 9 steps" in shown and "linear" in shown and "1.00e-02 - 0.00e+00" in shown
    assert main(["--run", "--json", *overrides]) == 0
    rows = {(r["phase"], r["source"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["quality", "backwards"]["tokens"] == pytest.approx(768)
    assert rows["general", "numbers"]["share"] == 0.75
    assert main(["--run", *[o for o in overrides if o != PHASES]]) == 2
    assert "no data.phases" in capsys.readouterr().err
