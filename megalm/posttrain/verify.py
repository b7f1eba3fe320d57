"""Answers of several models to the same prompts, judged by a reward: what a run has learned, in figures and in texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config.errors import ConfigError
from megalm.config.rollout import RolloutConfig
from megalm.evaluate.statistics import wilson_interval
from megalm.generate.model import load_model, open_tokenizer, stop_tokens
from megalm.generate.sampling import Sampling
from megalm.generate.text import write_texts
from megalm.page.document import Block, Facts, Fold, Table, render_page
from megalm.posttrain.prepare import find_template
from megalm.posttrain.prompts import PromptRecord, name_files, read_prompts
from megalm.posttrain.render import Renderer
from megalm.posttrain.rewards import Rewards


@dataclass(frozen=True)
class Answer:
    """What a model wrote to a prompt."""

    text: str
    ended: bool
    """By itself, before the most tokens that it might write."""
    reward: float


@dataclass(frozen=True)
class Score:
    """A model's rewards on a file's prompts."""

    model: str
    prompts: str
    count: int
    mean: float
    low: float
    high: float
    """The 95% interval of the mean, where rewards are 0 or 1 (Wilson 1927)."""
    ended: float


@dataclass(frozen=True)
class Verified:
    """All answers, by model, in the order of the prompts."""

    models: list[str]
    files: list[str]
    prompts: list[PromptRecord]
    answers: list[list[Answer]]

    def scores(self) -> list[Score]:
        """Score each model on each file."""
        found = []
        for name, answers in zip(self.models, self.answers, strict=True):
            for number, file in enumerate(self.files):
                own = [answer for answer, prompt in zip(answers, self.prompts, strict=True) if prompt.file == number]
                total, count = sum(answer.reward for answer in own), len(own)
                low, high = wilson_interval(min(max(total, 0.0), count), count)
                ended = sum(answer.ended for answer in own) / count
                found.append(Score(name, file, count, total / count, low, high, ended))
        return found


def verify(
    folders: Sequence[Path],
    files: Sequence[str],
    rewards: Sequence[str],
    max_tokens: int,
    tokenizer: Path | None = None,
) -> Verified:
    """Let each model answer every prompt, always by the likeliest token, and judge what it wrote.

    Errors: ConfigError for a folder without a model or tokenizer, for a prompt that cannot be read, or for a reward that fails
    """
    judge = Rewards(RolloutConfig(prompts=list(files), rewards=list(rewards)))
    prompts: list[PromptRecord] = []
    answers = []
    try:
        for folder in folders:
            source, model = load_model(folder)
            words = open_tokenizer(source, tokenizer)
            renderer = Renderer(find_template(words, None), words)
            prompts = read_prompts(files, renderer, source.model.seq_length + 1 - max_tokens)
            sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
            ids, stop = [prompt.ids for prompt in prompts], stop_tokens(source, words)
            texts = write_texts(model, words, ids, sampling, stop_tokens=stop)
            answers.append(
                [
                    Answer(one.text, one.written.reason == "stop", _judge(judge, prompt, one.text))
                    for prompt, one in zip(prompts, texts, strict=True)
                ]
            )
    finally:
        judge.close()
    return Verified([str(folder) for folder in folders], name_files(files), prompts, answers)


def _judge(rewards: Rewards, prompt: PromptRecord, text: str) -> float:
    judged = rewards.judge(prompt.text, text, prompt.record)
    if judged.failure is not None:
        raise ConfigError(f"{prompt.place}: the prompt {prompt.text!r}: {judged.failure}.")
    return rewards.total(judged.values)


def render_verified(verified: Verified, rewards: Sequence[str]) -> str:
    """Render one self-contained page: scores first, then every prompt with all answers beside each other."""
    scores = verified.scores()
    blocks: list[Block] = [Facts({f"{s.model}: {s.prompts}": f"{100 * s.mean:.0f}%" for s in scores})]
    for number, file in enumerate(verified.files):
        rows = [
            [prompt.text, str(prompt.record.get("answer", "")), *(_mark(answers[at]) for answers in verified.answers)]
            for at, prompt in enumerate(verified.prompts)
            if prompt.file == number
        ]
        blocks.append(Table(file, ["prompt", "answer", *verified.models], rows, f"judged by {', '.join(rewards)}"))
    return render_page("Answers beside each other", blocks)


def _mark(answer: Answer) -> str | Fold:
    text = ("\u2713 " if answer.reward > 0 else "\u2717 ") + answer.text + ("" if answer.ended else " \u2026")
    return text if len(text) < 200 else Fold(text[:60], text)
