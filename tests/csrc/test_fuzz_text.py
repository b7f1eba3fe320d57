import subprocess

import pytest

from scripts.fuzz_text import build


def test_some_inputs_without_a_fault():
    """`python scripts/fuzz_text.py` takes a million."""
    try:
        program = build()
    except RuntimeError as error:
        pytest.skip(str(error))
    result = subprocess.run([str(program), "3000", "7"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "3000 inputs" in result.stdout, result.stderr[-3000:]
