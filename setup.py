"""Builds megalm._C from csrc/. All metadata is in pyproject.toml; conf/ is packed as megalm/conf.

The extension needs no torch header, only pybind11 and a C++17 compiler; CUDA sources join where torch has CUDA and nvcc
is found. Without a compiler the package installs all the same and runs on its plain PyTorch reference ops.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))
from scripts.build_extension import BuildExtension, extension  # noqa: E402

setup(
    packages=[*find_packages(include=["megalm*", "tools*"]), "megalm.conf"],
    package_dir={"megalm.conf": "conf"},
    package_data={"megalm.conf": ["**/*.yaml"], "tools.mix": ["examples/*"], "tools.bench.checkpoint": ["fault.c"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
