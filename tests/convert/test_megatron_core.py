"""Conversion beside Megatron core itself, where it is installed: it reads what we write, we read what it writes, and both
compute the same logits."""

import contextlib
import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalm.checkpoint.convert.formats import open_source
from megalm.checkpoint.convert.megatron_dist import write_dist
from megalm.checkpoint.convert.megatron_legacy import write_legacy
from megalm.checkpoint.convert.source import Source
from megalm.checkpoint.convert.weights import MemoryWeights
from megalm.evaluate.model import build_model, logits
from tests.convert.megatron_checkpoints import MODELS, PADDED, arguments, make_model, random_weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core.dist_checkpointing")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
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
    torch.testing.assert_close(logits(build_model(source.model, source.weights), tokens), expected, rtol=0, atol=2e-5)


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
