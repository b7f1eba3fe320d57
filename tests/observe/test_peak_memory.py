import subprocess
import sys

import pytest

from megalm.observe.comparison import PeakMemory


@pytest.mark.parametrize(("free", "expected"), [(60, 30 + 15), (80, 30)])
def test_of_a_gpu_contexts_count_too(monkeypatch, free, expected):
    """100 bytes, of which torch has 25 now and had 30 at most; what else is taken is the contexts'."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 100))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 25)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 30)
    assert PeakMemory("cuda").bytes() == expected


COUNT = """
import torch
from megalm.observe.comparison import PeakMemory
mib = 2**20
before = torch.ones(96 * mib // 4)
del before  # free again: its peak is not the run's
memory = PeakMemory("cpu")
assert memory.bytes() < 16 * mib, memory.bytes()
held = torch.ones(64 * mib // 4)
assert 60 * mib < memory.bytes() < 100 * mib, memory.bytes()
del held
assert memory.bytes() > 60 * mib, memory.bytes()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds now, and forgets a peak")
def test_of_a_process_counts_what_comes_and_not_what_was():
    """In a process of its own: here other tests have left memory that is used again."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
