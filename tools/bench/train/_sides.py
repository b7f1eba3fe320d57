"""The sides of the training benchmark: each trains the same shape in a process of its own, as its users run it."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ._plain import build_plain

SIDES = {
    "transformers": "Hugging Face transformers, eager, torch's fused AdamW",
    "megalm": "this engine",
    "transformers-compiled": "the same as transformers, model and loss through torch.compile",
    "plain": "a plain Llama in torch: no engine around it (see _plain.py)",
    "plain-compiled": "the same, each layer and the loss through torch.compile, cuDNN's attention first: as torchtitan trains",
    "megalm-dense": "with --model moe: this engine with a dense MLP of the chosen experts' width, the same active FLOPs",
    "reference": "this engine with ops.backend=reference: plain PyTorch in place of its kernels",
}
EXPERTS, TOP_K = 8, 2
"""Of Mixtral, which is the peer of a mixture."""
WARM_UP = {"cpu": 1, "cuda": 3}
"""Steps before the first that counts; on a GPU libraries choose and load their kernels in them."""


@dataclass(frozen=True)
class Job:
    """What every side trains."""

    shape: dict[str, Any]
    micro_batch: int
    dtype: str
    device: str
    threads: int
    folder: str
    shared_weights: bool
    """Whether transformers' weights are written to the folder and the others start from them."""
    mixture: bool = False
    """Whether the MLP is a mixture, of EXPERTS experts that are as wide together as the shape's where TOP_K are chosen."""

    @property
    def tokens(self) -> int:
        """In a step."""
        return self.micro_batch * self.shape["seq_length"]


class SideEnded(Exception):
    """The side's process ended early; its own message is above."""


class Side:
    """One side's process; it starts with steps that are not measured."""

    def __init__(self, name: str, job: Job) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, name, job), daemon=True)
        self._process.start()
        other.close()
        self.memory: dict[str, float] = {}
        """Bytes of the device: `allocated` and `reserved` at most by torch, `in_use` at the end by whoever runs there."""

    def ready(self, timeout: float | None = None) -> bool:
        """Whether it has made its first steps within so many seconds. Errors: SideEnded"""
        if not self._pipe.poll(timeout):
            return False
        self._answer()
        return True

    def run(self, steps: int) -> tuple[float, float]:
        """(seconds of these steps, loss of the last one). Errors: SideEnded"""
        self._pipe.send(steps)
        seconds, loss, self.memory = self._answer()
        return seconds, loss

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            try:
                self._pipe.send(0)
                self._process.join(5)
            except OSError:
                pass
            self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise SideEnded(f"the process of {self.name} ended early") from None


def _serve(pipe: Connection, name: str, job: Job) -> None:
    """Steps on request."""
    import torch

    torch.set_num_threads(job.threads)
    made = _choose_step(name, job)
    for _ in range(WARM_UP[job.device]):
        loss = made()
    float(loss)
    if job.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    pipe.send(name)
    while steps := pipe.recv():
        begun = time.perf_counter()
        for _ in range(steps):
            loss = made()
        last = float(loss)
        if job.device == "cuda":
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - begun, last, _memory(job.device)))


def _choose_step(name: str, job: Job) -> Callable[[], Any]:
    compiled = name.endswith("compiled")
    if name.startswith("transformers"):
        return train_with_torch(_peer(job), job, compiled)
    if name.startswith("plain"):
        return train_with_torch(build_plain(job.shape, job.device), job, False, layers_compiled=compiled)
    return _our_step(job, name)


def _memory(device: str) -> dict[str, float]:
    if device != "cuda":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "in_use": total - free,
    }


