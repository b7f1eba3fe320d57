"""A mixture on one rank: every family's block in transformers is the referee, values and gradients; then loads at the edge."""

import pytest
import torch
import torch.nn.functional as F

from megalm.architecture.layers import specify_layers
from megalm.config import ModelConfig, ParallelConfig
from megalm.config.model import MoEConfig
from megalm.model.auxiliary import Auxiliary
from megalm.model.mixture import Mixture
from megalm.model.positions import Where
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import list_boxes, slice_of, view_piece

HIDDEN, WIDTH, EXPERTS, TOP_K = 24, 20, 8, 3


def mixture(parallel=None, activation="swiglu", linear_bias=False, **moe):
    """A Mixture of the sizes above with random weights, in evaluation mode."""
    sizes = dict(num_layers=1, hidden_size=HIDDEN, num_heads=2, ffn_hidden_size=WIDTH, vocab_size=64, seq_length=16)
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, **moe}
    model = ModelConfig(**sizes, activation=activation, linear_bias=linear_bias, init_std=0.3, moe=MoEConfig(**moe))
    model.fill_in()
    made = Mixture(specify_layers(model)[0].mlp, LayerContext(Mesh.single(), parallel or ParallelConfig()), name="m")
    initialize(made, 5)
    return made.eval()


def gradients(module):
    """Each tensor's gradient by its global name without the mixture's."""
    return {
        piece.name.removeprefix("m."): view_piece(parameter.grad, piece)
        for parameter in module.parameters()
        for piece in slice_of(parameter).pieces
    }


def load(module, tensors):
    """Overwrite the module's tensors; every one must be there."""
    boxes = {box.name.removeprefix("m."): box.tensor for box in list_boxes(module)}
    assert boxes.keys() == tensors.keys()
    for name, tensor in tensors.items():
        boxes[name].copy_(tensor)


# ------------------------------------------------------------------------------------------------ transformers' blocks
def stacked(block, gate, values):
    """Names of experts whose gate and up lie in one tensor."""
    found = {"router.weight": values(gate)}
    both, down = values(block.experts.gate_up_proj), values(block.experts.down_proj)
    for e in range(EXPERTS):
        found[f"experts.{e}.gate.weight"], found[f"experts.{e}.up.weight"] = both[e].chunk(2)
        found[f"experts.{e}.down.weight"] = down[e]
    return found


def shared(mlp, values):
    return {
        f"shared_expert.{part}.weight": values(getattr(mlp, f"{part}_proj").weight) for part in ("gate", "up", "down")
    }


def of_gpt_oss(block, values):
    experts = block.experts
    found = {"router.weight": values(block.router.weight), "router.bias": values(block.router.bias)}
    both, bias = values(experts.gate_up_proj), values(experts.gate_up_proj_bias)
    down, down_bias = values(experts.down_proj), values(experts.down_proj_bias)
    for e in range(EXPERTS):
        for place, part in enumerate(("gate", "up")):
            found[f"experts.{e}.{part}.weight"] = both[e][:, place::2].t()
            found[f"experts.{e}.{part}.bias"] = bias[e][place::2]
        found[f"experts.{e}.down.weight"], found[f"experts.{e}.down.bias"] = down[e].t(), down_bias[e]
    return found


def of_dbrx(block, values):
    found = {"router.weight": values(block.router.layer.weight)}
    w1, v1, w2 = (values(getattr(block.experts.mlp, n)).view(EXPERTS, WIDTH, HIDDEN) for n in ("w1", "v1", "w2"))
    for e in range(EXPERTS):
        found |= {
            f"experts.{e}.gate.weight": w1[e],
            f"experts.{e}.up.weight": v1[e],
            f"experts.{e}.down.weight": w2[e].t(),
        }
    return found


def make_mixtral(t):
    config = t.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    block = t.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    return block, lambda values: stacked(block, block.gate.weight, values)


def make_olmoe(t):
    config = t.OlmoeConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
    )
    block = t.models.olmoe.modeling_olmoe.OlmoeSparseMoeBlock(config)
    return block, lambda values: stacked(block, block.gate.weight, values)


def make_qwen3(t):
    config = t.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    block = t.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    return block, lambda values: stacked(block, block.gate.weight, values)


def make_qwen2(t):
    config = t.Qwen2MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        shared_expert_intermediate_size=12, norm_topk_prob=False,
    )  # fmt: skip
    block = t.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock(config)
    return block, lambda values: {
        **stacked(block, block.gate.weight, values),
        **shared(block.shared_expert, values),
        "shared_gate.weight": values(block.shared_expert_gate.weight),
    }


def make_dbrx(t, power=1.0):
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig

    ffn = DbrxFFNConfig(
        hidden_size=HIDDEN, ffn_hidden_size=WIDTH, moe_num_experts=EXPERTS, moe_top_k=TOP_K,
        moe_normalize_expert_weights=power,
    )  # fmt: skip
    block = t.models.dbrx.modeling_dbrx.DbrxFFN(t.DbrxConfig(d_model=HIDDEN, ffn_config=ffn))
    return block, lambda values: of_dbrx(block, values)


