"""What people mistype, by the command line as they type it: status 2, one sentence that names the way out, no traceback."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.__main__ import find_tools, main

ROOT = Path(__file__).resolve().parent.parent

MISTAKES = {
    # the command
    "tokenise corpus": "Did you mean 'tokenize'?",
    "+model=tiny": "megalm train +model=tiny",
    "train.steps=5": "megalm train train.steps=5",
    "--modle tiny": "To train: megalm train +model=tiny",
    "fly": "There are: train, ",
    # words of a run
    "train --modle tiny": "Did you mean +model=tiny?",
    "train tiny": "Did you mean +model=tiny?",
    "train +model=tinny": "Did you mean 'tiny'?",
    "train +model=nowhere/model.yaml": "Give the path of a yaml file with a model's keys",
    "train +model=tiny train.step=5": "Did you mean 'train.steps'?",
    "train +model=tiny train.stepz=5": "Did you mean 'train.steps'?",
    "train +model=tiny steps=5": "Did you mean 'train.steps'?",
    "train +model=tiny +train.extra=1": "Keys of train: steps, ",
    "train +model=tiny learning_rate=3e-4": "Did you mean 'optim.lr'?",
    "train +model=tiny --lr 3": "Did you mean optim.lr=3?",
    "train +model=tiny --lr=3": "Did you mean optim.lr=3?",
    "train +model=tiny tensor_parallel=2": "Did you mean 'parallel.tensor'?",
    "train +model=tiny per_device_train_batch_size=2": "Did you mean 'train.micro_batch_size'?",
    "train +model=tiny bf16=true": "Did you mean 'precision=bf16'?",
    "train +model=tiny --bf16": "Did you mean precision=bf16?",
    "train +model=tiny worldsize=2": "Did you mean 'world_size'?",
    "train +model=tiny train steps=5": "write key=value",
    "train +model=tiny ~nothing": "Set it to null",
    "train +model=tiny +experiment=frist": "Did you mean 'first'?",
    "train +model=tiny --help nonsense": "Keys of the configuration: model, ",
    "train -m +model=tiny optim.lr=": "optim.lr=1e-3,2e-3",
    # values
    "train +model=tiny data.train=[a,b": "write \"data.train=[a,b]\"",
    "train +model=tiny data.train=a,b": "\"data.train=[a,b]\"",
    "train +model=tiny data.train=nowhere/text": "make one: `megalm tokenize INPUT",
    "train +model=tiny train.steps=many": "a whole number is needed",
    "train +model=tiny train.steps=-5": "must be at least 1",
    "train +model=tiny train.steps=": "a whole number, or null for none, is needed",
    "train +model=tiny optim.lr=fast": "a number is needed. Leave it out for 0.0003",
    "train +model=tiny optim.betas=0.9": "such as [0.9, 0.95]",
    "train +model=tiny optim=adam": "Did you mean 'adamw'?",
    "train +model=tiny optim.name=adam": "Did you mean 'adamw'?",
    "train +model=tiny precision=fp16": "Did you mean 'bf16'?",
    "train +model=tiny guard=on": "Choices: default, fp8, off, strict, watch",
    "train +model=tiny parallel.tensor=3": "Layouts near it that work",
    "train +model=tiny parallel.tensor=2 world_size=3": "Layouts near it that work on 3 ranks",
    "train +model=tiny model.num_heads=7": "Numbers of heads near it that divide: 1, 2, 4, 8",
    "train +model=tiny train.global_batch_size=7 train.micro_batch_size=2": "that divide: 1, 7",
    # a model
    "generate nowhere --prompt x": "Give a run's folder such as runs/first",
    "generate runs/frist --prompt x": "Did you mean 'runs/first'?",
    "generate": "give model (a run's folder",
    "generate runs/first --temprature 1": "Did you mean '--temperature'?",
    "generate runs/first --temperature hot": "must be a number. Without it: 0.8",
    "generate runs/first max_tokens=5": "--max-tokens 5",
    "generate runs/first --max-tokens": "its value is missing",
    "generate runs/first --dtype bf16": "Did you mean 'bfloat16'?",
    "chat nowhere": "Runs here: runs/first",
    "convert nowhere out --to hf": "Choices: huggingface, megalm, megatron",
    "convert nowhere out --to huggingface": "Give a run's folder",
    "convert nowhere": "give target and --to",
    "evaluate nowhere --suite smoke": "Give a run's folder",
    "evaluate nowhere --suite smok": "Did you mean 'smoke'?",
    "evaluate --tasks smoke": "Did you mean '--task'?",
    "inspect nowhere": "There are: batch, checkpoint, ",
    "inspect run runs/frist": "Did you mean 'runs/first'?",
    "inspect checkpoint nowhere": "Give a run's folder, such as runs/first",
    "inspect keys nonsense": "Keys of the configuration: model, ",
    "compare nowhere": "or one that holds runs",
    # the plan
    "plan nonsense": "There are: budget, cost, ",
    "plan": "which? There are: budget, ",
    "plan memroy +model=7b": "Did you mean 'memory'?",
    "plan memory +model=7b --htlm x": "Did you mean '--html'?",
    "plan memory worldsize=4": "Did you mean 'world_size'?",
    "plan memory +model=7b learning_rate=1": "Did you mean 'optim.lr'?",
    # data, jobs
    "dedup nowhere": "There are: against, exact, ",
    "dedup exact nowhere --output x": "Give files, folders, globs",
    "launch slrum +model=tiny": "Did you mean 'slurm'?",
    "launch slurm": "(as for megalm train: +model=7b",
    "tokenize nowhere": "give one of --tokenizer, --train-bpe",
    "tokenize nowhere --train-bpe 300 --output x": "Give files, folders, globs",
    "tokenize nowhere --train-bpe many": "--train-bpe many: must be a whole number",
    "filter nowhere": "a yaml file, or one of c4, ",
    "mix web": "Give a .yaml or .csv file, or an example",
    "guard replya nowhere": "Did you mean 'replay'?",
    "guard replay nowhere": "give a csv file with a header",
    "posttrain prepare nowhere": "give --tokenizer and --output",
}  # fmt: skip


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_way_out(typed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("{}")
    try:
        status = main(shlex.split(typed))
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert status == 2, said
    assert MISTAKES[typed] in said.err, said.err
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    assert said.out == ""


@pytest.mark.parametrize("tool", ["train", *find_tools()])
def test_help_of_a_tool_comes_at_once(tool):
    """Half a second of processor time is what torch alone takes longer than; none of them may import it for its help."""
    code = (
        "import sys, time, megalm.__main__ as m\n"
        f"try: status = m.main([{tool!r}, '--help'])\n"
        "except SystemExit as stopped: status = stopped.code\n"
        "print(status, 'torch' in sys.modules, time.process_time() < 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "0 False True", done.stderr
