"""Mixtures in Megatron core's torch_dist checkpoints: it reads what we write, we read what it writes, both compute the same
logits; what its arguments cannot say is refused."""

import contextlib
import logging
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalm.architecture.tensors import list_states, list_tensors
from megalm.config import ConfigError, ModelConfig
from megalm.config.model import MoEConfig
from megalm.convert.formats import open_source
from megalm.convert.huggingface_config import collect_function
from megalm.convert.megatron_args import read_args, write_args
from megalm.convert.megatron_dist import write_dist
from megalm.convert.megatron_legacy import write_legacy
from megalm.convert.source import OptimizerState, Source
from megalm.convert.weights import MemoryWeights
from megalm.generate.model import build_model, compute_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core.dist_checkpointing")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

PADDED, EXPERTS = 64, 8
MIXTRAL = MoEConfig(num_experts=EXPERTS, top_k=2, ffn_hidden_size=12, score="softmax")
OLMOE = MoEConfig(num_experts=EXPERTS, top_k=3, ffn_hidden_size=12, score="softmax", weight_norm=None)
DEEPSEEK = MoEConfig(
    num_experts=EXPERTS, top_k=4, ffn_hidden_size=12, num_shared_experts=2, first_dense=1, weight_scale=2.5, groups=4,
    top_groups=2,
)  # fmt: skip
QWEN2 = MoEConfig(
    num_experts=EXPERTS, top_k=2, ffn_hidden_size=12, shared_ffn_hidden_size=20, shared_gate=True, score="softmax",
    weight_norm=None, dense_layers=[1],
)  # fmt: skip
MIXTURES = {"mixtral": MIXTRAL, "olmoe": OLMOE, "deepseek": DEEPSEEK, "qwen2": QWEN2}


def make_model(moe: MoEConfig, **changes) -> ModelConfig:
    base = dict(
        num_layers=3, hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_size=20, vocab_size=50
    )
    model = ModelConfig(**{**base, "seq_length": 16, "moe": moe, **changes})
    model.fill_in()
    return model


def make_source(model: ModelConfig) -> Source:
    generator = torch.Generator().manual_seed(5)
    shapes = [*list_tensors(model), *list_states(model)]
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes}
    return Source(Path("x"), "memory", model, MemoryWeights(weights), 0, step=300)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """One rank of theirs, on a CPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    # Their router asks for it whether or not Transformer Engine was there to import it from.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)


def their_model(m: ModelConfig) -> GPTModel:
    """The same architecture of theirs, written down without megalm's tables, with random weights and selection biases."""
    torch.manual_seed(11)
    moe, pattern = m.moe, [int(not m.moe.is_dense(layer)) for layer in range(m.num_layers)]
    config = TransformerConfig(
        num_layers=m.num_layers, hidden_size=m.hidden_size, num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads, kv_channels=m.head_dim, ffn_hidden_size=m.ffn_hidden_size,
        normalization="RMSNorm", layernorm_epsilon=m.norm_eps, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, init_method_std=0.2, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, bias_activation_fusion=False, masked_softmax_fusion=False,
        bias_dropout_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        num_moe_experts=EXPERTS, moe_router_topk=moe.top_k, moe_ffn_hidden_size=12,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size, moe_shared_expert_gate=moe.shared_gate,
        moe_router_score_function=moe.score, moe_router_enable_expert_bias=moe.score == "sigmoid",
        moe_layer_freq=1 if all(pattern) else pattern, moe_router_pre_softmax=moe.weight_norm is None,
        moe_router_topk_scaling_factor=moe.weight_scale, moe_router_num_groups=moe.groups or None,
        moe_router_group_topk=moe.top_groups or None, moe_router_load_balancing_type="none",
    )  # fmt: skip
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config, spec, vocab_size=PADDED, max_sequence_length=m.seq_length, rotary_base=10000,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip
    for name, bias in model.named_buffers():
        if name.endswith("expert_bias"):
            bias.copy_(torch.randn(EXPERTS))
    return model


