"""Conversion beside Megatron core itself, where it is installed: it reads what we write, we read what it writes, and both
compute the same logits."""

import contextlib
import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megalm.convert.formats import open_source
from megalm.convert.megatron_dist import RESHARDABLE, write_dist
from megalm.convert.megatron_legacy import write_legacy
from megalm.convert.source import Source
from megalm.convert.weights import MemoryWeights
from megalm.generate.model import build_model, compute_logits
from tests.convert.megatron_checkpoints import MODELS, PADDED, arguments, make_model, random_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core.dist_checkpointing")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.transformer_config import TransformerConfig


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """One rank of theirs, on a CPU: saving asks CUDA for the device and waits for it, dropout for its random state."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    logging.disable(logging.NOTSET)


def their_model(m) -> GPTModel:
    """The same architecture, with random weights of theirs."""
    torch.manual_seed(11)
    config = TransformerConfig(
        num_layers=m.num_layers, hidden_size=m.hidden_size, num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads, kv_channels=m.head_dim, ffn_hidden_size=m.ffn_hidden_size,
        normalization="RMSNorm" if m.norm == "rmsnorm" else "LayerNorm", layernorm_epsilon=m.norm_eps,
        gated_linear_unit=m.gated, activation_func=torch.nn.functional.silu if m.gated else gelu_tanh,
        add_bias_linear=m.linear_bias, add_qkv_bias=m.qkv_bias, qk_layernorm=m.qk_norm, init_method_std=0.2,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True, bias_activation_fusion=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=m.qk_norm, normalization=config.normalization)
    return GPTModel(
        config, spec, vocab_size=PADDED, max_sequence_length=m.seq_length, rotary_base=int(m.rope_theta),
        position_embedding_type="rope" if m.position == "rope" else "learned_absolute",
        share_embeddings_and_output_weights=m.tie_embeddings,
    ).eval()  # fmt: skip


def gelu_tanh(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def their_logits(model, tokens, vocab_size):
    batch, length = tokens.shape
    places = torch.arange(length).expand(batch, length)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1).expand(batch, 1, length, length)
    with torch.no_grad():
        return model(tokens, places, hidden)[..., :vocab_size]


def compare(source, theirs, vocab_size):
    tokens = torch.randint(0, vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    expected = their_logits(theirs, tokens, vocab_size)
    assert expected.std() > 0.1
    torch.testing.assert_close(
        compute_logits(build_model(source.model, source.weights), tokens), expected, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_it_reads_what_we_write_with_its_strictest_default(name, tmp_path, alone):
    model = make_model(**MODELS[name])
    weights = {key: 0.3 * value for key, value in random_weights(model).items()}
    write_dist(Source(Path("x"), "memory", model, MemoryWeights(weights), 0, step=300), tmp_path, pad_vocabulary=PADDED)
    theirs = their_model(model)
    names = list(theirs.sharded_state_dict())
    loaded = dist_checkpointing.load(theirs.sharded_state_dict(), str(tmp_path / "iter_0000300"))
    assert loaded["iteration"] == 300
    theirs.load_state_dict({key: loaded[key] for key in names})
    compare(open_source(tmp_path, vocab_size=50), theirs, 50)


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_it_writes(name, tmp_path, alone):
    model = make_model(**MODELS[name])
    theirs = their_model(model)
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    common = {"args": arguments(model), "iteration": 7, "checkpoint_version": 3.0}
    dist_checkpointing.save({**theirs.sharded_state_dict(), **common}, str(folder))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    source = open_source(tmp_path, vocab_size=50)
    assert source.step == 7
    source.model.name = model.name
    assert source.model == model
    compare(source, theirs, 50)


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_the_rank_file_that_we_write(name, tmp_path, alone):
    model = make_model(**MODELS[name])
    weights = {key: 0.3 * value for key, value in random_weights(model).items()}
    source = Source(Path("x"), "memory", model, MemoryWeights(weights), 0, step=300)
    write_legacy(source, tmp_path, tensor=1, pipeline=1, spelling="plain", pad_vocabulary=PADDED)
    state = torch.load(tmp_path / "iter_0000300" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    theirs = their_model(model)
    theirs.load_state_dict(state["model"])
    compare(open_source(tmp_path, vocab_size=50), theirs, 50)


class OnCpu(TorchFunctionMode):
    """What is asked to be made on CUDA is made on the CPU."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        if str(named.get("device")).startswith("cuda"):
            named["device"] = "cpu"
        return function(*arguments, **named)


