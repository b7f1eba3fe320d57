"""How fast this machine multiplies matrices now: what a training step can be held against where no peak is known."""

import time

SIZE = 2048  # rows and columns: beyond the caches, and below a second on two cores
REPEATS = 3


def measure_matrix_flops(dtype: str, threads: int, size: int = SIZE) -> float:
    """FLOP/s of a product of two square matrices on the CPU by torch, the best of some."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        left, right = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
        out = left @ right  # what libraries load and choose at first is not measured
        seconds = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            torch.mm(left, right, out=out)
            seconds.append(time.perf_counter() - begun)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / min(seconds)