def compare(source: Source, theirs: GPTModel) -> None:
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(3))
    places, hidden = torch.arange(16).expand(2, 16), torch.ones(16, 16, dtype=torch.bool).triu(1).expand(2, 1, 16, 16)
    with torch.no_grad():
        expected = theirs(tokens, places, hidden)[..., :50]
    assert expected.std() > 0.1
    ours = compute_logits(build_model(source.model, source.weights), tokens)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_it_reads_the_mixtures_that_we_write_with_its_strictest_default(name, tmp_path, alone):
    source = make_source(make_model(MIXTURES[name]))
    write_dist(source, tmp_path, pad_vocabulary=PADDED)
    theirs = their_model(source.model)
    names = list(theirs.sharded_state_dict())
    loaded = dist_checkpointing.load(theirs.sharded_state_dict(), str(tmp_path / "iter_0000300"))
    theirs.load_state_dict({key: loaded[key] for key in names})
    again = open_source(tmp_path, vocab_size=50)
    assert all(torch.equal(again.weights.read(key), source.weights.read(key)) for key in source.weights.names())
    compare(again, theirs)


@pytest.mark.parametrize("name", MIXTURES)
def test_we_read_the_mixtures_that_it_writes(name, tmp_path, alone):
    model = make_model(MIXTURES[name])
    theirs, folder = their_model(model), tmp_path / "iter_0000007"
    folder.mkdir()
    args = write_args(model, tensor=1, pipeline=1, virtual=1, padded_vocab_size=PADDED)
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save({**theirs.sharded_state_dict(), **common}, str(folder))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    source = open_source(tmp_path, vocab_size=50)
    assert collect_function(source.model) == collect_function(model)
    compare(source, theirs)


def their_arguments(**changes) -> Namespace:
    args = write_args(make_model(MIXTRAL), tensor=1, pipeline=1, virtual=1, padded_vocab_size=PADDED)
    return Namespace(**{**vars(args), **changes})


@pytest.mark.parametrize(("frequency", "dense"), [(1, []), (2, [1]), ([0, 1, 0], [0, 2])])
def test_their_frequency_counts_from_the_first_layer(frequency, dense):
    assert read_args(their_arguments(moe_layer_freq=frequency)).moe.dense_layers == dense


@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_expert_capacity_factor=1.25),
        dict(moe_router_topk_limited_devices=2),
        dict(moe_input_jitter_eps=0.1),
        dict(moe_use_legacy_grouped_gemm=True),
        dict(moe_router_score_function="sinkhorn"),
        dict(moe_router_num_groups=4, moe_router_group_topk=2),
        dict(moe_layer_freq=[1, 0]),
        dict(add_bias_linear=True),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_arguments_without_a_counterpart_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read_args(their_arguments(**changes))


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=EXPERTS, score="softmax", weight_norm=2.0),
        MoEConfig(num_experts=EXPERTS, score="sigmoid", weight_norm=None),
        MoEConfig(num_experts=EXPERTS, score="softmax", router_bias=True),
        MoEConfig(num_experts=EXPERTS, top_k=2, groups=4, top_groups=2, group_scores=2),
    ],
    ids=["p-norm", "raw sigmoid", "router bias", "two best of a group where Megatron takes one"],
)
def test_mixtures_that_their_arguments_cannot_say_are_refused(moe):
    with pytest.raises(ConfigError, match=r"cannot express model\.moe"):
        write_args(make_model(moe), tensor=1, pipeline=1, virtual=1, padded_vocab_size=PADDED)


def test_rank_files_and_optimizers_of_mixtures_are_refused_with_what_works(tmp_path):
    source = make_source(make_model(MIXTRAL))
    with pytest.raises(ConfigError, match="use its torch_dist format"):
        write_legacy(source, tmp_path)
    state = OptimizerState(source.weights, source.weights, source.weights, 1, 1)
    with pytest.raises(ConfigError, match="write the weights alone"):
        write_dist(source, tmp_path, optimizer=state)
    assert not list(tmp_path.iterdir())
