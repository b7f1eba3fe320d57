"""Every kernel's tests once more under AddressSanitizer: CUDA kernels in the emulator, and the CPU kernels.

The build is kept in build/emulated; only what changed is compiled again.
"""

import os
import subprocess
import sys

import pytest

from scripts.build_extension import ROOT, compiler
from scripts.emulated import build_emulated, sanitizer_preload


def test_kernels_under_the_emulator_and_the_sanitizer(tmp_path):
    try:
        module = build_emulated()
    except RuntimeError as error:
        if "does not compile" in str(error):
            raise
        pytest.skip(str(error))
    runtime = sanitizer_preload(compiler())
    if runtime is None:
        pytest.skip("the compiler's AddressSanitizer has no shared library")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={tmp_path}/report",
        "MEGALM_TEST_SANITIZED_LIBRARY": str(module),
    }
    # Attention is torch's, and traced by it: nothing of ours would run there.
    left_out = ["--ignore=tests/ops/test_attention.py"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/ops",
        *left_out,
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    reports = "\n".join(path.read_text()[:3000] for path in tmp_path.glob("report*"))
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}\n{reports}"
    assert " passed" in result.stdout