def make_deepseek(t, groups=4, top_groups=2):
    config = t.DeepseekV3Config(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=groups,
        topk_group=top_groups, norm_topk_prob=True, routed_scaling_factor=2.5, n_shared_experts=2,
    )  # fmt: skip
    block = t.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(config)
    block.gate.e_score_correction_bias.copy_(torch.randn(EXPERTS) * 0.1)
    return block, lambda values: {
        **stacked(block, block.gate.weight, values),
        **shared(block.shared_experts, values),
        "router.selection_bias": block.gate.e_score_correction_bias,
    }


def make_glm4(t):
    config = t.Glm4MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5, n_shared_experts=1,
    )  # fmt: skip
    block = t.models.glm4_moe.modeling_glm4_moe.Glm4MoeMoE(config)
    block.gate.e_score_correction_bias.copy_(torch.randn(EXPERTS) * 0.1)
    return block, lambda values: {
        **stacked(block, block.gate.weight, values),
        **shared(block.shared_experts, values),
        "router.selection_bias": block.gate.e_score_correction_bias,
    }


def make_gpt_oss(t):
    config = t.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        swiglu_limit=1.5,
    )
    block = t.models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    return block, lambda values: of_gpt_oss(block, values)


SOFTMAX = {"score": "softmax"}
FAMILIES = {
    "mixtral": (make_mixtral, SOFTMAX),
    "olmoe": (make_olmoe, {**SOFTMAX, "weight_norm": None}),
    "qwen3": (make_qwen3, SOFTMAX),
    "qwen2": (make_qwen2, {**SOFTMAX, "weight_norm": None, "shared_ffn_hidden_size": 12, "shared_gate": True}),
    "dbrx": (make_dbrx, SOFTMAX),
    "dbrx, power 2": (lambda t: make_dbrx(t, 2.0), {**SOFTMAX, "weight_norm": 2.0}),
    "deepseek": (
        make_deepseek,
        {"groups": 4, "top_groups": 2, "weight_scale": 2.5, "num_shared_experts": 2},
    ),
    "kimi": (lambda t: make_deepseek(t, 1, 1), {"weight_scale": 2.5, "num_shared_experts": 2}),
    "glm4": (make_glm4, {"weight_scale": 1.5, "num_shared_experts": 1}),
    "gpt-oss": (
        make_gpt_oss,
        {**SOFTMAX, "router_bias": True, "activation": "clamped_swiglu", "linear_bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_the_familys_block(family):
    transformers = pytest.importorskip("transformers")
    make, moe = FAMILIES[family]
    torch.manual_seed(3)
    block, names = make(transformers)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.4)
    ours = mixture(**moe)
    if "activation" in moe:
        ours.experts.activation.keywords["limit"] = 1.5
    load(ours, {name: value.detach() for name, value in names(lambda t: t).items()})
    x = torch.randn(2, 11, HIDDEN, requires_grad=True)
    theirs = block(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    own_x = x.detach().clone().requires_grad_()
    found = ours(own_x.transpose(0, 1), Where()).transpose(0, 1)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    pull = torch.randn_like(found)
    found.backward(pull)
    theirs.backward(pull)
    torch.testing.assert_close(own_x.grad, x.grad, rtol=1e-4, atol=1e-4)
    mine, wanted = gradients(ours), names(lambda t: t.grad)
    wanted.pop("router.selection_bias", None)
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-5 * max(largest, 1.0), msg=name)


# ---------------------------------------------------------------------------------------------------------- our own ways
def results(module, x, dtype=torch.float32):
    module = module.to(dtype)
    x = x.to(dtype).requires_grad_()
    y = module(x, Where())
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients(module)}


@pytest.mark.parametrize("linear_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_experts_in_chunks_of_rows_give_the_same(linear_bias, rows):
    x = torch.randn(5, 3, HIDDEN)
    whole = results(mixture(linear_bias=linear_bias), x.clone())
    parts = results(mixture(ParallelConfig(expert_rows=rows), linear_bias=linear_bias), x.clone())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-5, msg=name)


def pointwise(activation, gate, up):
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return (up + 1) * gate * (1.702 * gate).sigmoid()
    function = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu}[activation]
    return function(up) if gate is None else function(gate) * up


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "relu", "clamped_swiglu"])
def test_experts_are_a_sum_of_mlps(dispatch, activation):
    made = mixture(ParallelConfig(expert_dispatch=dispatch), activation=activation)
    x = torch.randn(4, 2, HIDDEN)
    boxes = {box.name.removeprefix("m."): box.tensor for box in list_boxes(made)}
    scores = (x @ boxes["router.weight"].t()).sigmoid()
    chosen = scores.topk(TOP_K).indices
    wanted = torch.zeros_like(x)
    for place in range(TOP_K):
        for at in [(s, b) for s in range(4) for b in range(2)]:
            e = int(chosen[at][place])
            up = boxes[f"experts.{e}.up.weight"] @ x[at]
            gate = boxes[f"experts.{e}.gate.weight"] @ x[at] if f"experts.{e}.gate.weight" in boxes else None
            hidden = pointwise(activation, gate, up)
            weight = scores[at][e] / scores[at][chosen[at]].sum()
            wanted[at] += weight * (boxes[f"experts.{e}.down.weight"] @ hidden)
    with torch.no_grad():
        torch.testing.assert_close(made(x, Where()), wanted, rtol=1e-5, atol=1e-5)


