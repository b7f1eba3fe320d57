"""What 8-bit products change in a plan: the time of products by recipe, inputs and weights that are kept, what is refused."""

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.plan.activations import estimate_layer_activations
from megalm.plan.layout import measure_narrow, read_layout
from megalm.plan.machine import make_planned_machine
from megalm.plan.memory import estimate_layout
from megalm.plan.time import estimate_step_time

GPUS = 8


def plan(*words, gpu="h100"):
    config = compose_config(["+model=llama3-8b", "parallel=zero1", "parallel.data=8", "precision=bf16", *words])
    layout = read_layout(config, GPUS)
    return config, layout, estimate_step_time(config.model, layout, make_planned_machine(gpu, GPUS))


def test_products_are_faster_by_recipe():
    seconds = {
        recipe: plan("precision=fp8", f"precision.fp8.recipe={recipe}")[2].matmul
        for recipe in ("none", "tensorwise", "rowwise", "rowwise_wide")
    }
    assert seconds["tensorwise"] < seconds["rowwise"] < min(seconds["none"], seconds["rowwise_wide"])
    whole = plan("precision=fp8")[2].total / plan()[2].total
    assert 0.7 < whole < 0.95, "published: 1.25 times as fast, with conversions fused and weights gathered in 8 bits"


def test_what_is_skipped_stays_as_fast_as_it_was():
    every, skipped = (
        measure_narrow(plan("precision=fp8", *words)[0]).share for words in ((), ["precision.fp8.skip_last=8"])
    )
    assert (every, skipped) == (1.0, 0.75)
    times = [plan("precision=fp8", f"precision.fp8.skip_last={n}")[2].matmul for n in (0, 8, 16)]
    assert times == sorted(times) and times[1] - times[0] == pytest.approx(times[2] - times[1])


def test_kept_inputs_take_half_and_kept_weights_two_bytes():
    (config, wide, _), (_, narrow, _) = plan(), plan("precision=fp8")
    before, after = (estimate_layer_activations(config.model, layout).saved for layout in (wide, narrow))
    halved = {name for name in before if after[name] == before[name] / 2}
    assert halved == {"query, key and value's input", "MLP's input", "activation's output"}
    assert all(after[name] == before[name] for name in before.keys() - halved)
    weights = [estimate_layout(config.model, layout).worst.weights for layout in (wide, narrow)]
    assert weights[1] - weights[0] == pytest.approx(2 * 32 * 218.1e6, rel=0.01)
    for word in ("parallel.recompute=selective", "precision.fp8.recipe=rowwise_wide"):
        _, layout, _ = plan("precision=fp8", word)
        assert (
            sum(estimate_layer_activations(config.model, layout).saved.values())
            >= sum(value for name, value in before.items() if word.endswith("wide") or name not in halved)
            - 2 * before["rotated queries and keys"]
        )


def test_a_gpu_without_8_bit_products_is_refused():
    with pytest.raises(ConfigError, match="has no figure for dtype 'fp8'"):
        plan("precision=fp8", gpu="a100-80gb")


# --------------------------------------------------------------------------------------------------------------- Muon
def update_of(*words):
    return plan("model.num_layers=32", *words)[2].optimizer


def test_muons_update_takes_the_time_of_its_iteration_whatever_the_batch():
    adamw, muon = update_of(), update_of("optim=muon")
    flops = (
        5
        * 32
        * sum(
            count * (4.0 * m**2 * n + 2.0 * m**3)
            for count, m, n in ((2, 4096, 4096), (2, 1024, 4096), (3, 4096, 14336))
        )
    )
    rate = make_planned_machine("h100", GPUS).accelerator
    assert muon - adamw == pytest.approx(flops / 8 / (rate.peak_of("bf16") * rate.matmul_efficiency), rel=1e-6)
    assert update_of("optim=muon", "train.global_batch_size=1024") == pytest.approx(muon)
    assert update_of("optim=muon", "optim.muon.steps=3") - adamw == pytest.approx((muon - adamw) * 3 / 5)
    assert update_of("optim=muon", "parallel.zero_stage=0") - update_of("parallel.zero_stage=0") == pytest.approx(
        8 * (muon - adamw)
    )
