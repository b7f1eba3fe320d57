"""Megatron-LM checkpoints of a known model, laid out rank by rank, head by head, by hand: nothing of megalm's tables is used."""

import json
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from megalm.config import ModelConfig

PADDED = 64


def make_model(**changes) -> ModelConfig:
    """4 layers, 4 query heads of 8 on 2 key/value heads, 50 words."""
    base = dict(
        num_layers=4,
        hidden_size=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_hidden_size=20,
        vocab_size=50,
        seq_length=16,
    )
    model = ModelConfig(**{**base, **changes})
    model.fill_in()
    return model


LLAMA = dict()
QWEN3 = dict(qk_norm=True, tie_embeddings=True)
GPT = dict(
    num_kv_heads=4,
    norm="layernorm",
    norm_bias=True,
    activation="gelu_tanh",
    position="learned",
    linear_bias=True,
    qkv_bias=True,
    attention_out_bias=True,
    tie_embeddings=True,
)
MODELS = {"llama": LLAMA, "qwen3": QWEN3, "gpt": GPT}


def random_weights(m: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every global tensor of the model, with values that occur nowhere twice."""
    generator = torch.Generator().manual_seed(seed)
    hidden, q, kv, f = m.hidden_size, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.ffn_hidden_size
    shapes = {"embedding.weight": (m.vocab_size, hidden), "final_norm.weight": (hidden,)}
    if m.position == "learned":
        shapes["position_embedding.weight"] = (m.seq_length, hidden)
    if not m.tie_embeddings:
        shapes["output.weight"] = (m.vocab_size, hidden)
    if m.norm_bias:
        shapes["final_norm.bias"] = (hidden,)
    for i in range(m.num_layers):
        p = f"layers.{i}."
        matrices = {"attention.query": (q, hidden), "attention.key": (kv, hidden), "attention.value": (kv, hidden)}
        matrices |= {"attention.output": (hidden, q), "mlp.up": (f, hidden), "mlp.down": (hidden, f)}
        if m.gated:
            matrices["mlp.gate"] = (f, hidden)
        for name, shape in matrices.items():
            shapes[f"{p}{name}.weight"] = shape
            if m.linear_bias:
                shapes[f"{p}{name}.bias"] = shape[:1]
        for norm in ("attention_norm", "mlp_norm"):
            shapes[f"{p}{norm}.weight"] = (hidden,)
            if m.norm_bias:
                shapes[f"{p}{norm}.bias"] = (hidden,)
        if m.qk_norm:
            shapes[f"{p}attention.query_norm.weight"] = shapes[f"{p}attention.key_norm.weight"] = (m.head_dim,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def arguments(m: ModelConfig, tensor: int = 1, pipeline: int = 1, **more) -> Namespace:
    return Namespace(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_heads,
        group_query_attention=m.num_kv_heads != m.num_heads,
        num_query_groups=m.num_kv_heads,
        kv_channels=m.head_dim,
        max_position_embeddings=m.seq_length,
        padded_vocab_size=PADDED,
        position_embedding_type={"rope": "rope", "learned": "learned_absolute"}[m.position],
        rotary_base=10000,
        normalization="LayerNorm" if m.norm == "layernorm" else "RMSNorm",
        norm_epsilon=1e-5,
        swiglu=m.gated,
        add_bias_linear=m.linear_bias,
        bias_gelu_fusion=True,
        qk_layernorm=m.qk_norm,
        untie_embeddings_and_output_weights=not m.tie_embeddings,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **more,
    )


def padded(table: torch.Tensor) -> torch.Tensor:
    """Padding holds values, too: Megatron trains those rows along."""
    return torch.cat([table, torch.full((PADDED - len(table), table.shape[1]), 7.0)])


def qkv_of_rank(w: dict, p: str, kind: str, m: ModelConfig, rank: int, tensor: int, version: float) -> torch.Tensor:
    """The fused rows of one rank."""
    d, groups, per_group = m.head_dim, m.num_kv_heads, m.num_heads // m.num_kv_heads
    query, key, value = (w[f"{p}attention.{name}.{kind}"] for name in ("query", "key", "value"))
    rows = []
    for group in range(rank * groups // tensor, (rank + 1) * groups // tensor):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(("q", head, query[head * d : (head + 1) * d]))
        rows.append(("k", group, key[group * d : (group + 1) * d]))
        rows.append(("v", group, value[group * d : (group + 1) * d]))
    if version >= 2:
        return torch.cat([block for _, _, block in rows])
    if version == 0:  # all queries, all keys, all values
        return torch.cat([block for letter in "qkv" for kind_, _, block in rows if kind_ == letter])
    heads = [[block for _, h, block in rows if h == head] for head in sorted({h for _, h, _ in rows})]
    return torch.cat([torch.stack(blocks, dim=1).flatten(0, 1) for blocks in heads])  # 1: element by element


def layer_of_rank(w: dict, i: int, m: ModelConfig, rank: int, tensor: int, version: float = 3.0) -> dict:
    """One layer's tensors on one rank, in Megatron core's plain names without the layer's prefix."""
    p = f"layers.{i}."
    q, f = m.num_heads * m.head_dim // tensor, m.ffn_hidden_size // tensor
    out = {}
    for kind in ("weight", "bias") if m.norm_bias else ("weight",):
        out[f"input_layernorm.{kind}"] = w[f"{p}attention_norm.{kind}"]
        out[f"pre_mlp_layernorm.{kind}"] = w[f"{p}mlp_norm.{kind}"]
    if m.qk_norm:
        out["self_attention.q_layernorm.weight"] = w[f"{p}attention.query_norm.weight"]
        out["self_attention.k_layernorm.weight"] = w[f"{p}attention.key_norm.weight"]
    for kind in ("weight", "bias") if m.linear_bias else ("weight",):
        out[f"self_attention.linear_qkv.{kind}"] = qkv_of_rank(w, p, kind, m, rank, tensor, version)
        up = w[f"{p}mlp.up.{kind}"][rank * f : (rank + 1) * f]
        gate = [w[f"{p}mlp.gate.{kind}"][rank * f : (rank + 1) * f]] if m.gated else []
        out[f"mlp.linear_fc1.{kind}"] = torch.cat([*gate, up])
    out["self_attention.linear_proj.weight"] = w[f"{p}attention.output.weight"][:, rank * q : (rank + 1) * q]
    out["mlp.linear_fc2.weight"] = w[f"{p}mlp.down.weight"][:, rank * f : (rank + 1) * f]
    if m.linear_bias:
        out["self_attention.linear_proj.bias"] = w[f"{p}attention.output.bias"]
        out["mlp.linear_fc2.bias"] = w[f"{p}mlp.down.bias"]
    return {name: tensor_.clone() for name, tensor_ in out.items()}


LEGACY_NAMES = {
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
NORM_NAMES = {
    "legacy": {"input_layernorm": "input_norm", "pre_mlp_layernorm": "post_attention_norm"},
    "legacy-2.6": {"pre_mlp_layernorm": "post_attention_layernorm"},
    "te": {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
    },
    "plain": {},
}


def respell(name: str, spelling: str) -> str:
    table = {**(LEGACY_NAMES if spelling.startswith("legacy") else {}), **NORM_NAMES[spelling]}
    for plain, theirs in table.items():
        name = name.replace(plain, theirs)
    return name


def chunk_state(w: dict, m: ModelConfig, layers: range, rank: int, tensor: int, spelling: str, version: float) -> dict:
    """The model's state dict of one rank and chunk."""
    first, last = layers.start == 0, layers.stop == m.num_layers
    share = slice(rank * PADDED // tensor, (rank + 1) * PADDED // tensor)
    words = padded(w["embedding.weight"])[share].clone()
    body = {}
    for local, i in enumerate(layers):
        for name, value in layer_of_rank(w, i, m, rank, tensor, version).items():
            body[respell(f"layers.{local}.{name}", spelling)] = value
    if last:
        for kind in ("weight", "bias") if m.norm_bias else ("weight",):
            body[("final_norm." if spelling == "legacy" else "final_layernorm.") + kind] = w[f"final_norm.{kind}"]
    output = None if m.tie_embeddings else padded(w["output.weight"])[share].clone()
    if spelling.startswith("legacy"):
        language = {"encoder": body}
        if first:
            language["embedding"] = {"word_embeddings": {"weight": words}}
            if m.position == "learned":
                language["embedding"]["position_embeddings"] = {"weight": w["position_embedding.weight"]}
        if last and output is not None:
            language["output_layer"] = {"weight": output}
        state = {"language_model": language}
        if last and not first and m.tie_embeddings:
            state["word_embeddings_for_head"] = {"weight": words}
        return state
    state = {f"decoder.{name}": value for name, value in body.items()}
    if spelling == "te":
        state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.tensor([1, 2], dtype=torch.uint8)
    if first:
        state["embedding.word_embeddings.weight"] = words
        if m.position == "learned":
            state["embedding.position_embeddings.weight"] = w["position_embedding.weight"]
    if last and output is not None:
        state["output_layer.weight"] = output
    if last and not first and m.tie_embeddings:
        state["output_layer.weight"] = words
    return state


def write_ranks(
    folder: Path,
    w: dict,
    m: ModelConfig,
    tensor: int = 1,
    pipeline: int = 1,
    *,
    spelling: str = "te",
    virtual: int = 1,
    version: float = 3.0,
    stage_layers: list[int] | None = None,
    **more,
) -> Path:
    """The mp_rank_* files; returns the checkpoint's folder."""
    counts = stage_layers or [m.num_layers // (pipeline * virtual)] * (pipeline * virtual)
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    target = folder / "iter_0000300"
    for stage in range(pipeline):
        for rank in range(tensor):
            chunks = [range(starts[c * pipeline + stage], starts[c * pipeline + stage + 1]) for c in range(virtual)]
            states = [chunk_state(w, m, layers, rank, tensor, spelling, version) for layers in chunks]
            content = {"args": arguments(m, tensor, pipeline), "iteration": 300, "checkpoint_version": version, **more}
            content |= {"model": states[0]} if virtual == 1 else {f"model{c}": state for c, state in enumerate(states)}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (target / name).mkdir(parents=True)
            torch.save(content, target / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    return folder


def stacked_state(w: dict, m: ModelConfig) -> dict:
    """The tensors of a torch_dist folder by key: whole, with layers stacked."""
    layers = [layer_of_rank(w, i, m, 0, 1) for i in range(m.num_layers)]
    state = {
        f"decoder.layers.{respell(name, 'te')}": torch.stack([layer[name] for layer in layers]) for name in layers[0]
    }
    state["embedding.word_embeddings.weight"] = padded(w["embedding.weight"])
    if m.position == "learned":
        state["embedding.position_embeddings.weight"] = w["position_embedding.weight"]
    for kind in ("weight", "bias") if m.norm_bias else ("weight",):
        state[f"decoder.final_layernorm.{kind}"] = w[f"final_norm.{kind}"]
    if not m.tie_embeddings:
        state["output_layer.weight"] = padded(w["output.weight"])
    return state


def write_torch_dist(
    folder: Path, w: dict, m: ModelConfig, *, common: str = "file", optimizer: dict[str, dict] | None = None
) -> Path:
    """A torch_dist folder, written by torch.distributed.checkpoint itself; `optimizer`: param, exp_avg, exp_avg_sq."""
    target = folder / "iter_0000300"
    state = stacked_state(w, m)
    content = {"args": arguments(m, consumed_train_samples=1200), "iteration": 300, "checkpoint_version": 3.0}
    if optimizer is None:  # a piece of it, as bucketed formats leave some
        state["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = torch.zeros(PADDED, m.hidden_size)
    else:
        for kind, values in optimizer.items():
            state |= {f"optimizer.state.{kind}.{key}": value for key, value in stacked_state(values, m).items()}
        content["optimizer"] = {"optimizer": {"param_groups": [{"step": 299}, {"step": 299}]}}
    if common == "object":
        state["common_state/shard_0_1"] = content
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(target), planner=planner, no_dist=True)
    if common == "file":
        torch.save(content, target / "common.pt")
    (target / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "latest_checkpointed_iteration.txt").write_text("300")
    return folder
