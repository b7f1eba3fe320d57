"""Small mixtures of every kind, and runs of them that another layout must repeat."""

import torch

from megalm.config.compose import compose_config
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.parallel.slices import state_boxes
from megalm.train.parts import build_trainer
from tests.small_run import small_run

KINDS = {
    "mixtral": [
        "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.score=softmax", "model.moe.balance_loss=1e-2",
        "model.moe.z_loss=1e-2",
    ],
    "deepseek": [
        "model.moe.num_experts=8", "model.moe.top_k=3", "model.moe.ffn_hidden_size=32", "model.moe.num_shared_experts=1",
        "model.moe.groups=4", "model.moe.top_groups=2", "model.moe.group_scores=2", "model.moe.weight_scale=2.5",
        "model.moe.first_dense=1", "model.moe.bias_rate=0.02", "model.moe.balance_loss=1e-2",
    ],
    "gpt-oss": [
        "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.score=softmax", "model.moe.router_bias=true",
        "model.linear_bias=true", "model.activation=clamped_swiglu", "model.moe.balance=global",
        "model.moe.balance_loss=1e-2",
    ],
    "qwen2": [
        "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.score=softmax", "model.moe.weight_norm=null",
        "model.moe.shared_ffn_hidden_size=48", "model.moe.shared_gate=true", "model.moe.every=2",
        "model.moe.balance_loss=1e-2",
    ],
    "prediction": [
        "model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.num_shared_experts=1", "model.moe.bias_rate=0.02",
        "model.moe.first_dense=1", "model.prediction.depth=2", "data.packing=documents",
    ],
}  # fmt: skip
"""Overrides by the family that they are like."""


def mixture_run(folder, kind, *overrides):
    """Overrides of a small run of a mixture; a larger initial deviation keeps scores apart."""
    usual = ("guard=off", "train.eval_every=0", "train.eval_sequences=0", "optim.eps=1e-6", "checkpoint.every=0")
    return small_run(folder, *KINDS[kind], "model.init_std=0.1", *usual, *overrides)


def train(world, arguments, folder, steps=3):
    """(records, gradients of the last step by name and offset, states by name) of a run on this rank."""
    config = compose_config(arguments)
    resolve(config, world)
    mesh = build_mesh(config.parallel, "cpu")
    trainer = build_trainer(config, mesh, folder)
    records = [trainer.train_step() for _ in range(steps)]
    gradients = gradients_of(trainer)
    states = {box.name: box.tensor.clone() for chunk in trainer.model_chunks for box in state_boxes(chunk)}
    trainer.checkpoints.close()
    trainer.batch_source.close()
    return records, gradients, states


def gradients_of(trainer):
    """What this rank holds of each tensor's summed gradient: (name, offset in the flat tensor) -> values."""
    found = []
    for part in trainer.optimizer.parts():
        gradient = part.gradient()
        for stretch in part.stretches:
            piece = stretch.piece
            found.append((piece.name, piece.global_shape, piece.offset, piece.shape, stretch.skip,
                          gradient[stretch.start : stretch.stop].clone()))  # fmt: skip
    return found


def whole_gradients(ranks):
    """Every tensor's whole gradient from what the ranks hold; asserts that copies agree and that nothing is missing."""
    sums, seen = {}, {}
    for held in ranks:
        for name, global_shape, offset, shape, skip, values in held:
            whole = sums.setdefault(name, torch.zeros(global_shape))
            there = seen.setdefault(name, torch.zeros(global_shape, dtype=torch.bool))
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            own, known = whole[box].flatten(), there[box].flatten()
            place = slice(skip, skip + values.numel())
            double = known[place]
            torch.testing.assert_close(own[place][double], values[double], rtol=1e-6, atol=1e-7)
            own[place], known[place] = values, True
            whole[box], there[box] = own.view(shape), known.view(shape)
    for name, there in seen.items():
        assert there.all(), f"{name}: some of it is on no rank"
    return sums