def test_an_expert_without_tokens_has_gradients_of_zero():
    made = mixture(top_k=1)
    with torch.no_grad():
        made.router.weight.zero_()
        made.router.weight[2] = 1.0
    found = results(made, torch.rand(6, 2, HIDDEN) + 0.1)
    for name in found:
        if name.startswith("experts."):
            assert found[name].any() == name.startswith("experts.2."), name


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_no_token_at_all_gives_gradients_of_zero(dispatch):
    made = mixture(ParallelConfig(expert_dispatch=dispatch), linear_bias=True, num_shared_experts=1)
    found = results(made, torch.zeros(0, 2, HIDDEN))
    assert all(not value.any() for value in found.values()) and found["y"].shape == (0, 2, HIDDEN)


def test_bf16_rounds_weights_and_activations_and_routes_in_fp32():
    x = torch.randn(6, 2, HIDDEN)
    narrow = mixture().to(torch.bfloat16)
    logits = narrow.router.logits(x.bfloat16())
    assert logits.dtype == torch.float32
    wanted = x.bfloat16().float() @ narrow.router.weight.float().t()
    torch.testing.assert_close(logits, wanted)
    found, exact = results(mixture(), x.clone(), torch.bfloat16), results(mixture(), x.bfloat16().float())
    assert found["y"].dtype == torch.bfloat16 and narrow.balance.selection_bias.dtype == torch.float32
    torch.testing.assert_close(found["y"].float(), exact["y"], rtol=0.05, atol=0.05 * exact["y"].abs().max().item())


@pytest.mark.parametrize("kind", ["sequence", "global", "micro_batch"])
def test_balance_losses_are_their_formulas(kind):
    made = mixture(balance=kind, balance_loss=0.3, z_loss=0.2).train()
    x = torch.randn(5, 2, HIDDEN)
    if kind == "global":
        made.balance.load_shares.copy_(torch.rand(EXPERTS).softmax(0))
    auxiliary = Auxiliary(torch.ones(()))
    y = made(x.clone().requires_grad_(), Where(auxiliary=auxiliary))
    (y.sum() * 0).backward()  # the losses alone
    weight = made.router.weight.detach().clone().requires_grad_()
    logits = x @ weight.t()
    scores = logits.sigmoid()
    shares = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(TOP_K).indices, 1.0)
    if kind == "sequence":
        load = chosen.mean(0, keepdim=True) / TOP_K
    elif kind == "micro_batch":
        load = chosen.mean((0, 1), keepdim=True) / TOP_K
    else:
        load = made.balance.load_shares
    balance = 0.3 * EXPERTS * (load * shares).sum()
    z = 0.2 * logits.logsumexp(-1).square().sum()
    (balance + z).backward()
    torch.testing.assert_close(made.router.weight.grad, weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(auxiliary.sums["router/balance_loss"], balance.detach())
    torch.testing.assert_close(auxiliary.sums["router/z_loss"], z.detach())
    assert torch.equal(auxiliary.sums["m.router.counts"], chosen.sum((0, 1)))
    torch.testing.assert_close(auxiliary.sums["m.router.probability"], shares.sum((0, 1)).detach())


def test_balance_is_one_where_the_load_is_even():
    made = mixture(balance_loss=1.0, top_k=EXPERTS).train()
    auxiliary = Auxiliary(torch.ones(()))
    made(torch.randn(5, 2, HIDDEN), Where(auxiliary=auxiliary))
    assert auxiliary.sums["router/balance_loss"].item() == pytest.approx(5 * 2)


def test_evaluation_reports_nothing_and_no_forward_pass_moves_a_state():
    made = mixture()
    auxiliary = Auxiliary(torch.ones(()))
    before = made.balance.selection_bias.clone()
    made(torch.randn(5, 2, HIDDEN), Where(auxiliary=auxiliary))
    assert not auxiliary.sums
    made.train()(torch.randn(5, 2, HIDDEN), Where(auxiliary=auxiliary))
    assert auxiliary.sums and torch.equal(made.balance.selection_bias, before)


def test_scores_too_small_for_fp32_still_balance():
    """Quotients of scores, not of what a constant in the denominator leaves of them: pulling all logits down is no way out."""
    made = mixture(balance_loss=1.0).train()
    with torch.no_grad():
        made.router.weight.fill_(-30.0)
    auxiliary = Auxiliary(torch.ones(()))
    made(torch.rand(5, 2, HIDDEN) + 1.0, Where(auxiliary=auxiliary))
    assert auxiliary.sums["router/balance_loss"].item() >= 9.99
