"""A suite asked of a run: the same on every layout, and nothing to the training."""

import json

import pytest

from megalm.__main__ import main
from megalm.config.compose import compose_config
from megalm.config.errors import ConfigError
from megalm.evaluate.hook import SuiteHook
from megalm.evaluate.measure import evaluate_task
from megalm.journal import read_steps
from megalm.launch.resolve import resolve
from megalm.observe.report import write_report
from megalm.parallel.mesh import build_mesh
from megalm.train.parts import build_trainer
from tests.distributed import run_ranks
from tests.evaluate.models import make_model
from tests.mixtures import KINDS
from tests.small_run import small_run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.json"


def words_of(folder, tokenizer, *more):
    return small_run(
        folder,
        "model.vocab_size=300",
        "model.seq_length=64",
        f"data.tokenizer={tokenizer}",
        "evaluate.every=3",
        "evaluate.limit=8",
        "train.sample=false",
        *more,
    )


def score_suite(world, words, folder):
    """Each item's log-likelihoods and choices of a model just drawn, on this layout."""
    config = compose_config(words)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    trainer = build_trainer(config, mesh, folder)
    hook = SuiteHook(config, folder, None)
    scorer = hook.make_scorer(trainer)
    results = [evaluate_task(task, hook.protocol, scorer, hook.tokenizer, limit=8) for task in hook.tasks]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return [
        (one.log_probabilities, one.chosen, {k: v for k, v in one.values.items() if k.startswith("acc")})
        for result in results
        for one in result.outcomes
    ]


LAYOUTS = {
    "data": ["parallel.data=2"],
    "tensor": ["parallel.tensor=2", "parallel.sequence=false"],
    "sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "pipeline": ["parallel.pipeline=2"],
    "context": ["parallel.context=2"],
    "tensor-context": ["parallel.tensor=2", "parallel.context=2"],
    "pipeline-data": ["parallel.pipeline=2", "parallel.data=2"],
    "fully_shard": ["parallel.data=2", "parallel.data_mode=fully_shard"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_decides_alike(layout, tmp_path, tokenizer):
    words = words_of(tmp_path, tokenizer)
    (alone,) = run_ranks(1, score_suite, 1, words, tmp_path)
    ranks = 4 if "-" in layout else 2
    for found in run_ranks(ranks, score_suite, ranks, [*words, *LAYOUTS[layout]], tmp_path):
        for (numbers, chosen, right), (own_numbers, own_chosen, own_right) in zip(alone, found, strict=True):
            assert own_numbers == pytest.approx(numbers, abs=1e-4)
            assert (own_chosen, own_right) == (chosen, right)


@pytest.mark.parametrize(
    "layout", [["parallel.data=2", "parallel.expert=2"], ["parallel.tensor=2"]], ids=["expert", "tensor"]
)
def test_a_mixture_decides_alike(layout, tmp_path, tokenizer):
    words = [*words_of(tmp_path, tokenizer), *KINDS["mixtral"], "model.init_std=0.1"]
    (alone,) = run_ranks(1, score_suite, 1, words, tmp_path)
    for found in run_ranks(2, score_suite, 2, [*words, *layout], tmp_path):
        for (numbers, chosen, right), (own_numbers, own_chosen, own_right) in zip(alone, found, strict=True):
            assert own_numbers == pytest.approx(numbers, abs=1e-4)
            assert (own_chosen, own_right) == (chosen, right)


def train(words):
    assert main(["train", *words]) == 0


MIXTURE = [*KINDS["deepseek"], "model.init_std=0.1"]


@pytest.mark.parametrize("layout", [[], ["parallel.pipeline=2"], MIXTURE], ids=["one", "pipeline", "mixture"])
def test_training_is_the_same_to_the_bit(layout, tmp_path, tokenizer):
    for name, every in (("with", 2), ("without", 0)):
        train([*words_of(tmp_path, tokenizer, *layout, f"run.name={name}", f"evaluate.every={every}")])
    with_it, without = (read_steps(tmp_path / "runs" / name / "metrics.jsonl") for name in ("with", "without"))
    for key in ("loss", "grad_norm", "eval/loss"):
        assert [step.get(key) for step in with_it] == [step.get(key) for step in without]
    assert [step["step"] for step in with_it if "eval/average" in step] == [2, 4, 6]


def test_figures_are_in_metrics_report_and_folder(tmp_path, tokenizer):
    train(words_of(tmp_path, tokenizer, "train.steps=3"))
    run = tmp_path / "runs" / "small"
    last = read_steps(run / "metrics.jsonl")[-1]
    assert (
        0 <= last["eval/facts/acc"] <= 1 and last["eval/facts/acc_stderr"] > 0 and last["eval/texts/bits_per_byte"] > 0
    )
    page = write_report(run).read_text()
    assert "accuracy on tasks" in page and "bits per byte on tasks" in page
    content = json.loads((run / "evaluation" / "smoke-core-step-3" / "results.json").read_text())
    assert {task["task"] for task in content["tasks"]} == {"facts", "endings", "reference", "completion", "texts"}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "eval/facts/acc" in events.Tags()["scalars"]


def test_the_checkpoint_gives_the_figures_of_the_run(tmp_path, tokenizer, capsys):
    train(words_of(tmp_path, tokenizer, "train.steps=3"))
    run = tmp_path / "runs" / "small"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--limit", "8", "--json"]) == 0
    tasks = {task["task"]: task["figures"] for task in json.loads(capsys.readouterr().out)["tasks"]}
    last = read_steps(run / "metrics.jsonl")[-1]
    for task, figures in tasks.items():
        for name, figure in figures.items():
            if task != "sums":
                assert last[f"eval/{task}/{name}"] == pytest.approx(figure["value"], rel=1e-5)


@pytest.mark.parametrize(
    "words,message",
    [
        (["data.tokenizer=null"], "the run has no tokenizer"),
        (["evaluate.suite=nowhere"], "suite 'nowhere': neither one of"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_first_step(words, message, tmp_path, tokenizer):
    config = compose_config([*words_of(tmp_path, tokenizer), *words])
    with pytest.raises(ConfigError, match=message):
        SuiteHook(config, tmp_path, None)
