"""Builds megalm._C from csrc/. All metadata is in pyproject.toml; conf/ is packed as megalm/conf and
tools/ as megalm/tools: a top-level package `tools` would hide a user's own. Benchmarks stay in the repository.

The extension needs no torch header, only pybind11 and a C++17 compiler; CUDA sources join where torch has CUDA and nvcc
is found. Without a compiler the package installs all the same and runs on its plain PyTorch reference ops.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))
from scripts.build_extension import BuildExtension, extension  # noqa: E402

TOOLS = find_packages(include=["tools", "tools.*"], exclude=["tools.bench", "tools.bench.*"])

setup(
    packages=[*find_packages(include=["megalm*"]), *(f"megalm.{tool}" for tool in TOOLS), "megalm.conf"],
    package_dir={"megalm.conf": "conf", "megalm.tools": "tools"},
    package_data={
        "megalm.conf": ["**/*.yaml"],
        "megalm.corpus": ["filter/presets/*.yaml", "look/*.html"],
        "megalm.generate": ["*.html"],
        "megalm.evaluate": ["*.html", "suites/*.yaml", "suites/smoke/*"],
        "megalm.plan": ["mixtures/*"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