def _batch(job: Job) -> tuple[Any, Any]:
    """The same random tokens for all: inputs and labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (job.micro_batch, job.shape["seq_length"] + 1)
    tokens = torch.randint(job.shape["vocab_size"], shape, generator=generator).to(job.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _peer(job: Job) -> Any:
    """LlamaForCausalLM or MixtralForCausalLM with random weights, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    shape = {
        "hidden_size": job.shape["hidden_size"],
        "num_hidden_layers": job.shape["num_layers"],
        "num_attention_heads": job.shape["num_heads"],
        "num_key_value_heads": job.shape.get("num_kv_heads", job.shape["num_heads"]),
        "vocab_size": job.shape["vocab_size"],
        "max_position_embeddings": job.shape["seq_length"],
        "attn_implementation": "sdpa",
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    width = job.shape["ffn_hidden_size"]
    model: Any
    with torch.device("cpu" if job.shared_weights else job.device):
        if job.mixture:
            experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "rms_norm_eps": 1e-6}
            model = MixtralForCausalLM(MixtralConfig(intermediate_size=width // TOP_K, **experts, **shape))
        else:
            model = LlamaForCausalLM(LlamaConfig(intermediate_size=width, **shape))
    model = model.to(job.device)
    if job.shared_weights:
        model.save_pretrained(job.folder)
    return model


def train_with_torch(model: Any, job: Job, compiled: bool, *, layers_compiled: bool = False) -> Callable[[], Any]:
    """Steps of torch's fused AdamW, without decay on norms and embeddings, and clipping; bf16 by autocast with fp32 weights.

    compiled: model and loss through torch.compile as one; layers_compiled: each layer, and the loss, by themselves.
    """
    import torch

    if layers_compiled:
        for layer in model.layers:
            layer.compile(fullgraph=True)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and "embed" not in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=True,
    )
    inputs, labels = _batch(job)
    vocabulary = job.shape["vocab_size"]

    def loss_of(inputs: Any, labels: Any) -> Any:
        return measure(model(input_ids=inputs).logits, labels)

    def measure_loss(logits: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits.view(-1, vocabulary).float(), labels.view(-1))

    measure = torch.compile(measure_loss) if layers_compiled else measure_loss
    run = torch.compile(loss_of) if compiled else loss_of

    def step() -> Any:
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = run(inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def compose_our_config(job: Job) -> Any:
    """The engine's configuration of the shape."""
    from megalm.config import Config, ModelConfig
    from megalm.config.model import MoEConfig

    moe = MoEConfig()
    if job.mixture:
        width = job.shape["ffn_hidden_size"] // TOP_K
        moe = MoEConfig(
            num_experts=EXPERTS,
            top_k=TOP_K,
            ffn_hidden_size=width,
            score="softmax",
            selection_bias=False,
            balance_loss=0.0,
        )

    model = ModelConfig(
        name="bench",
        **{name: value for name, value in job.shape.items() if name != "num_kv_heads"},
        norm="rmsnorm",
        norm_eps=1e-6,
        rope_theta=1e6 if job.mixture else 1e4,  # their classes' own
        activation="swiglu",
        position="rope",
        tie_embeddings=False,
        num_kv_heads=job.shape.get("num_kv_heads", job.shape["num_heads"]),
        head_dim=job.shape["hidden_size"] // job.shape["num_heads"],
        moe=moe,
    )
    model.fill_in()
    config = Config(model=model)
    config.train.global_batch_size = config.train.micro_batch_size = job.micro_batch
    config.precision.dtype = job.dtype
    return config


def _our_step(job: Job, name: str) -> Callable[[], float]:
    """The trainer's own pieces: model, executor, sharded optimizer, one statistics message, clipping."""
    import torch

    from megalm import ops
    from megalm.convert.formats import open_source
    from megalm.data.batch import Batch
    from megalm.generate.model import fill_weights
    from megalm.optim.sharded import ShardedOptimizer
    from megalm.parallel.mesh import Mesh
    from megalm.pipeline.execute import Executor
    from megalm.precision.policy import DTYPES
    from megalm.train.build import build_chunks, choose_schedule

    if name == "reference":
        ops.set_backend("reference")
    if job.device == "cpu":
        ops.keep_freed_memory()  # as each rank of a run does
    if name == "megalm-dense":
        job = replace(job, mixture=False, shared_weights=False)
    config = compose_our_config(job)
    mesh = Mesh.single(torch.device(job.device, 0) if job.device == "cuda" else job.device)
    chunks = build_chunks(config, mesh)
    if job.shared_weights:
        with torch.no_grad():
            fill_weights(chunks[0], open_source(Path(job.folder)).weights)
    optimizer = ShardedOptimizer(chunks, config.optim, mesh, config.parallel)
    executor = Executor(
        chunks,
        choose_schedule(config),
        mesh.pipeline,
        micro_batch_size=job.micro_batch,
        seq_length=job.shape["seq_length"],
        hidden_size=job.shape["hidden_size"],
        dtype=DTYPES[job.dtype],
        device=mesh.device,
    )
    batch = Batch(*_batch(job))

    def step() -> float:
        optimizer.begin_step(1)
        reports = executor.run([batch], scale=1.0 / job.tokens)
        optimizer.finish_gradients()
        norm, _, extra = optimizer.statistics(extra=reports[0]["loss"].reshape(1))
        grad_norm, loss_sum = torch.stack([norm, extra[0]]).tolist()
        optimizer.step(1e-4, grad_scale=min(1.0, 1.0 / (grad_norm + 1e-6)))
        return loss_sum / job.tokens

    return step