def set_states(self, parameter, tensors):
    """Theirs asks for a `step` among the tensors, which only the optimizers of apex and Transformer Engine do without."""
    group, place = self.model_param_group_index_map[parameter]
    main = self.optimizer.param_groups[group]["params"][place]
    states = {"param": main.data, **self.optimizer.state[main]}
    for name in tensors:
        states[name].copy_(tensors[name])


@pytest.fixture
def their_optimizer(alone, monkeypatch):
    """Makes (model, its distributed optimizer) of theirs, trained for some steps."""
    kind_of = torch.Tensor.type
    monkeypatch.setattr(
        torch.Tensor,
        "type",
        lambda self, *a, **k: kind_of(self, *a, **k) if a or k else "torch.cuda." + kind_of(self).split(".")[-1],
    )
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    monkeypatch.setattr(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)

    def make(m, steps, seed):
        model = their_model(m).train()
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
        )
        settings = dict(optimizer="adam", lr=0.01, weight_decay=0.1, adam_beta2=0.95, use_distributed_optimizer=True)
        optimizer = get_megatron_optimizer(OptimizerConfig(**settings), [wrapped])
        places, hidden = (
            torch.arange(16).expand(2, 16),
            torch.ones(16, 16, dtype=torch.bool).triu(1).expand(2, 1, 16, 16),
        )
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            tokens = torch.randint(0, 50, (2, 16), generator=generator)
            wrapped(tokens, places, hidden, labels=tokens).mean().backward()
            wrapped.finish_grad_sync()
            optimizer.step()
        return model, optimizer

    with OnCpu():
        yield make


@pytest.mark.parametrize("name", MODELS)
def test_the_optimizers_state_comes_over_and_goes_back_bit_for_bit(name, tmp_path, their_optimizer):
    m = make_model(**MODELS[name])
    model, optimizer = their_optimizer(m, 3, 1)
    state = model.sharded_state_dict()
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=RESHARDABLE)
    folder = tmp_path / "theirs" / "iter_0000003"
    folder.mkdir(parents=True)
    common = {"args": arguments(m, consumed_train_samples=6), "iteration": 3, "checkpoint_version": 3.0}
    dist_checkpointing.save({**state, **common}, str(folder), content_metadata=RESHARDABLE)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
    source = open_source(folder.parent, vocab_size=PADDED)
    ours = source.optimizer
    assert (ours.step, ours.tokens) == (3, 6 * m.seq_length)
    assert (ours.lr, ours.betas, ours.eps, ours.weight_decay) == (0.01, (0.9, 0.95), 1e-8, 0.1)

    write_dist(source, tmp_path / "ours", pad_vocabulary=PADDED, optimizer=ours)
    other, fresh = their_optimizer(m, 1, 2)
    state = other.sharded_state_dict()
    names = list(state)
    folder = tmp_path / "ours" / "iter_0000003"
    metadata = dist_checkpointing.load_content_metadata(str(folder))
    assert metadata == RESHARDABLE
    state["optimizer"] = fresh.sharded_state_dict(state, is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, str(folder))
    other.load_state_dict({key: loaded[key] for key in names})
    fresh.load_state_dict(loaded["optimizer"])
    (one,), (two,) = optimizer.chained_optimizers, fresh.chained_optimizers
    compared = 0
    for group, again in zip(one.optimizer.param_groups, two.optimizer.param_groups, strict=True):
        assert all(again[key] == group[key] for key in ("wd_mult", "lr", "max_lr", "betas", "eps"))
        for a, b in zip(group["params"], again["params"], strict=True):
            assert torch.equal(a, b)
            for key, value in one.optimizer.state[a].items():
                assert torch.equal(value, two.optimizer.state[b][key]), key
                compared += value.numel() > 1 and bool(value.any())
    assert compared >= 2 * m.num_layers * 6
