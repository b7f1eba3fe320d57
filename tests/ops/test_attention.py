"""Each attention kernel against plain fp64 products; which of them is chosen, and when a kernel is not trusted."""

import pytest
import torch
from torch.nn.attention import flex_attention

from megalm.config.errors import ConfigError
from megalm.ops.attention import Case, Flex, Inputs, Mask, Scores, Torch
from megalm.ops.attention_choice import KERNELS, AttentionChoice, try_kernel

MASKS = ["causal", "cached", "window", "documents", "alibi", "everything"]


class FlexAnywhere(Flex):
    """FlexAttention's meaning without its compiler: its dense form, which runs on a CPU."""

    def why_not(self, case):
        return None


@pytest.fixture
def flex(monkeypatch):
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    torch._dynamo.reset()  # else it meets each further shape with symbols, which its dense form cannot trace
    return FlexAnywhere()


def make(kind, heads=4, groups=2, widths=(16, 16), softcap=None, sinks=False, batch=2):
    generator = torch.Generator().manual_seed(3)
    queries, seen = 13, 6 if kind in ("cached", "everything") else 0
    keys = queries + seen
    documents = None
    if kind in ("documents", "everything"):
        documents = (torch.arange(keys)[None] >= torch.tensor([[5], [9]])).int()
    slopes = torch.linspace(0.1, 0.6, heads) if kind in ("alibi", "everything") else None
    window = 4 if kind in ("window", "everything") else None
    mask = Mask(queries, "cpu", seen=seen, window=window, documents=documents, slopes=slopes)

    def draw(*shape):
        return torch.randn(shape, generator=generator, requires_grad=True)

    q, k, v = (
        draw(batch, heads, queries, widths[0]),
        draw(batch, groups, keys, widths[0]),
        draw(batch, groups, keys, widths[1]),
    )
    sunk = draw(heads) if sinks else None
    return Inputs(q, k, v, mask, 0.3, softcap, sunk)


