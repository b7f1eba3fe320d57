"""Builds the tests' twin of megalm._C: CUDA kernels under the emulator, and all of it under AddressSanitizer.

python scripts/emulated.py        prints the path of the built module
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.build_extension import Build, compiler, compiles  # noqa: E402

SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]
FLAGS = ["-O1", "-g1", "-UNDEBUG", *SANITIZE]


def sanitizer_preload(cxx: list[str]) -> str | None:
    """What LD_PRELOAD must name before Python starts; None where this compiler has no shared sanitizer.

    The C++ library goes with it: the sanitizer looks for what throws exceptions when it starts.
    """
    for name in ("libasan.so", "libclang_rt.asan-x86_64.so"):
        found = [
            subprocess.run([*cxx, f"-print-file-name={part}"], capture_output=True, text=True).stdout.strip()
            for part in (name, "libstdc++.so.6")
        ]
        if all(Path(path).is_absolute() and Path(path).exists() for path in found):
            return " ".join(str(Path(path).resolve()) for path in found)
    return None


def build_emulated(quiet: bool = True) -> Path:
    """Compile what changed; the module's path. Errors: RuntimeError without a compiler with AddressSanitizer."""
    cxx = compiler()
    if cxx is None or not compiles(cxx, SANITIZE):
        raise RuntimeError("no C++ compiler with AddressSanitizer")
    output = ROOT / "build" / "emulated" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build = Build(output, ROOT / "build" / "emulated", cxx, FLAGS, ["-fsanitize=address"], emulated=True)
    try:
        build.run(quiet)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"the emulated extension does not compile:\n{error.stdout}\n{error.stderr}") from None
    return output


if __name__ == "__main__":
    print(build_emulated(quiet=False))
