"""Shows an item as a model is asked it, and what the model says."""

import argparse
import json

from megalm.config.errors import ConfigError
from megalm.evaluate.evaluation import Model
from megalm.evaluate.item import Task
from megalm.evaluate.measure import judge_scores
from megalm.evaluate.protocols import Prompt, Protocol, find_protocol
from megalm.evaluate.tasks.suite import read_suite
from megalm.evaluate.written import Marker

from .run import add_model_arguments, add_suite_arguments, choose_markers, load

HELP = "show the exact prompt of an item, its choices, their log-likelihoods, and what the model says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="TASK", help="a task of the suite")
    parser.add_argument("item", type=int, help="its number, from 1")
    add_model_arguments(parser)
    add_suite_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    suite = read_suite(args.suite, args.data, [args.name] if args.suite.endswith((".yaml", ".yml")) else [])
    task = next((task for task in suite.tasks if task.name == args.name), None)
    if task is None:
        raise ConfigError(
            f"{args.suite}: there is no task {args.name!r}; there are {', '.join(t.name for t in suite.tasks)}"
        )
    if not 1 <= args.item <= len(task.items):
        raise ConfigError(f"{args.name}: there is no item {args.item}; it has {len(task.items)}")
    protocol = find_protocol(args.protocol or suite.protocol)
    shown = describe(load(args), task, args.item, protocol, choose_markers(args).get(task.kind))
    if args.json:
        print(json.dumps(shown, indent=2, ensure_ascii=False))
        return 0
    print(f"{task.name}, item {args.item}, by the protocol {protocol.name}, {task.num_fewshot} examples")
    for request in shown["requests"]:
        print(
            f"\n--- {request['tokens']} of {request['ids']} tokens are scored\n{request['prompt']}[[{request['scored']}]]"
        )
        if "log_probability" in request:
            print(f"    log-likelihood {request['log_probability']:.4f}, likeliest: {request['likeliest']}")
    if "text" in shown:
        note = f"; {shown['note']}" if shown["note"] else ""
        print(f"\nthe model writes: {shown['text']!r}; answers: {', '.join(map(repr, shown['answers']))}{note}")
    print("\n" + "  ".join(f"{name} {value:.4g}" for name, value in shown["values"].items()))
    if shown.get("chosen"):
        print(
            "chosen: "
            + ", ".join(f"{name} {n + 1}" for name, n in shown["chosen"].items())
            + f"; right: {shown['right']}"
        )
    return 0


def describe(model: Model, task: Task, number: int, protocol: Protocol, marker: Marker | None) -> dict:
    """An item's prompts as the model gets them, decoded from the ids, and what comes of it. marker: judges what is written."""
    prompts = list(protocol.prompts(task, model.tokenizer, model.length, number))
    prompt: Prompt = prompts[-1]
    item = task.items[number - 1]
    requests = []
    for request in prompt.requests:
        split = len(request.ids) - request.count
        requests.append(
            {
                "prompt": model.tokenizer.decode(request.ids[:split]),
                "scored": model.tokenizer.decode(request.ids[split:]),
                "ids": len(request.ids),
                "tokens": request.count,
            }
        )
    if marker is not None:
        marker.check(task)
        texts = model.write(prompt.requests, task)
        (mark,) = marker.mark([item], texts, task)
        written = {"text": texts[0], "answers": item.continuations, "values": mark.values, "note": mark.note}
        return {"requests": requests, **written}
    scores = model.scorer.score(prompt.requests)
    for shown, score in zip(requests, scores, strict=True):
        shown |= {"log_probability": score.log_probability, "likeliest": score.likeliest}
    outcome = judge_scores(item, scores, protocol)
    right = ", ".join(str(n + 1) for n in item.gold)
    return {"requests": requests, "values": outcome.values, "chosen": outcome.chosen, "right": right}
