import sys

import pytest
import torch

from megalm.observe.comparison import PeakMemory

MIB = 2**20


@pytest.mark.parametrize(("free", "expected"), [(60, 30 + 15), (80, 30)])
def test_of_a_gpu_contexts_count_too(monkeypatch, free, expected):
    """100 bytes, of which torch has 25 now and had 30 at most; what else is taken is the contexts'."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 100))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 25)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 30)
    assert PeakMemory("cuda").bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds now, and forgets a peak")
def test_of_a_process_counts_what_comes_and_not_what_was():
    before = torch.ones(96 * MIB // 4)
    del before  # free again: its peak is not the run's
    memory = PeakMemory("cpu")
    assert memory.bytes() < 16 * MIB
    held = torch.ones(64 * MIB // 4)
    assert 60 * MIB < memory.bytes() < 100 * MIB
    del held
    assert memory.bytes() > 60 * MIB
