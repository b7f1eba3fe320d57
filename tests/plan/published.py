"""Published tables as facts, each row with its source, and the models and layouts that they speak of."""

import csv
from dataclasses import dataclass
from pathlib import Path

from megalm.architecture.flops import count_narayanan_batch_flops
from megalm.config import ModelConfig
from megalm.plan.layout import Layout
from megalm.plan.machine import Machine, make_planned_machine

FACTS = Path(__file__).parent / "facts"


def rows(name: str) -> list[dict[str, str]]:
    with (FACTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def gpt(layers: int, heads: int, hidden: int, vocabulary: int, length: int) -> ModelConfig:
    """GPT as the tables count it: learned positions, biases everywhere, 4h MLP, tied embeddings."""
    model = ModelConfig(
        name="gpt",
        num_layers=layers,
        num_heads=heads,
        hidden_size=hidden,
        vocab_size=vocabulary,
        seq_length=length,
        norm="layernorm",
        norm_bias=True,
        activation="gelu",
        position="learned",
        linear_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        tie_embeddings=True,
    )
    model.fill_in()
    return model


@dataclass
class Published:
    """One row: a model trained under a layout on a machine, with the measured seconds of a step."""

    name: str
    model: ModelConfig
    layout: Layout
    machine: Machine
    step_seconds: float
    row: dict[str, str]


def mpt_benchmark() -> list[Published]:
    found = []
    for row in rows("mpt_benchmark"):
        figures = (int(row[key]) for key in ("num_layers", "num_heads", "hidden_size", "vocab_size", "seq_length"))
        model = gpt(*figures)
        layout = Layout(
            data=int(row["gpus"]),
            zero_stage=2,
            fully_shard=True,
            recompute=row["recompute"],
            micro_batch=int(row["micro_batch"]),
            global_batch=int(row["global_batch"]),
        )
        seconds = layout.global_batch * model.seq_length / float(row["tokens_per_second"])
        name = f"{row['gpu']} {row['model']} x {row['seq_length']} on {row['gpus']}, micro-batch {row['micro_batch']}"
        found.append(Published(name, model, layout, make_planned_machine(row["gpu"], layout.world), seconds, row))
    return found


def narayanan() -> list[Published]:
    found = []
    for row in rows("narayanan_2021"):
        model = gpt(int(row["num_layers"]), int(row["num_heads"]), int(row["hidden_size"]), 51200, 2048)
        gpus, tensor, pipeline = int(row["gpus"]), int(row["tensor"]), int(row["pipeline"])
        layout = Layout(
            data=gpus // tensor // pipeline,
            tensor=tensor,
            pipeline=pipeline,
            recompute="full",
            micro_batch=int(row["micro_batch"]),
            global_batch=int(row["global_batch"]),
        )
        seconds = count_narayanan_batch_flops(model, layout.global_batch) / (gpus * float(row["tflops_per_gpu"]) * 1e12)
        name = f"a100-80gb {row['parameters_billion']}B on {gpus}, tensor {tensor}, pipeline {pipeline}"
        found.append(Published(name, model, layout, make_planned_machine("a100-80gb", gpus), seconds, row))
    return found
