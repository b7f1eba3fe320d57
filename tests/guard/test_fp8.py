"""8-bit products under the guard: what the casts lose is told, a value that is not finite is traced, and a rung widens them."""

import math

import pytest
import torch

from megalm.config import ConfigError
from megalm.config.compose import compose_config
from megalm.guard.fp8 import Fp8Hook, describe, explain
from megalm.guard.policy import Policy
from megalm.launch.resolve import resolve
from megalm.parallel.mesh import build_mesh
from megalm.precision.meter import Meter, Meters, Seen
from megalm.precision.recipes import RECIPES, find_largest
from megalm.train.hooks import Hook
from tests.distributed import run_ranks
from tests.guard.runs import STEP, Crash, overrides, train
from tests.guard.test_recovery import DieAfter

FP8 = ["precision=fp8", "precision.dtype=fp32"]
WIDEN = "guard.rungs=[{action: widen, products: ['*.mlp.*']}, {action: rollback, budget: 3}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fp8")


# ------------------------------------------------------------------------------------------------------------- meters
def test_a_meter_counts_what_the_cast_loses():
    x = torch.full((16, 32), 1.0)
    x[0, 0], x[1] = 448.0, 1e-4  # 32 elements below half of 2^-9
    how, meter = RECIPES["tensorwise"].forward.a, Meter("layers.0.mlp.up")
    meter.begin(counting=True)
    for largest in (find_largest(x), find_largest(x) / 4):  # the second is the scale of another time: 448 does not fit
        meter.see("x", x, largest, how.quantize(x, largest))
    (seen,) = Meters([meter.name], [meter]).collect(lambda values, _: values, torch.device("cpu"))
    assert seen.largest == {"x": 448, "weight": 0, "grad": 0}
    assert seen.zeroed == {"x": pytest.approx(1 / 16)} and seen.saturated == {"x": 1 / (2 * 512)}
    meter.begin(counting=False)
    meter.see("x", x, find_largest(x), how.quantize(x, find_largest(x)))
    (seen,) = Meters([meter.name], [meter]).collect(lambda values, _: values, torch.device("cpu"))
    assert seen.largest["x"] == 448 and not seen.zeroed


def test_numbers_are_of_each_layer_and_of_the_worst():
    seen = [
        Seen("layers.0.mlp.up", {"x": 1, "weight": 2, "grad": 3}, {"x": 0.1, "weight": 0, "grad": 0.2}, {"x": 0.0}),
        Seen("layers.0.mlp.down", {"x": 5, "weight": 2, "grad": 3}),
        Seen("layers.10.mlp.up", {"x": 4, "weight": 0, "grad": 0}, {"x": 0.4}, {"x": 0.01}),
    ]
    assert describe(seen) == {
        "fp8/0/largest": 5, "fp8/10/largest": 4, "fp8/largest": 5, "fp8/0/zeroed": 0.2, "fp8/10/zeroed": 0.4,
        "fp8/zeroed": 0.4, "fp8/0/saturated": 0, "fp8/10/saturated": 0.01, "fp8/saturated": 0.01,
    }  # fmt: skip


def test_what_is_not_finite_is_traced_to_its_first_product():
    inf = math.inf
    fine, spoilt = {"x": 1.0, "weight": 1.0, "grad": 1.0}, {"x": inf, "weight": 1.0, "grad": inf}
    forward = [Seen("layers.0.mlp.up", {**fine, "grad": inf}), Seen("layers.0.mlp.down", spoilt), Seen("x.1", spoilt)]
    assert "layers.0.mlp.down (x); 2 of 3" in explain(forward)
    assert "gradient that is not is b" in explain([Seen(name, {**fine, "grad": inf}) for name in "ab"])
    assert "from elsewhere" in explain([Seen("a", fine)])


def test_products_are_in_the_order_of_their_layers():
    assert Meters(["layers.10.a", "layers.9.b", "layers.9.a"], []).names == ["layers.9.a", "layers.9.b", "layers.10.a"]


