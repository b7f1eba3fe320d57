"""lm-eval itself on the same local files: every log-likelihood, every decision, every figure."""

import json

import pytest

from megalm.config.errors import ConfigError
from megalm.evaluate.evaluation import Model, evaluate
from megalm.evaluate.tasks.harness import read_task
from megalm.evaluate.tasks.suite import SHIPPED, read_suite
from tests.evaluate.models import make_model

TASKS = {
    "facts": dict(
        output_type="multiple_choice",
        doc_to_text="Q: {{query}} ",
        doc_to_target="gold",
        doc_to_choice="choices",
        num_fewshot=1,
        fewshot_split="test",
        metric_list=[dict(metric=name) for name in ("acc", "acc_norm", "acc_bytes")],
        description="Some facts. ",
    ),
    "facts_bare": dict(
        output_type="multiple_choice",
        doc_to_text="",
        doc_to_target="{{gold}}",
        doc_to_choice="{{choices}}",
        target_delimiter="",
        metric_list=[dict(metric="acc")],
    ),
    "reference": dict(
        output_type="multiple_choice",
        doc_to_text="{{gold}}",
        doc_to_choice="context_options",
        doc_to_target="continuation",
        num_fewshot=1,
        fewshot_split="test",
        fewshot_config=dict(sampler="first_n"),
        metric_list=[dict(metric=name) for name in ("acc", "acc_norm")],
    ),
    "completion": dict(
        output_type="loglikelihood",
        doc_to_text="context",
        doc_to_target=" {{continuation}}",
        num_fewshot=2,
        fewshot_split="test",
        metric_list=[dict(metric=name) for name in ("acc", "perplexity")],
    ),
    "texts": dict(
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[dict(metric=name) for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    ),
    "sums": dict(
        output_type="generate_until",
        doc_to_text="{{context}}",
        doc_to_target="{{answer}}",
        num_fewshot=1,
        fewshot_split="test",
        generation_kwargs=dict(until=["\n", "th"], max_gen_toks=20, do_sample=False),
        filter_list=[
            dict(name="first", filter=[dict(function="regex", regex_pattern="(\\w+)"), dict(function="take_first")])
        ],
        metric_list=[dict(metric="exact_match", ignore_case=True)],
    ),
}
"""A task of each kind over the smoke suite's files; of most the prompts are longer than the model at times."""


def write_tasks(folder):
    folder.mkdir(exist_ok=True)
    for name, settings in TASKS.items():
        file = SHIPPED / "smoke" / f"{name.partition('_')[0]}.jsonl"
        common = dict(task=f"own_{name}", dataset_path="json", test_split="test")
        files = dict(dataset_kwargs=dict(data_files=dict(test=str(file))))
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **files, **settings}))
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "no-begin"])
def both(request, tmp_path_factory):
    """Ours and lm-eval's results on one model."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    tasks = write_tasks(folder / "tasks")
    path = make_model(folder / "model", request.param)
    model = Model.load(path)
    ours = {"path": path, "tasks": tasks}
    for name in TASKS:
        found = evaluate(model, read_suite(str(tasks / f"{name}.yaml")), output=folder / name)
        (ours[name],) = found.results
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=4),
        tasks=[f"own_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return ours, theirs


@pytest.mark.parametrize("name", [name for name in TASKS if name != "sums"])
def test_every_log_likelihood_is_lm_evals(both, name):
    ours, theirs = both
    samples = sorted(theirs["samples"][f"own_{name}"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours[name].outcomes)
    for outcome, sample in zip(ours[name].outcomes, samples, strict=True):
        found = [float(part[0] if isinstance(part, (list, tuple)) else part) for (part,) in sample["resps"]]
        numbers = outcome.log_probabilities if name != "texts" else [sum(outcome.log_probabilities)]
        assert numbers == pytest.approx(found, abs=1e-4, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_every_figure_is_lm_evals(both, name):
    ours, theirs = both
    figures = theirs["results"][f"own_{name}"]
    checked = 0
    for key, value in figures.items():
        metric, _, end = key.partition(",")
        own = ours[name].figures.get(metric if end == "none" else key)
        if own is not None:
            assert own.value == pytest.approx(value, rel=1e-5), key
            checked += 1
            error = figures.get(f"{metric}_stderr,{end}")
            if isinstance(error, float) and metric in ("acc", "acc_norm", "acc_bytes", "exact_match"):
                assert own.error == pytest.approx(error, rel=1e-6), key
    assert checked == len(TASKS[name]["metric_list"])


def test_what_is_written_is_lm_evals(both):
    ours, theirs = both
    samples = sorted(theirs["samples"]["own_sums"], key=lambda sample: sample["doc_id"])
    assert [outcome.text for outcome in ours["sums"].outcomes] == [sample["resps"][0][0] for sample in samples]


def test_code_in_a_task_is_not_run(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("task: t\ndataset_path: json\nprocess_docs: !function utils.process\n")
    with pytest.raises(ConfigError, match="line 3: !function utils.process names Python code"):
        read_task(file)


def test_a_hub_path_says_what_to_do(tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text("task: t\noutput_type: multiple_choice\ndataset_path: org/name\n")
    with pytest.raises(ConfigError, match="only local files are read"):
        read_task(file)


def test_inside_lm_eval_our_model_gives_its_numbers(both, tmp_path, monkeypatch):
    """`megalm evaluate harness`: lm-eval asks, our scorer answers; the figures are those of its Hugging Face model."""
    from lm_eval.tasks import TaskManager

    from megalm.evaluate.lm_eval_model import MegalmLM

    ours, theirs = both
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=MegalmLM(path=str(ours["path"])),
        tasks=[f"own_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(ours["tasks"]), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    for task, figures in theirs["results"].items():
        for key, value in figures.items():
            if isinstance(value, float):
                assert found["results"][task][key] == pytest.approx(value, rel=1e-5), (task, key)


def test_the_command_of_the_harness(both, tmp_path, capsys):
    ours, _ = both
    from megalm.__main__ import main

    words = [
        "--tasks",
        "own_facts",
        "--include_path",
        str(ours["tasks"]),
        "--limit",
        "4",
        "--output_path",
        str(tmp_path),
    ]
    assert main(["evaluate", "harness", str(ours["path"]), *words]) == 0
    assert "own_facts" in capsys.readouterr().out and list(tmp_path.rglob("results*.json"))
