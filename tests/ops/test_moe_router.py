import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops.backend import use_backend
from tests.ops.accuracy import check_against_reference, leaf

# (tokens, experts, top_k, groups, top_groups, group_scores)
SHAPES = [
    (1, 2, 1, 0, 0, 1),
    (5, 7, 3, 0, 0, 1),
    (33, 64, 8, 8, 4, 2),
    (9, 160, 6, 4, 2, 1),
    (70, 33, 33, 0, 0, 1),
    (3, 1024, 40, 128, 60, 3),
]


def options(shape, score, normalize, bias):
    _, experts, _, groups, top_groups, group_scores = shape
    return {
        "score": score,
        "normalize": normalize,
        "scale": 2.5 if normalize else 1.0,
        "bias": bias,
        "groups": groups,
        "top_groups": top_groups,
        "group_scores": group_scores,
    }


def spread_out(tokens, experts, dtype, device):
    """Logits whose scores all differ after rounding, so that the choice is the same in every precision."""
    order = torch.argsort(torch.rand(tokens, experts), -1).float()
    return ((order - experts / 2) * (6.0 / experts)).to(dtype).to(device).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_router(kernels, dtype, shape, score, normalize):
    tokens, experts, top_k, *_ = shape
    if dtype != torch.float32 and experts > 160:
        pytest.skip("a narrow dtype holds no thousand different scores")
    logits = spread_out(tokens, experts, dtype, kernels.device)
    bias = (torch.randint(0, 3, (experts,), device=kernels.device) * 0.5).requires_grad_(False)
    for offset in (None, bias if score == "sigmoid" else None):
        chosen = options(shape, score, normalize, offset)
        seen = []

        def run(x, chosen=chosen, seen=seen):
            routing = ops.moe_router(x, top_k, **chosen)
            seen.append((routing.experts, routing.counts))
            return routing.weights, routing.probability, routing.log_z

        gradients = [torch.randn(tokens, top_k), torch.randn(experts), torch.randn(tokens)]
        gradients = [g.to(kernels.device) for g in gradients]
        check_against_reference(run, run, [logits], gradients)
        assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
        assert seen[0][1].sum() == tokens * top_k and seen[0][0].dtype == seen[0][1].dtype == torch.int64


def test_by_hand(kernels):
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]], device=kernels.device).log()
    logits[0, 3] = -torch.inf
    plain = ops.moe_router(logits, 2)
    torch.testing.assert_close(plain.weights.cpu(), torch.tensor([[0.5, 1 / 3]]))
    assert plain.experts.tolist() == [[1, 2]] and plain.counts.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(plain.probability.cpu(), torch.tensor([1 / 6, 0.5, 1 / 3, 0.0]))
    torch.testing.assert_close(plain.log_z.cpu(), torch.tensor([6.0]).log())
    bias = torch.tensor([1.0, 0.0, 0.0, 0.0], device=kernels.device)
    biased = ops.moe_router(logits, 2, normalize=True, scale=2.0, bias=bias)
    assert biased.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(biased.weights.cpu(), torch.tensor([[0.5, 1.5]]))


def test_groups_keep_the_choice_inside(kernels):
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.8, 0.2, 0.05, 0.06]], device=kernels.device)
    logits = torch.logit(scores)

    def best(**group):
        return ops.moe_router(logits, 2, score="sigmoid", groups=4, **group).experts.tolist()

    assert best(top_groups=1) == [[0, 1]]  # by the best expert: the first pair
    assert best(top_groups=1, group_scores=2) == [[2, 3]]  # by the two best: 1.1 > 1.0 = 1.0
    assert best(top_groups=4) == [[0, 4]]


