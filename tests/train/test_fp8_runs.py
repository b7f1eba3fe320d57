"""Runs with 8-bit products: the same on every layout, resumed bit by bit, refused where they cannot be."""

import pytest
import torch

from megalm.architecture.products import list_products
from megalm.config import ConfigError
from megalm.config.changes import check_changes, compare
from megalm.config.compose import compose_config
from megalm.config.precision import RECIPES
from megalm.launch.resolve import resolve
from megalm.model.transformer import Transformer
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.precision.fp8 import Fp8Product
from megalm.precision.policy import make_policy
from megalm.precision.product import PLAIN
from tests.distributed import run_ranks
from tests.mixtures import train
from tests.small_run import small_run
from tests.train.test_mixture_runs import run_to

QUIET = ("guard=off", "train.eval_every=0", "train.eval_sequences=0", "checkpoint.every=0", "optim.eps=1e-6")


def fp8_run(folder, *overrides):
    """Overrides of a small run with 8-bit products of fp32 operands.

    Sums over tensor and context ranks differ in their last bits. Where that moves a value over the border between two codes,
    losses differ by 1e-4 from then on: with these weights it does not happen within three steps.
    """
    return small_run(
        folder, *QUIET, "precision=fp8", "precision.dtype=fp32", "optim.lr=1e-3", "model.init_std=0.04", *overrides
    )


def losses_of(world, words, folder):
    records, _, _ = run_ranks(world, train, world, words, folder)[0]
    return [record["loss"] for record in records]


LAYOUTS = {
    "dp": (2, "parallel.data=2"),
    "tp": (2, "parallel.tensor=2"),
    "sequence": (2, "parallel.tensor=2", "parallel.sequence=true"),
    "pp": (2, "parallel.pipeline=2"),
    "pp, backward in two": (2, "parallel.pipeline=2", "parallel.schedule=zb-h1"),
    "cp": (2, "parallel.context=2"),
    "zero 1": (2, "parallel=zero1"),
    "zero 2": (2, "parallel=zero2"),
    "fully_shard": (2, "parallel.data_mode=fully_shard"),
    "tp x dp, recomputed": (4, "parallel.tensor=2", "parallel.data=2", "parallel.recompute=full"),
    "sequence x pp, recomputed in part": (
        4, "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.recompute=selective",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_tensor_scales_every_layout_follows_one_ranks_losses(tmp_path, layout):
    world, *words = LAYOUTS[layout]
    alone = losses_of(1, fp8_run(tmp_path), tmp_path)
    plain = losses_of(1, fp8_run(tmp_path, "precision.fp8.recipe=none"), tmp_path)
    assert all(abs(a - b) > 1e-6 * b for a, b in zip(alone, plain, strict=True)), "8-bit products are computed"
    assert losses_of(world, fp8_run(tmp_path, *words), tmp_path) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "tensorwise"])
@pytest.mark.parametrize("layout", ["dp", "pp", "zero 2"])
def test_scales_of_blocks_do_not_know_of_data_ranks_and_stages(tmp_path, recipe, layout):
    world, *words = LAYOUTS[layout]
    recipe = f"precision.fp8.recipe={recipe}"
    alone = losses_of(1, fp8_run(tmp_path, recipe), tmp_path)
    assert losses_of(world, fp8_run(tmp_path, recipe, *words), tmp_path) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise"])
@pytest.mark.parametrize("layout", ["tp", "sequence", "cp"])
def test_scales_of_blocks_are_only_close_where_a_block_is_cut(tmp_path, recipe, layout):
    world, *words = LAYOUTS[layout]
    recipe = f"precision.fp8.recipe={recipe}"
    alone = losses_of(1, fp8_run(tmp_path, recipe), tmp_path)
    assert losses_of(world, fp8_run(tmp_path, recipe, *words), tmp_path) == pytest.approx(alone, rel=5e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "word", ["parallel.recompute=selective", "parallel.recompute=full", "precision.fp8.keep_weights=false"]
)
def test_what_is_kept_and_what_is_made_again_changes_no_bit(tmp_path, recipe, word):
    words = fp8_run(tmp_path, f"precision.fp8.recipe={recipe}")
    assert losses_of(1, [*words, word], tmp_path) == losses_of(1, words, tmp_path)


