import pytest

from megalm.observe.comparison import peak_bytes


@pytest.mark.parametrize(("free", "expected"), [(60, 30 + 15), (80, 30)])
def test_of_a_gpu_contexts_count_too(monkeypatch, free, expected):
    """100 bytes, of which torch has 25 now and had 30 at most; what else is taken is the contexts'."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 100))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 25)
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: 30)
    assert peak_bytes("cuda") == expected


def test_of_a_process():
    assert peak_bytes("cpu") > 2**20
