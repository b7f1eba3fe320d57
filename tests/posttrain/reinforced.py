"""A small run that learns from its own texts: prompts, a byte tokenizer and a reward with something to learn."""

from pathlib import Path

from megalm.config.compose import compose_config
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.posttrain.example import write_example
from megalm.posttrain.rollout import RolloutSource
from megalm.train.parts import build_trainer

REWARD = '''
def low(prompt, completion, record):
    """More for bytes low in the alphabet."""
    letters = completion.encode()
    return sum(letter < 128 for letter in letters) / max(len(letters), 1)
'''


def words(folder: Path, *overrides: str) -> list[str]:
    """The command line of a run of a fraction of a second a step."""
    made = write_example(folder / "example")
    (folder / "reward.py").write_text(REWARD)
    return [
        "+model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64", "model.vocab_size=264",
        "model.seq_length=32", "objective=dapo", f"data.tokenizer={made.tokenizer}", f"rollout.prompts=[{made.sums}]",
        f"rollout.rewards=[{folder}/reward.py:low]", "rollout.max_tokens=6", "rollout.group_size=4", "rollout.cut=keep",
        "train.global_batch_size=16", "train.micro_batch_size=2", "train.steps=12", "train.eval_sequences=0",
        "optim.lr=1e-2", "optim.warmup_steps=1", "guard=off", "device=cpu", "precision=fp32", "train.sample=false",
        f"run.dir={folder}/runs", "run.name=small", *overrides,
    ]  # fmt: skip


def build(world: int, arguments: list[str], folder: Path, hooks=()):
    config = compose_config(arguments)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return build_trainer(config, mesh, folder, batch_source=RolloutSource(config, mesh), hooks=hooks)


def train(world: int, arguments: list[str], folder: Path, names: tuple[str, ...], steps: int = 10):
    """The named numbers of each step, on this rank."""
    trainer = build(world, arguments, folder)
    records = [trainer.train_step() for _ in range(steps)]
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return [tuple(record[name] for name in names) for record in records]