def expected(call):
    """By loops over queries, in fp64."""
    mask, rows = call.mask, []
    q, k, v = (t.double() for t in (call.q, call.k, call.v))
    each = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            outs = []
            for i in range(mask.queries):
                at = i + mask.seen
                seen = [
                    j
                    for j in range(at + 1)
                    if (mask.window is None or at - j < mask.window)
                    and (mask.documents is None or mask.documents[b, j] == mask.documents[b, at])
                ]
                score = k[b, h // each, seen] @ q[b, h, i] * call.scale
                if call.softcap is not None:
                    score = call.softcap * torch.tanh(score / call.softcap)
                if mask.slopes is not None:
                    score = score - mask.slopes[h].double() * (at - torch.tensor(seen))
                weights = score.exp()
                total = weights.sum() + (call.sinks[h].double().exp() if call.sinks is not None else 0.0)
                outs.append(weights / total @ v[b, h // each, seen])
            heads.append(torch.stack(outs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def gradients(run, call):
    leaves = [t for t in (call.q, call.k, call.v, call.sinks) if t is not None]
    out = run(call)
    grad = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


CASES = [
    (kind, widths, softcap, sinks)
    for kind in MASKS
    for widths, softcap, sinks in [
        ((16, 16), None, False),
        ((24, 16), None, True),
        ((16, 16), 2.0, False),
        ((16, 24), 2.0, True),
    ]
]


@pytest.mark.parametrize(("kind", "widths", "softcap", "sinks"), CASES, ids=str)
@pytest.mark.parametrize("name", ["torch", "scores", "flex"])
def test_values_and_gradients_are_those_of_plain_products(name, kind, widths, softcap, sinks, flex):
    kernel = {"torch": Torch(), "scores": Scores(), "flex": flex}[name]
    call = make(kind, widths=widths, softcap=softcap, sinks=sinks)
    if kernel.why_not(call.case) is not None:
        assert name == "torch" and softcap is not None
        return
    for got, wanted in zip(gradients(kernel, call), gradients(expected, call), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_a_mask_is_described_by_what_it_adds_to_causality():
    assert [make(kind).mask.kind for kind in MASKS] == ["causal", "cached", "window", "documents", "alibi", "alibi"]
    assert Mask(8, "cpu", window=8).kind == "causal", "a window that reaches all hides nothing"


def test_the_last_keys_of_a_mask_are_those_a_cache_kept():
    whole = Mask(3, "cpu", seen=7, window=4, documents=torch.tensor([[0] * 6 + [1] * 4]))
    torch.testing.assert_close(whole.last(6).visible(), whole.visible()[..., -6:])
    assert whole.last(10) is whole


def test_drawn_masks_are_kept():
    mask = make("alibi").mask
    assert mask.draw(torch.float32) is mask.draw(torch.float32)


class Broken(Torch):
    """A kernel with a fault of one kind."""

    def __init__(self, name, fault):
        self.name, self.fault, self.calls = name, fault, 0

    def why_not(self, case):
        return "it is not installed" if self.fault == "missing" else None

    def __call__(self, call):
        self.calls += 1
        if self.fault == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")
        out = super().__call__(call)
        if self.fault == "wrong":
            return out * 1.2
        if self.fault == "restless" and self.calls > 5:
            return out + 1e-6
        return out


CASE = Case("cpu", torch.float32, 4, 2, 16, 16, "causal", False, False)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (None, None),
        ("raises", "fails: no kernel image is available"),
        ("wrong", "output is 2.0e-01 of the largest value off"),
        ("restless", "not the same bits each time"),
    ],
)
def test_a_kernel_is_trusted_after_it_was_right_and_the_same_each_time(fault, words):
    why = try_kernel(Broken("b", fault), CASE, repeats=8)
    assert why is None if words is None else words in why


def test_one_that_is_not_the_same_each_time_serves_where_that_is_not_asked():
    assert try_kernel(Broken("b", "restless"), CASE, repeats=1) is None


@pytest.mark.parametrize("kind", ["causal", "cached", "window", "documents", "alibi"])
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_is_tried_has_every_kind_of_mask(kind, capped, sinks, flex):
    case = Case("cpu", torch.float32, 4, 2, 16, 24, kind, capped, sinks)
    assert try_kernel(flex, case, repeats=2) is None


def test_trying_leaves_the_runs_random_numbers_alone():
    before = torch.get_rng_state()
    try_kernel(Scores(), CASE, repeats=3)
    assert torch.equal(before, torch.get_rng_state())


def gpu(kind="causal", dtype=torch.bfloat16, **others):
    return Case("cuda", dtype, 8, 2, others.get("width", 128), 128, kind, False, False)


@pytest.mark.parametrize(
    ("determinism", "case", "faults", "chosen"),
    [
        ("fast", gpu(), {}, "cudnn"),
        ("fast", gpu(), {"cudnn": "raises"}, "fa4"),
        ("fast", gpu(), {"cudnn": "wrong", "fa4": "missing", "fa3": "missing"}, "flash"),
        ("strict", gpu(), {}, "flex"),
        ("strict", gpu(), {"flex": "restless", "fa4": "missing"}, "fa3"),
        ("strict", gpu(), {"flex": "raises", "fa4": "missing", "fa3": "restless"}, "flash"),
        ("strict", gpu(), dict.fromkeys(["flex", "fa4", "fa3", "flash", "efficient"], "missing"), "scores"),
    ],
)
def test_the_first_of_the_order_that_can_be_trusted_serves(determinism, case, faults, chosen):
    kernels = [Broken(kernel.name, faults.get(kernel.name)) for kernel in KERNELS if kernel.name != "scores"]

    def trial(kernel, case, repeats):
        return try_kernel(kernel, case, repeats, "cpu")

    choice = AttentionChoice("auto", determinism, kernels=[*kernels, Scores()], trial=trial)
    made = choice.choose(case)
    assert made.kernel.name == chosen
    assert choice.choose(case) is made, "a case is asked about once"
    assert [name for name, _ in made.passed_over] == list(faults), str(made)


@pytest.mark.parametrize(
    ("case", "refused"),
    [
        (gpu("documents"), {"cudnn", "flash"}),
        (gpu(dtype=torch.float32), {"cudnn", "flash"}),
        (gpu(width=192), {"cudnn"}),
        (gpu("cached"), {"cudnn", "flash", "flex"}),
    ],
)
def test_what_a_kernel_cannot_serve_it_says(case, refused):
    kernels = {kernel.name: kernel for kernel in KERNELS}
    for name in refused:
        assert kernels[name].why_not(case)
    assert kernels["efficient"].why_not(case) is None


def test_a_kernel_that_is_asked_for_and_does_not_serve_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"ops.attention=cudnn does not serve .* this is cpu. torch does"):
        AttentionChoice("cudnn").choose(CASE)
    assert AttentionChoice("scores").choose(CASE).kernel.name == "scores"


def test_on_a_cpu_torchs_own_serves_and_capped_scores_are_in_memory():
    choice = AttentionChoice()
    assert choice.choose(CASE).kernel.name == "torch"
    assert choice.choose(make("causal", softcap=2.0).case).kernel.name == "scores"