def test_ties_and_nan_choose_the_first_and_stay_inside(kernels):
    logits = torch.zeros(3, 37, device=kernels.device)
    logits[1, 5] = torch.nan
    logits[2] = torch.nan
    routing = ops.moe_router(logits, 4, score="sigmoid")
    assert routing.experts.tolist() == [[0, 1, 2, 3]] * 3
    assert ops.moe_router(logits, 37).experts[1].tolist() == list(range(37))  # softmax: all are NaN
    grouped = ops.moe_router(logits, 3, score="sigmoid", groups=1, top_groups=1)
    assert grouped.experts.tolist() == [[0, 1, 2]] * 3
    with use_backend("reference"):
        assert torch.equal(
            ops.moe_router(logits, 37, score="sigmoid").experts[1:2].sort()[0][0].cpu(), torch.arange(37)
        )


def test_any_part_of_the_gradient(kernels):
    logits = spread_out(6, 12, torch.float32, kernels.device)
    for score in ("softmax", "sigmoid"):
        for part in (0, 3, 4):
            outputs = []
            for backend in ("native", "reference"):
                with use_backend(backend):
                    value = ops.moe_router(logits, 3, score=score, normalize=True)[part]
                    outputs.append(
                        torch.autograd.grad(
                            (value * torch.arange(1, value.numel() + 1, device=value.device).view_as(value)).sum(),
                            [logits],
                        )
                    )
            torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("shift", [0.0, -19.0, -21.0, -46.0, -60.0, -87.0, -110.0, -300.0])
@pytest.mark.parametrize("part", ["weights", "probability"])
def test_sigmoid_shares_stay_shares_however_faint_all_scores_are(kernels, shift, part):
    """Values and gradients are those of float64, where no score of exp(-300) is 0."""
    logits = (spread_out(9, 40, torch.float32, "cpu").detach() * 0.5 + shift).to(kernels.device).requires_grad_()
    bias = torch.linspace(0, 0.1, 40, device=kernels.device)  # chooses where fp32 scores are all 0
    upstream = torch.randn(9, 4) if part == "weights" else torch.randn(40)

    def run(x, shifts):
        routing = ops.moe_router(x, 4, score="sigmoid", normalize=True, scale=2.0, bias=shifts)
        value = getattr(routing, part)
        (slope,) = torch.autograd.grad(value, [x], upstream.to(value))
        return value.detach().cpu().double(), slope.cpu().double(), routing.experts.cpu()

    value, slope, experts = run(logits, bias)
    whole = 2.0 * 9 if part == "weights" else 9.0
    assert abs(float(value.sum()) - whole) < 1e-4
    with use_backend("reference"):
        exact = logits.detach().cpu().double().requires_grad_()
        log_scores = torch.nn.functional.logsigmoid(exact)
        right = (
            log_scores.softmax(-1).sum(0) if part == "probability" else 2 * log_scores.gather(-1, experts).softmax(-1)
        )
        (right_slope,) = torch.autograd.grad(right, [exact], upstream.double())
        plain, plain_slope, _ = run(logits.detach().cpu().requires_grad_(), bias.cpu())
    for ours, theirs in ((value, slope), (plain, plain_slope)):
        torch.testing.assert_close(ours, right.detach(), rtol=3e-5, atol=1e-6)
        torch.testing.assert_close(theirs, right_slope, rtol=3e-4, atol=3e-6)


def test_lower_logits_do_not_lower_the_balance_loss(kernels):
    logits = torch.randn(64, 16, device=kernels.device) * 2
    losses = []
    for shift in (-10.0, -50.0, -100.0):
        routing = ops.moe_router((logits + shift).contiguous(), 2, score="sigmoid", normalize=True)
        losses.append(ops.load_balance_loss(routing.counts, routing.probability, 2).item())
    assert min(losses) >= 0.99  # 1 is an even load; a vanished loss would be 0


