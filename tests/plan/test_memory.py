"""The memory estimate against what a step really allocates, and against published formulas."""

import pytest

from megalm.config.compose import compose_config
from megalm.config.optim import STATES
from megalm.pipeline.partition import count_layer_costs, partition
from megalm.pipeline.schedule import KINDS, build_schedule
from megalm.pipeline.simulate import simulate
from megalm.plan.activations import estimate_by_korthikanti, estimate_layer_activations
from megalm.plan.layout import Layout
from megalm.plan.memory import count_chunks_in_flight, estimate_layout
from megalm.plan.models import list_models
from megalm.plan.stages import count_stage_layers
from tests.plan.published import mpt_benchmark, narayanan

SMALL = [
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.num_heads=4",
    "model.ffn_hidden_size=512",
    "model.seq_length=256",
    "model.vocab_size=512",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
]
LLAMA = ["+model=llama3-8b", *SMALL, "model.num_kv_heads=2"]
GPT = ["+model=gpt2-124m", *SMALL]
MPT = ["+model=125m", *SMALL]

REAL = {
    "llama": LLAMA,
    "llama in bf16": [*LLAMA, "precision=bf16"],
    "llama, selective recompute": [*LLAMA, "parallel.recompute=selective"],
    "llama, full recompute": [*LLAMA, "parallel.recompute=full", "model.num_layers=8"],
    "llama, deeper, more logits": [*LLAMA, "model.vocab_size=2048", "model.num_layers=8"],
    "llama, query and key norms": [*LLAMA, "model.qk_norm=true", "model.tie_embeddings=true"],
    "llama, two tokens further": [*LLAMA, "model.prediction.depth=2", "model.vocab_size=2048"],
    "llama, a token further, full recompute": [*LLAMA, "model.prediction.depth=1", "parallel.recompute=full"],
    "norms after": [*LLAMA, "model.norm_placement=post"],
    "gpt-2": GPT,
    "gpt-2, gradient descent": [*GPT, "optim=sgd"],
    "gpt-2, full recompute": [*GPT, "parallel.recompute=full"],
    "gpt-2 in bf16": [*GPT, "precision=bf16"],
    "mpt (ALiBi)": MPT,
    "mpt (ALiBi), full recompute": [*MPT, "parallel.recompute=full"],
}


@pytest.mark.parametrize("words", REAL.values(), ids=REAL.keys())
def test_estimate_against_the_real_allocation(words):
    pytest.importorskip("torch")
    from tests.plan.allocation import peak_of_training

    config = compose_config(words)
    layout = Layout(
        recompute=config.parallel.recompute,
        micro_batch=config.train.micro_batch_size,
        global_batch=config.train.global_batch_size,
        dtype=config.precision.dtype,
        states=len(STATES[config.optim.name]),
    )
    estimate = estimate_layout(config.model, layout, cpu=True)
    tensors = estimate.bytes_per_gpu - estimate.worst.runtime - estimate.worst.saving
    assert tensors == pytest.approx(peak_of_training(config), rel=0.10)


def test_bytes_per_parameter():
    """bf16 weights, fp32 gradients, masters and Adam: 18 bytes; with ZeRO-1 6 + 12 / dp and the gradient's shard."""
    model = list_models()["1b"]
    plain = estimate_layout(model, Layout(data=8, global_batch=8)).worst
    assert plain.weights + plain.gradients + plain.optimizer == 18 * plain.parameters
    descent = estimate_layout(model, Layout(data=8, global_batch=8, states=1)).worst
    assert plain.optimizer - descent.optimizer == 4 * plain.parameters
    split = estimate_layout(model, Layout(data=8, zero_stage=1, global_batch=8)).worst
    assert split.weights + split.gradients + split.optimizer == pytest.approx((6 + 12 / 8 + 4 / 8) * plain.parameters)


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({}, 34 + 5 * 96 * 2048 / 12288),
        ({"tensor": 8}, 10 + 24 / 8 + 5 * 96 * 2048 / (12288 * 8)),
        ({"tensor": 8, "sequence": True}, 34 / 8 + 5 * 96 * 2048 / (12288 * 8)),
        ({"tensor": 8, "recompute": "selective"}, 10 + 24 / 8),
        ({"tensor": 8, "sequence": True, "recompute": "selective"}, 34 / 8),
        ({"recompute": "full"}, 2),
    ],
)
def test_korthikanti(settings, expected):
    """Korthikanti et al. 2022, table 2, for GPT-3 (a=96, h=12288, s=2048, b=1)."""
    assert estimate_by_korthikanti(2048, 1, 12288, 96, **settings) == pytest.approx(expected * 2048 * 12288)


def test_fused_layers_keep_less_than_the_paper_and_recompute_keeps_least():
    model = list_models()["7b"]
    kept = [
        estimate_layer_activations(model, Layout(recompute=mode, micro_batch=2)).total
        for mode in ("none", "selective", "full")
    ]
    paper = estimate_by_korthikanti(model.seq_length, 2, model.hidden_size, model.num_heads)
    assert kept[0] < paper and kept == sorted(kept, reverse=True)
    assert kept[2] == 2 * model.seq_length * 2 * model.hidden_size


def test_tensor_parallelism_divides_what_it_can():
    model = list_models()["7b"]
    whole = estimate_layer_activations(model, Layout()).total
    split = estimate_layer_activations(model, Layout(tensor=8, sequence=True)).total
    assert split == pytest.approx(whole / 8, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_in_flight_are_the_simulators(kind):
    chunks = 2 if kind in ("interleaved", "zb-v", "dualpipe-v") else 1
    for ranks in (2, 3, 4, 8):
        for batches in (1, 2, 4, 5, 8, 24):
            simulated = simulate(build_schedule(kind, ranks, batches, chunks)).peak_activations
            layout = Layout(pipeline=ranks, virtual=chunks, schedule=kind, global_batch=batches)
            assert [count_chunks_in_flight(layout, rank) for rank in range(ranks)] == simulated, (ranks, batches)


@pytest.mark.parametrize("name", ["tiny", "125m", "7b", "llama3-8b", "30b"])
def test_stages_are_cut_as_the_engine_cuts_them(name):
    model = list_models()[name]
    for stages in (1, 2, 3, 4, 6, 8):
        if stages <= model.num_layers:
            cut = [len(layers) for layers in partition(count_layer_costs(model), stages)]
            assert list(count_stage_layers(model, stages)) == cut


def test_published_runs_fit_the_machines_that_ran_them():
    for row in (*mpt_benchmark(), *narayanan()):
        assert estimate_layout(row.model, row.layout).bytes_per_gpu < row.machine.memory, row.name
