"""Copies and their checksums, against the xxhash library."""

import numpy as np
import pytest
import torch
import xxhash
from torch.distributed.checkpoint.planner import WriteItem

from megalm.checkpoint import staging
from megalm.ops import backend


def item() -> WriteItem:
    return WriteItem(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("compiled", [True, False])
def test_copies_have_the_checksums_of_their_sources(compiled, threads, monkeypatch):
    if not compiled:
        monkeypatch.setattr(staging, "find_library", lambda: None)
    elif backend.find_library() is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(staging, "THREAD_BYTES", 1)
    generator = torch.Generator().manual_seed(5)
    sizes = [(3,), (61,), (300, 7), (1 << 17, 3)]
    tensors = [torch.randn(size, generator=generator) for size in sizes]
    tensors += [torch.randn(40, 30, generator=generator).t(), torch.randn(901, generator=generator).bfloat16()]
    place = staging.Staging()
    place.arrange([(item(), tensor) for tensor in tensors])
    for _ in range(2):
        chunks = place.take()
        for tensor, chunk in zip(tensors, chunks, strict=True):
            expected = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert chunk.values.tobytes() == expected
            assert chunk.xxh3 == xxhash.xxh3_64_hexdigest(expected)
        for tensor in tensors:
            tensor.mul_(1.5)
    place.close()


def test_the_compiled_checksum_is_the_library_s():
    compiled = backend.find_library()
    if compiled is None:
        pytest.skip("the extension is not built")
    random = np.random.RandomState(0)
    before = compiled.cpu_isa()
    try:
        for isa in range(compiled.best_cpu_isa() + 1):
            compiled.set_cpu_isa(isa)
            # around stripes of 64 bytes and blocks of 1024, to places that are aligned and that are not
            for size in [*range(241, 330), *range(1020, 1092), 2048, 2049, 100_001]:
                source, target = random.bytes(size), np.zeros(size + 192, np.uint8)
                start = -target.ctypes.data % 64 + size % 2
                value = compiled.copy_digest(
                    np.frombuffer(source, np.uint8).ctypes.data, target.ctypes.data + start, size
                )
                assert value == xxhash.xxh3_64_intdigest(source)
                assert target[start : start + size].tobytes() == source
                assert not target[:start].any() and not target[start + size :].any()
    finally:
        compiled.set_cpu_isa(before)
    with pytest.raises(ValueError, match="bytes"):
        compiled.copy_digest(0, 0, 240)
