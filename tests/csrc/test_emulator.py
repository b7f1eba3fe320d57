"""Every class of bug that the emulator claims to find is planted and found; the correct kernel beside it passes."""

import os
import subprocess

import pytest

from scripts.build_extension import ROOT, SOURCE, compiler, compiles
from scripts.emulated import FLAGS, SANITIZE

SOURCE_FILE = ROOT / "tests" / "csrc" / "planted_bugs.cu"
# What the report must say, and the orders of threads in which the bug shows: where the order decides, in at least one.
BUGS = {
    "barrier": "wrong sum",
    "uninitialised": "not a number",
    "divergent": "24 of 64 threads have left the kernel",
    "two_barriers": "waits at __syncthreads in line",
    "shuffle": "which is not in its mask",
    "mask": "waits at a shuffle in line",
    "not_in_mask": "without being in its mask",
    "misaligned": "misaligned access of 16 bytes",
    "bounds": "heap-buffer-overflow",
    "limits": "1025 threads in a block, at most 1024",
    "grid": "grid.y or grid.z is beyond 65535",
}


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    cxx = compiler()
    if cxx is None or not compiles(cxx, SANITIZE):
        pytest.skip("no C++ compiler with AddressSanitizer")
    target = ROOT / "build" / "emulated" / "planted_bugs"
    inputs = [SOURCE_FILE, *(SOURCE / "emulator").glob("*.h"), SOURCE / "common" / "portable_cuda.h"]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*cxx, "-std=c++17", *FLAGS, f"-I{SOURCE}", "-x", "c++", str(SOURCE_FILE), "-o", str(target)]
        subprocess.run(command, check=True)
    return target


def run(program, bug, form, order):
    # A launch that is given up leaves its threads' memory behind: leaks are not what is looked for.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [program, bug, form, str(order)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(program, bug):
    results = [run(program, bug, "bug", order) for order in (0, 1, 7)]
    found = [r for r in results if r.returncode != 0 and BUGS[bug] in r.stdout + r.stderr]
    assert found, [(r.returncode, r.stdout, r.stderr[-500:]) for r in results]
    if bug not in ("barrier",):
        assert len(found) == 3


@pytest.mark.parametrize("bug", BUGS)
def test_correct_form_passes(program, bug):
    for order in (0, 1, 7):
        result = run(program, bug, "correct", order)
        assert result.returncode == 0 and result.stdout == "ok\n", result.stdout + result.stderr


def test_out_of_bounds_names_the_line(program):
    line = next(
        n for n, text in enumerate(SOURCE_FILE.read_text().splitlines(), 1) if text.endswith("// out of bounds")
    )
    assert f"planted_bugs.cu:{line}" in run(program, "bounds", "bug", 0).stderr
