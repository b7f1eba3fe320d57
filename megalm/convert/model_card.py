"""The README.md of an exported model: what it is, what it was trained on, how far, and by which version of the code."""

from __future__ import annotations

from pathlib import Path

from megalm import __version__
from megalm.config import Config, ModelConfig
from megalm.convert.source import TrainingFacts
from megalm.journal.lines import read_json_lines


def collect_training_facts(config: Config, run: Path, step: int, tokens: int) -> TrainingFacts | None:
    """Collect what is known of a run's training; None for one that has not trained (an import)."""
    records = [record for record in read_json_lines(run / "metrics.jsonl") if record.get("step", 0) <= step]
    if not records and not tokens:
        return None
    count = len(config.data.train)
    weights: list[float | None] = list(config.data.weights) if config.data.weights else [None for _ in range(count)]
    data = tuple(
        prefix if weight is None else f"{prefix} (weight {weight:g})"
        for prefix, weight in zip(config.data.train, weights, strict=False)
    )
    return TrainingFacts(
        name=config.run.name or run.name,
        step=step,
        tokens=tokens,
        data=data,
        loss=_last(records, "loss"),
        eval_loss=_last(records, "eval/loss"),
        begun_from=str(config.checkpoint.load_path) if config.checkpoint.load_path else None,
        optimizer=config.optim.name,
        sequence_length=config.model.seq_length,
        version=__version__,
    )


def _last(records: list[dict], key: str) -> float | None:
    return next((record[key] for record in reversed(records) if isinstance(record.get(key), int | float)), None)


def write_card(facts: TrainingFacts, model: ModelConfig, parameters: int, chat: bool) -> str:
    """Write the text of the card."""
    table = {
        "architecture": f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "parameters": f"{parameters:,}",
        "begun from": facts.begun_from,
        "data": "<br>".join(facts.data) or None,
        "tokens": f"{facts.tokens:,} in {facts.step:,} steps of sequences of {facts.sequence_length:,}",
        "training loss (last step)": None if facts.loss is None else f"{facts.loss:.4f}",
        "loss on held-out data": None if facts.eval_loss is None else f"{facts.eval_loss:.4f}",
        "optimizer": facts.optimizer,
        "code": f"megalm {facts.version}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in table.items() if value is not None)
    talk = (
        'messages = [{"role": "user", "content": "Hello"}]\n'
        'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if chat
        else 'prompt = tokenizer("Once upon a time", return_tensors="pt")'
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- megalm
---

# {facts.name}

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
{talk}
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

This card was written by the export. Say here what the model is for, what it must not be used for, and under which licence it is.
"""