@pytest.mark.parametrize("shift", [0.0, -30.0, -90.0])
def test_softmax_weights_of_faint_choices_are_still_shares(kernels, shift):
    """A bias may choose experts whose probabilities are next to nothing."""
    logits = torch.full((3, 8), shift)
    logits[:, 0] = 20.0
    logits[:, 1:] += torch.arange(7) * 0.3
    bias = torch.tensor([-2.0, 0, 0, 0, 0, 0, 1, 1], device=kernels.device)
    logits = logits.to(kernels.device).requires_grad_()
    routing = ops.moe_router(logits, 2, normalize=True, bias=bias)
    assert routing.experts.sort()[0].tolist() == [[6, 7]] * 3
    right = logits.detach().gather(-1, routing.experts).double().softmax(-1)
    torch.testing.assert_close(routing.weights.double(), right, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(routing.weights[:, 0].sum(), [logits])
    expected = torch.zeros_like(slope)
    shares = (right[:, 0] * right[:, 1]).float()
    expected.scatter_(1, routing.experts, torch.stack([shares, -shares], 1))
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


def test_rows_without_any_score_have_no_share(kernels):
    logits = torch.full((2, 6), -torch.inf, device=kernels.device)
    logits[1, 3] = -500.0
    for backend in ("native", "reference"):
        with use_backend(backend):
            routing = ops.moe_router(logits, 1, score="sigmoid", normalize=True)
            assert routing.probability.tolist() == [0, 0, 0, 1, 0, 0]
            assert routing.weights[0].item() == 0


def test_losses():
    counts, probability = torch.tensor([4, 4, 4, 4]), torch.full((4,), 2.0, requires_grad=True)
    assert ops.load_balance_loss(counts, probability, 2).item() == 1.0  # 8 tokens, two experts each: even
    uneven = torch.tensor([8, 8, 0, 0])
    collapsed = ops.load_balance_loss(uneven, torch.tensor([4.0, 4.0, 0.0, 0.0]), 2)
    assert collapsed.item() == 2.0  # E / top_k: all probability where all load is
    (slope,) = torch.autograd.grad(ops.load_balance_loss(uneven, probability, 2), [probability])
    assert slope.tolist() == [0.25, 0.25, 0.0, 0.0]
    assert ops.load_balance_loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4), 2).item() == 0.0
    assert ops.router_z_loss(torch.tensor([1.0, 3.0])).item() == 5.0
    assert ops.router_z_loss(torch.zeros(0)).item() == 0.0


def test_empty(kernels):
    logits = leaf((0, 8), torch.float32, kernels.device)
    routing = ops.moe_router(logits, 2)
    assert routing.weights.shape == (0, 2) and routing.counts.tolist() == [0] * 8 and routing.probability.sum() == 0
    assert torch.autograd.grad(routing.weights.sum() + routing.log_z.sum(), [logits])[0].shape == (0, 8)


def test_probability_does_not_depend_on_the_number_of_threads(kernels):
    if kernels.place != "cpu":
        pytest.skip("about the CPU's threads")
    logits, threads, results = torch.randn(3000, 64), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.moe_router(logits, 4))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bad_arguments_are_named(kernels):
    x = torch.zeros(2, 8)
    for (positional, named), message in [
        (((torch.zeros(8), 2), {}), "logits has shape"),
        (((x, 9), {}), "top_k=9"),
        (((x, 0), {}), "top_k=0"),
        (((x, 2), {"score": "relu"}), "score='relu'"),
        (((x, 2), {"bias": torch.zeros(7)}), "bias is"),
        (((x, 2), {"bias": torch.zeros(8).double()}), "bias is torch.float64"),
        (((x, 2), {"groups": 3, "top_groups": 1}), "groups=3"),
        (((x, 5), {"groups": 4, "top_groups": 2}), "top_groups=2"),
        (((x, 2), {"groups": 4, "top_groups": 2, "group_scores": 3}), "group_scores=3"),
        (((x, 2), {"top_groups": 2}), "without groups"),
        (((x.double(), 2), {}), "logits is torch.float64"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ops.moe_router(*positional, **named)
    with pytest.raises(ConfigError, match="load_balance_loss"):
        ops.load_balance_loss(torch.zeros(3), torch.zeros(4), 1)
