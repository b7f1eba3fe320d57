"""The search over layouts: valid, within memory, better than the published choices, and fast."""

import time
from dataclasses import replace

import pytest

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.plan.fit import check_fits, find_nearest_fitting
from megalm.plan.layout import Layout, explain_indivisible, read_layout
from megalm.plan.machine import find_machine, make_planned_machine
from megalm.plan.search import choose_auto_overrides, expand_auto, list_fixed, search
from megalm.plan.time import compute_bubble_fraction, estimate_step_time, simulate_makespan
from tests.plan.published import mpt_benchmark


def config_of(model: str, gpu: str, gpus: int, batch: int, *more: str):
    words = [
        f"+model={model}",
        f"cluster={gpu}",
        f"cluster.gpus={gpus}",
        "precision=bf16",
        f"train.global_batch_size={batch}",
    ]
    return compose_config([*words, *more])


def test_ranking_is_valid_and_explained():
    config = config_of("30b", "h100", 512, 512)
    machine = find_machine(config)
    found = search(config, machine)
    assert len(found.best) == 10
    seconds = [candidate.seconds for candidate in found.best]
    assert seconds == sorted(seconds)
    for candidate in found.best:
        layout = candidate.layout
        assert layout.world == 512 and not explain_indivisible(config.model, layout)
        assert candidate.memory.bytes_per_gpu <= machine.memory
        assert candidate.reason
    assert found.considered > 500 and found.alternatives
    for candidate in found.alternatives:
        assert "slower" in candidate.reason or "does not fit" in candidate.reason or "as fast" in candidate.reason


def test_nothing_obvious_beats_the_winner():
    config = config_of("13b", "a100-80gb", 64, 512)
    found = search(config, find_machine(config))
    for candidate in found.alternatives:
        assert not candidate.fits or candidate.seconds >= found.best[0].seconds * 0.999, candidate.name


def test_sixteen_thousand_gpus_in_under_ten_seconds():
    config = config_of(
        "llama3-70b", "h100", 16384, 2048, "model.num_layers=126", "model.hidden_size=16384", "model.num_heads=128"
    )
    start = time.process_time()
    found = search(config, find_machine(config))
    assert time.process_time() - start < 10
    assert found.best and found.best[0].layout.world == 16384


@pytest.mark.parametrize("row", [row for row in mpt_benchmark() if row.layout.world > 8][:2], ids=lambda row: row.name)
def test_best_layout_is_no_slower_than_the_published_one(row):
    config = compose_config(["+model=125m", "precision=bf16"])
    config.model = row.model
    config.train.global_batch_size = row.layout.global_batch
    best = search(config, row.machine).best[0]
    assert best.seconds <= estimate_step_time(row.model, row.layout, row.machine).total * 1.001


def test_closed_forms_of_the_bubble_are_the_simulators():
    for kind, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb-h1", 1)):
        for ranks, batches in ((4, 8), (4, 16), (8, 32)):
            layout = Layout(pipeline=ranks, virtual=chunks, schedule=kind, global_batch=batches)
            whole = simulate_makespan(kind, ranks, batches, chunks, (1.0, 1.0, 1.0), 0.0)
            assert whole / (3 * batches) - 1 == pytest.approx(compute_bubble_fraction(layout), abs=1e-9), (
                kind,
                ranks,
                batches,
            )


def test_overrides_of_the_winner_compose_to_the_same_layout():
    config = config_of("7b", "h100", 64, 512)
    machine = find_machine(config)
    words = choose_auto_overrides(config, machine)
    again = config_of("7b", "h100", 64, 512, *words)
    assert read_layout(again, 64) == search(config, machine, top=1).best[0].layout


def test_what_cannot_fit_is_refused_with_what_does():
    config = config_of("30b", "a100-80gb", 8, 64, "train.micro_batch_size=8")
    machine = find_machine(config)
    with pytest.raises(ConfigError, match=r"needs .* GiB .* It fits with (parallel|train)\.") as caught:
        check_fits(config, machine)
    assert "largest model" in str(caught.value)
    remedy = find_nearest_fitting(config, read_layout(config, 8), machine)
    check_fits(config_of("30b", "a100-80gb", 8, 64, *remedy.split()), machine)


def test_the_guards_snapshots_are_part_of_what_must_fit_on_a_cpu():
    words = ["+model=125m", "device=cpu", "train.global_batch_size=4", "train.micro_batch_size=4"]
    with_all = compose_config([*words, "guard.snapshot_lags=[16,32,64]"])
    here = find_machine(with_all, 1)
    machine = replace(here, accelerator=replace(here.accelerator, memory=5e9))
    with pytest.raises(ConfigError, match="the guard's snapshots") as caught:
        check_fits(with_all, machine)
    remedy = find_nearest_fitting(with_all, read_layout(with_all, 1), machine)
    assert remedy is not None and f"It fits with {remedy}." in str(caught.value) and "snapshot_lags" in remedy
    check_fits(compose_config([*words, *remedy.split()]), machine)


def test_what_cannot_fit_at_all_names_a_machine_that_would_do():
    config = config_of("llama3-70b", "a100-40gb", 8, 64)
    with pytest.raises(ConfigError, match="ranks would do"):
        choose_auto_overrides(config, find_machine(config))


def test_ranks_that_do_not_divide():
    config = config_of("7b", "h100", 12, 64, "parallel.tensor=8")
    with pytest.raises(ConfigError, match="8 or 16"):
        read_layout(config, 12)
    config = config_of("7b", "h100", 12, 64, "parallel.tensor=3")
    with pytest.raises(ConfigError, match="ffn_hidden_size 16384 by tensor 3"):
        check_fits(config, find_machine(config))


def test_more_bandwidth_memory_and_gpus_never_hurt():
    row = next(row for row in mpt_benchmark() if row.row["model"] == "7b" and row.row["gpu"] == "h100")
    h100, h200 = make_planned_machine("h100", 8), make_planned_machine("h200", 8)
    assert estimate_step_time(row.model, row.layout, h200).total < estimate_step_time(row.model, row.layout, h100).total


def test_parallel_auto_is_replaced_by_the_layout_found():
    words = ["+model=7b", "cluster=h100", "cluster.gpus=64", "precision=bf16", "train.global_batch_size=512"]
    expanded = expand_auto([*words, "parallel=auto"])
    assert expanded[-len(words) :] == words and "parallel=auto" not in expanded
    assert (
        read_layout(compose_config(expanded), 64)
        == search(compose_config(words), make_planned_machine("h100", 64)).best[0].layout
    )
    assert expand_auto(words) == words


def test_what_the_command_line_fixes_is_kept():
    config = config_of("7b", "h100", 64, 512, "parallel.tensor=4", "parallel.recompute=full")
    fixed = list_fixed(["parallel.tensor=4", "+parallel.recompute=full", "train.steps=3"], config)
    assert fixed == {"tensor": 4, "recompute": "full"}
    found = search(config, find_machine(config), fixed=fixed)
    assert {(c.layout.tensor, c.layout.recompute) for c in found.best} == {(4, "full")}
