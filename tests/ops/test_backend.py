import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megalm import ops
from megalm.config.errors import ConfigError
from megalm.ops import backend
from megalm.ops.backend import use_backend
from scripts.build_extension import SOURCE, contract


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(backend, "_library", None)


def test_choices():
    with pytest.raises(ConfigError, match=r"ops.backend=fast: not one of auto, native, apex, te, reference"):
        ops.set_backend("fast")
    before = ops.get_backend()
    with use_backend("reference"):
        assert ops.get_backend() == "reference"
    assert ops.get_backend() == before


def test_without_the_extension_the_reference_serves(without_extension):
    x, weight = torch.randn(3, 4), torch.randn(4)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (4,), weight, 1e-5))
    assert ops.swiglu(x).shape == (3, 2)
    assert ops.l2_norm_nonfinite([x])[0] > 0
    labels = torch.tensor([0, 1, -100])
    loss = torch.nn.functional.cross_entropy(x, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(ops.cross_entropy(x, labels), loss)
    assert not ops.keep_freed_memory()
    with pytest.raises(ConfigError, match="make build"):
        ops.set_backend("native")


def test_auto_takes_the_reference_for_what_no_kernel_serves():
    with use_backend("auto"):
        x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        assert ops.rms_norm(x, weight, 1e-5).dtype == torch.float64


@pytest.mark.skipif(backend.find_library() is None or sys.platform != "linux", reason="megalm._C is not built")
def test_the_extension_shares_torchs_openmp():
    """Two OpenMP runtimes in one process would each start their own threads."""
    code = (
        "import megalm.ops, os; "
        "print(len({os.path.realpath(l.split()[-1]) for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


@pytest.mark.skipif(backend.find_library() is None, reason="megalm._C is not built")
def test_every_instruction_set_gives_the_same_answers():
    library = backend.get_library()
    best, results = library.best_cpu_isa(), []
    torch.manual_seed(0)
    x, residual, weight = torch.randn(7, 2, 130), torch.randn(7, 2, 130), torch.randn(130)
    labels = torch.randint(0, 130, (7, 2))
    try:
        for isa in range(best + 1):
            library.set_cpu_isa(isa)
            assert library.cpu_isa() == isa
            with use_backend("native"):
                for dtype in (torch.float32, torch.bfloat16):
                    leaf = x.to(dtype).requires_grad_()
                    y, h = ops.add_rms_norm(leaf, residual.to(dtype), weight.to(dtype), 1e-5)
                    z = (
                        ops.swiglu(y).float().sum()
                        + ops.bias_gelu(h).float().sum()
                        + ops.cross_entropy(y, labels).sum()
                    )
                    results.append((isa, dtype, z.detach(), *torch.autograd.grad(z, leaf)))
    finally:
        library.set_cpu_isa(best)
    for _, dtype, value, gradient in results:
        first = next(r for r in results if r[1] == dtype)
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(value, first[2], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient, first[3], rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="instruction set"):
        library.set_cpu_isa(3)


def test_an_extension_of_other_sources_is_told_apart(tmp_path):
    """By what Python and it must agree on; not by comments and white space."""
    sources = tmp_path / "csrc"
    shutil.copytree(SOURCE, sources, ignore=shutil.ignore_patterns("*.cu", "op.cpp"))
    module = SimpleNamespace(contract=contract(), __file__="/somewhere/_C.so")
    assert backend.explain_other_sources(module, sources) is None
    header = sources / "norm" / "op.h"
    header.write_text("// another comment\n" + header.read_text().replace("\n\n", "\n"))
    assert backend.explain_other_sources(module, sources) is None
    header.write_text(header.read_text().replace("float eps;", "double eps;"))
    assert "/somewhere/_C.so was built from other sources" in backend.explain_other_sources(module, sources)
    assert "make build" in backend.explain_other_sources(SimpleNamespace(__file__="old"), SOURCE)
    assert backend.explain_other_sources(SimpleNamespace(__file__="wheel"), tmp_path / "elsewhere") is None
