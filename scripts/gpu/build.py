"""Builds the extension where there is none of these sources yet that serves the device; nothing is done twice."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Build in place; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    args = parser.parse_args(argv)
    if (why := _explain_missing(args.device)) is None:
        print("the extension is there already, built of these sources")
        return 0
    print(f"building: {why}", flush=True)
    from scripts.build_extension import main as build

    if status := build():
        return status
    return _check(args.device)


def _explain_missing(device: str) -> str | None:
    """Why there is no extension that serves; None: there is one."""
    from megalm.ops.backend import explain_missing, find_library

    library = find_library()
    if library is None:
        return explain_missing() or "there is none"
    return "it was built without CUDA" if device == "cuda" and not library.has_cuda else None


def _check(device: str) -> int:
    """Look at what was built in a new process: this one may hold the old one."""
    import subprocess

    command = f"import sys; from scripts.gpu.build import _explain_missing; sys.exit(_explain_missing({device!r}) or 0)"
    return subprocess.run([sys.executable, "-c", command]).returncode


if __name__ == "__main__":
    sys.exit(main())