@pytest.mark.parametrize(("recipe", "share"), [("tensorwise", 0.5), ("rowwise_wide", 1.0)])
def test_inputs_are_kept_in_8_bits(tmp_path, recipe, share):
    """Of a layer's MLP in bf16: the norm's output, the activation's input and its output."""
    inputs = {}
    for each in ("none", recipe):
        config = compose_config(fp8_run(tmp_path, f"precision.fp8.recipe={each}", "precision.dtype=bf16"))
        policy = make_policy(config.precision, config.model)
        model = Transformer(config.model, LayerContext(Mesh.single(), config.parallel, policy))
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        mlp, (tokens, hidden, ffn) = model.layers[0].mlp, (64, 32, 64)
        x = torch.randn(tokens // 2, 2, hidden, dtype=torch.bfloat16, requires_grad=True)
        weights = {parameter.data_ptr() for parameter in mlp.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlp(x + 0, None)
        inputs[each] = sum(size for place, (size, _) in kept.items() if place not in weights)
        inputs[each] -= 2 * tokens * 2 * ffn  # the activation's own input
    whole = 2 * tokens * (hidden + ffn)
    assert inputs["none"] == whole
    assert inputs[recipe] == pytest.approx(share * whole, abs=64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_bit_by_bit(tmp_path, recipe):
    words = small_run(
        tmp_path, "guard=off", "precision=fp8", f"precision.fp8.recipe={recipe}", "optim.schedule=constant",
        "train.eval_every=0",
    )  # fmt: skip
    (straight,) = run_ranks(1, run_to, 1, words, tmp_path / "straight")
    run_ranks(1, run_to, 1, [*words, "train.steps=3"], tmp_path / "stopped")
    (resumed,) = run_ranks(1, run_to, 1, words, tmp_path / "stopped")
    assert resumed[2] == straight[2][3:] and len(resumed[2]) == 3
    assert all(torch.equal(a[2], b[2]) for a, b in zip(straight[1], resumed[1], strict=True))
    assert straight[2][-1][0] < straight[2][0][0]


# ------------------------------------------------------------------------------------------------------ which products
MODELS = ["+model=llama3-8b", "+model=deepseek-v3", "+model=qwen3-30b-a3b", "+model=gpt2-124m"]


@pytest.mark.parametrize("model", MODELS)
def test_the_architecture_lists_the_products_that_modules_ask_for(model):
    asked = set()

    class Policy(make_policy(compose_config([model]).precision, compose_config([model]).model).__class__):
        def choose_product(self, name):
            asked.add(name)
            return PLAIN

    config = compose_config([model, "model.num_layers=4"])
    Transformer(config.model, LayerContext(Mesh.single(), config.parallel, Policy(), device="meta"))
    assert asked - {"output"} == {product.name for _, product in list_products(config.model)}


def chosen(*overrides):
    config = compose_config(["+model=tiny", "model.num_layers=4", "precision=fp8", *overrides])
    policy = make_policy(config.precision, config.model)
    names = [product.name for _, product in list_products(config.model)]
    assert all((type(policy.choose_product(n)) is Fp8Product) == (n in policy.fp8) for n in [*names, "output"])
    return policy.fp8


def test_embedding_output_matrix_and_what_is_skipped_stay_as_they_were():
    parts = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    every = {f"layers.{layer}.{part}" for layer in range(4) for part in parts}
    assert chosen() == every
    assert chosen("precision.fp8.skip_first=1", "precision.fp8.skip_last=2") == {n for n in every if n[7] == "1"}
    skipped = chosen("precision.fp8.skip=[layers.*.attention.output,layers.3.*]")
    assert skipped == {n for n in every if "attention.output" not in n and n[7] != "3"}
    assert chosen("model.num_heads=2", "model.head_dim=64", "precision.fp8.smallest=256") == {
        n for n in every if "output" not in n
    }


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision.fp8.recipe=delayed"], "precision.fp8.recipe=delayed"),
        (["precision.fp8.skip=[layers.0.attention.query]"], "no product is called so.*layers.0.attention.qkv"),
        (["precision.fp8.skip_first=2"], "none of the 8 products is left"),
        (["precision=bf16", "precision.fp8.skip=[layers.0.*]"], "read with a recipe of 8-bit products alone"),
        (["model.seq_length=36"], "matrices of 72 rows.*multiples of 16"),
        (["parallel.context=2", "train.micro_batch_size=1", "model.seq_length=24"], "gives matrices of 12 rows"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        resolve(compose_config(fp8_run(tmp_path, *overrides)), 2)


def test_a_weight_whose_part_does_not_fit_is_refused(tmp_path):
    words = fp8_run(tmp_path, "model.ffn_hidden_size=72")
    with pytest.raises(AssertionError, match=r"layers.0.mlp.up: a rank's part of the weight is 144 x 32|72"):
        run_ranks(1, train, 1, words, tmp_path)


def test_another_recipe_is_refused_unless_it_is_asked_for(tmp_path):
    before, after = (compose_config(fp8_run(tmp_path, f"precision.fp8.recipe={r}")) for r in ("rowwise", "blockwise"))
    changes = compare(before, after)
    with pytest.raises(ConfigError, match=r"precision.fp8.recipe"):
        check_changes(changes, [], "a checkpoint")
    check_changes(changes, ["precision.fp8.recipe"], "a checkpoint")
