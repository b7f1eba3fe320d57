"""State on a GPU: snapshots beside other work, weights lent and given back, attention's memory, streams, batches."""

from types import SimpleNamespace

import pytest
import torch

from megalm import ops
from megalm.architecture.layers import find_shared_layer
from megalm.config import ModelConfig
from megalm.data.batch import Batch
from megalm.guard.snapshots import SnapshotRing
from megalm.model.attention import Attention
from megalm.model.positions import Where
from megalm.ops import backend
from megalm.ops.attention import Case, Mask
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel.block_attention import CpuFlash, CudaFlash, try_blocks
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import Box
from megalm.precision.policy import PrecisionPolicy


def busy(device):
    """Keep the device at work for some milliseconds, so that what is launched next has not been done yet."""
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_is_restored_bitwise_whatever_ran_beside_it(device, dtype):
    tensors = [torch.randn(size, device=device).to(dtype) for size in (3, 1 << 20, 5_000_001)]
    boxes = [Box(f"t{i}", tuple(t.shape), (0,), t) for i, t in enumerate(tensors)]
    ring = SnapshotRing([1, 4])
    kept = []
    for step in range(6):
        busy(device)
        kept.append([t.clone() for t in tensors])
        ring.capture(step, boxes, {"step": step})
        busy(device)
        ring.settle()  # as before an update; without it the next line would be in the snapshot
        for tensor in tensors:
            tensor.add_(1.0)
    for latest in (5, 4):
        snapshot = ring.choose(latest)
        ring.restore(snapshot, boxes)
        for tensor, expected in zip(tensors, kept[snapshot.step], strict=True):
            assert torch.equal(tensor, expected), snapshot.step


def test_kernels_run_on_the_stream_that_is_current(device):
    if device.type != "cuda" or backend.find_library() is None or not backend.find_library().has_cuda:
        pytest.skip("needs the CUDA kernels")
    weight = torch.ones(256, device=device)
    x = torch.zeros(64, 512, device=device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        busy(device)
        x.fill_(1.0)
        y = ops.rms_norm(ops.swiglu(x), weight, 0.0)
    side.synchronize()
    torch.testing.assert_close(y, torch.ones_like(y))


@pytest.mark.parametrize(
    "case", ["causal", "grouped", "masked", "grouped masked", "fp32", "grouped fp32", "grouped documents"]
)
def test_attention_keeps_no_scores(device, case):
    """Of 4,096 positions they would be 256 MiB a copy for 8 heads in 16 bits; the fused kernels need a few MiB."""
    on_gpu = device.type == "cuda"
    length, heads, size = 4096 if on_gpu else 64, 8, 64
    dtype = torch.float32 if "fp32" in case else torch.bfloat16
    groups = 2 if "grouped" in case else heads
    config = ModelConfig(
        num_layers=1,
        hidden_size=heads * size,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=size,
        vocab_size=64,
        seq_length=length,
        position="learned",
    )
    made = {"device": device, "dtype": dtype}
    context = LayerContext(Mesh.single(device), policy=PrecisionPolicy(dtype), device=device)
    layer = Attention(find_shared_layer(config).attention, context, name="layers.0.attention")
    mask = Mask(length, device)
    if "masked" in case:
        mask = Mask(length, device, slopes=torch.full((heads,), 0.01, device=device))
    if "documents" in case:
        mask = Mask(length, device, documents=torch.zeros(1, length, dtype=torch.int32, device=device))
    width = (heads + 2 * groups) * size
    qkv = torch.randn(length, 1, width, **made, requires_grad=True)
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    layer.attend(qkv, Where(masks={None: mask})).float().square().mean().backward()
    assert qkv.grad.isfinite().all()
    if not on_gpu:
        return
    used = torch.cuda.max_memory_allocated() - before
    scores = heads * length**2 * dtype.itemsize
    assert used < scores / 2, f"{used / 2**20:.0f} MiB"


def test_flash_attention_of_a_block_is_the_plain_one(device):
    """What context parallelism joins: output, log-sum-exp, and gradients given those of the whole row."""
    kernel = CudaFlash() if device.type == "cuda" else CpuFlash()
    case = Case(device.type, torch.bfloat16, 4, 4, 64, 64, "causal", False, False)
    assert try_blocks(kernel, case, repeats=3) is None


@pytest.mark.parametrize("kind", ["causal", "window", "documents", "alibi"])
@pytest.mark.parametrize("determinism", ["strict", "fast"])
def test_a_kernel_is_found_that_keeps_no_scores(device, kind, determinism):
    """And it is right, and in the strict mode the same each time: else it would not be chosen."""
    case = Case(device.type, torch.bfloat16, 8, 2, 64, 64, kind, False, False)
    assert AttentionChoice("auto", determinism).choose(case).kernel.name != "scores"


def test_a_batch_arrives_whole_though_the_host_goes_on(device):
    for value in range(8):
        busy(device)
        tokens = torch.full((64, 4096), value)
        moved = Batch(tokens, tokens + 1, loss_mask=torch.ones(64, 4096)).to(device)
        tokens.fill_(-1)  # the loader's memory is used again
        assert moved.tokens.device.type == device.type
        if device.type == "cuda":
            assert bool((moved.tokens == value).all()) and bool((moved.labels == value + 1).all())


def test_random_states_come_back(device):
    from megalm.checkpoint.random_state import restore_random_state, take_random_state

    state = take_random_state()
    first = torch.rand(5, device=device), torch.rand(5)
    restore_random_state(state)
    again = torch.rand(5, device=device), torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weights_are_lent_and_given_back_bitwise(device):
    from megalm.guard.probe import use_other_weights

    weight = torch.randn(1000, device=device)
    weight[3] = float("nan")
    before = weight.clone()
    box = Box("w", (1000,), (0,), weight)
    seen = []
    optimizer = SimpleNamespace(wait_weights=lambda: None, gather_parameters=lambda: seen.append(weight.clone()))
    with use_other_weights(SimpleNamespace(optimizer=optimizer, model_chunks=[]), [box], [torch.zeros(1000)]):
        assert torch.equal(weight, torch.zeros(1000, device=device))
    assert seen and torch.equal(weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[30, 0, 50, 10], [0, 0, 0, 100], [20, 20, 0, 0]], ids=str)
def test_products_of_runs_of_rows(device, dtype, counts):
    """bf16 takes torch's grouped product: the same as one product a run, zeros behind the last."""
    x, weight = torch.randn(100, 64, device=device).to(dtype), torch.randn(4, 96, 64, device=device).to(dtype)
    x.requires_grad_(), weight.requires_grad_()
    grad, runs = torch.randn(100, 96, device=device).to(dtype), torch.tensor(counts, device=device)
    results = []
    for choice in ("auto", "reference"):
        with backend.use_backend(choice):
            y = ops.grouped_mm(x, weight, runs)
            results.append([y.detach(), *torch.autograd.grad(y, [x, weight], grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-1)


def test_a_compiled_full_graph_takes_the_same_kernels(device):
    def block(x, residual, weight):
        y, h = ops.add_rms_norm(x, residual, weight, 1e-5)
        return ops.swiglu(y) + h[..., :8]

    torch._dynamo.reset()
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 16), (6, 16), (16,))]
    want = block(*inputs)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