@pytest.mark.parametrize("layout", [["parallel.pipeline=2"], ["parallel.tensor=2"], ["parallel.data=2"]], ids=str)
def test_every_layout_measures_the_same(folder, layout):
    words = overrides(folder, "clean", *FP8, "precision.fp8.measure_every=3", "guard=off", steps=3)
    name = layout[0].replace("=", "-")
    (alone,) = run_ranks(1, measure, [*words, f"run.name=beside-{name}"], 1)
    for measured in run_ranks(2, measure, [*words, *layout, f"run.name={name}"], 2):
        assert measured.keys() == alone.keys() == {1, 3}
        for step, numbers in measured.items():
            # a sum in another order is small where it was zero, and a few elements fall on the other side
            assert numbers == pytest.approx(alone[step], rel=1e-3, abs=2e-3)
            assert 0 < numbers["fp8/zeroed"] < 0.5 and numbers["fp8/1/largest"] > 0 == numbers["fp8/saturated"]


def measure(words, world):
    config = compose_config(words)
    resolve(config, world)
    run = train(words, Fp8Hook(3), mesh=build_mesh(config.parallel, "cpu"))
    return {r["step"]: found for r in run.records if (found := {k: v for k, v in r.items() if k.startswith("fp8/")})}


# --------------------------------------------------------------------------------------------------------------- guard
class Spoil(Hook):
    """Makes an infinity of one weight of the second layer, for one step."""

    def on_step_start(self, trainer):
        weight = trainer.model_chunks[0].layers[1].mlp.down.weight.data
        if trainer.step == STEP - 1:
            self.kept = weight[0, 0].clone()
            weight[0, 0] = torch.inf
        elif trainer.step == STEP:
            weight[0, 0] = self.kept


def test_a_step_that_is_not_finite_says_where_it_began(folder):
    run = train(overrides(folder, "clean", *FP8, "guard=watch", "run.name=traced", steps=STEP), Fp8Hook(0), Spoil())
    (event,) = run.of("fp8")
    assert event["step"] == STEP and event["cause"] == "nonfinite"
    assert "layers.1.mlp.down (weight)" in event["text"] and "layers.0.mlp.up" in event["products"]


def test_the_rung_goes_back_and_widens_and_a_restart_stays_wide(folder):
    words = overrides(folder, "second_moment", *FP8, WIDEN, "checkpoint.every=50", "guard.replay=false")
    words += ["guard.provoke.times=1", "run.name=widened"]
    wide = []

    class Look(Hook):
        def on_step_start(self, trainer):
            wide.append({meter.name for meter in trainer.meters.own if meter.wide})

    run = train(words, Look())
    products = {f"layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("up", "down")}
    (event,) = run.of("widen")
    assert set(event["products"]) == products and "fp32 from here on" in event["text"]
    assert run.kinds() == ["rollback"] and run.of("rollback")[0]["action"] == "widen"
    assert wide[0] == set() and wide[-1] == products
    del wide[:]
    train([*words, "train.steps=60"], Look())
    assert wide and all(found == products for found in wide)


def test_a_run_that_dies_while_it_widens_is_wide_when_it_goes_on(folder):
    words = overrides(folder, "second_moment", *FP8, WIDEN, "checkpoint.every=10", "guard.replay=false")
    words += ["guard.provoke.times=1", "run.name=died"]
    with pytest.raises(Crash):
        train(words, DieAfter("rollback"))
    wide = set()

    class Look(Hook):
        def on_train_start(self, trainer):
            wide.update(meter.name for meter in trainer.meters.own if meter.wide)

    train(words, Look())
    assert len(wide) == 4


def test_the_rung_stands_where_the_ladder_has_it():
    policy = Policy(compose_config(["+model=tiny", "precision=fp8", "guard=fp8"]).guard)
    taken = [policy.decide(step, "weights", step - 2) for step in range(500, 900, 100)]
    assert [d.action for d in taken] == ["rollback", "rollback", "widen", "lower_lr"] and taken[2].products == ("*",)
    other = Policy(policy.config)
    other.load_state_dict(policy.state_dict())
    assert other.widened == ["*"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guard=fp8"], "guard.rungs has widen, and there are no 8-bit products"),
        (["precision=fp8", "guard.rungs=[{action: skip, products: [a]}]"], "only widen names products"),
    ],
)
def test_a_rung_that_cannot_be_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        compose_config(["+model=tiny", *words])
