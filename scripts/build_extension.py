"""Compiles csrc/ into one extension with ninja: used by setup.py for megalm._C and by the tests for its emulated twin."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc"
# One build of every op.cpp for each of these; the best that the machine has is chosen at run time.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
CUDA_ARCHITECTURES = ("80", "90", "100")


def extension() -> Extension:
    """optional: setuptools goes on where no file was built, that is, without a compiler."""
    return Extension("megalm._C", sources=[], optional=True)


def op_folders() -> list[Path]:
    """Every folder of csrc/ that holds an op."""
    return sorted(path.parent for path in SOURCE.glob("*/op.cpp"))


def contract() -> str:
    """The digest of csrc/contract.py, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("megalm_contract", SOURCE / "contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest()


def compiler() -> list[str] | None:
    """The C++ compiler: $CXX, else g++, c++ or clang++; None where there is none."""
    chosen = os.environ.get("CXX", "").split()
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def compiles(cxx: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*cxx, *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def ninja() -> str | None:
    try:
        import ninja as package

        return str(Path(package.BIN_DIR, "ninja"))
    except ImportError:
        return shutil.which("ninja")


def cuda_home() -> Path | None:
    """Where nvcc is, if torch has CUDA, too: without CUDA tensors CUDA kernels have nothing to do."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    import torch

    return toolkit(nvcc) if torch.version.cuda else None


def toolkit(nvcc: str) -> Path:
    """The folder of the CUDA toolkit that this nvcc is of: what is on PATH may be a link or a script elsewhere."""
    said = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE)
    return (Path(found[1].strip()) if found else Path(nvcc).parent.parent).resolve()


def cuda_library_folder(home: Path) -> Path:
    """Where a toolkit keeps CUDA's static runtime: it has been in each of these. Errors: RuntimeError without one."""
    names = ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib")
    for folder in (home / name for name in names):
        if (folder / "libcudart_static.a").exists():
            return folder
    raise RuntimeError(
        f"no libcudart_static.a in {home} ({', '.join(names)}): install the whole CUDA toolkit, or set CUDA_HOME"
    )


def cuda_flags() -> list[str]:
    """nvcc's flags: $MEGALM_CUDA_ARCHITECTURES ("90;100"), else this machine's GPU, else all that are supported."""
    import torch

    chosen = os.environ.get("MEGALM_CUDA_ARCHITECTURES")
    if chosen:
        architectures: tuple[str, ...] = tuple(chosen.replace(",", ";").split(";"))
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        architectures = (f"{major}{minor}",)
    else:
        architectures = CUDA_ARCHITECTURES
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    ptx = f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"  # runs on newer devices
    return ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes, ptx]


@dataclass
class Build:
    """What is compiled, with what, to where.

    `emulated` compiles the CUDA kernels with the C++ compiler against csrc/emulator; `cuda` with nvcc against CUDA.
    """

    output: Path
    folder: Path
    cxx: list[str]
    flags: list[str] = field(default_factory=lambda: ["-O3"])
    link_flags: list[str] = field(default_factory=list)
    emulated: bool = False
    cuda: Path | None = None

    def isas(self) -> dict[str, list[str]]:
        if platform.machine() not in ("x86_64", "AMD64"):
            return {"baseline": []}
        usable = {name: flags for name, flags in ISA_FLAGS.items() if compiles(self.cxx, [*flags, "-c"])}
        return usable if len(usable) == len(ISA_FLAGS) else {"baseline": []}

    def write_ninja(self) -> Path:
        import pybind11

        isas = self.isas()
        openmp = ["-fopenmp"] if compiles(self.cxx, ["-fopenmp"]) else []
        defines = ["-DMEGALM_ISA_VARIANTS"] if len(isas) > 1 else []
        if self.emulated or self.cuda:
            defines.append("-DMEGALM_CUDA")
        if self.emulated:
            defines.append("-DMEGALM_EMULATED")
        includes = [f"-I{SOURCE}", f"-isystem {sysconfig.get_paths()['include']}", f"-isystem {pybind11.get_include()}"]
        flags = " ".join([*CXX_FLAGS, *self.flags, *openmp, *defines, *includes])
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {' '.join(self.cxx)} -MMD -MF $out.d {flags} $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {' '.join(self.cxx)} -shared $in -o $out {' '.join([*openmp, *self.link_flags, '$libraries'])}",
        ]
        objects: list[str] = []

        def add(source: Path, tag: str = "", rule: str = "cxx", extra: str = "") -> None:
            name = f"{source.parent.name}-{source.name}{tag}.o"
            lines.append(f"build {name}: {rule} {source}")
            if extra:
                lines.append(f"  extra = {extra}")
            objects.append(name)

        add(SOURCE / "bindings.cpp", extra=f"'-DMEGALM_CONTRACT=\"{contract()}\"'")
        add(SOURCE / "common" / "isa.cpp")
        for folder in op_folders():
            for isa, isa_flags in isas.items():
                add(folder / "op.cpp", f"-{isa}", extra=" ".join([*isa_flags, f"-DMEGALM_ISA={isa}"]))
        kernels = [folder / "op.cu" for folder in op_folders() if (folder / "op.cu").exists()]
        kernels.append(SOURCE / "common" / "device.cu")
        libraries = ""
        if self.emulated:
            for source in kernels:
                add(source, extra="-x c++ -Wno-unknown-pragmas")
        elif self.cuda:
            command = (
                f"{self.cuda}/bin/nvcc -MD -MF $out.d {' '.join([*cuda_flags(), *defines])} -I{SOURCE} -c $in -o $out"
            )
            lines += ["rule nvcc", f"  command = {command}", "  depfile = $out.d", "  deps = gcc"]
            for source in kernels:
                add(source, rule="nvcc")
            libraries = f"-L{cuda_library_folder(self.cuda)} -lcudart_static -ldl -lrt -lpthread"
        lines += [f"build {self.output}: link {' '.join(objects)}", f"  libraries = {libraries}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "build.ninja"
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def run(self, quiet: bool = False) -> None:
        """Compiles what changed; raises subprocess.CalledProcessError with the compiler's message."""
        executable = ninja()
        if executable is None:
            raise RuntimeError("ninja is missing: pip install ninja")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [executable, "-C", str(self.folder), "-j", jobs]
        with self._alone():
            self.write_ninja()
            subprocess.run(command, check=True, capture_output=quiet, text=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One build in the folder at a time: two would spoil ninja's record of what is up to date."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class BuildExtension(build_ext):
    """setuptools' build_ext with ninja; without a compiler it warns and leaves the extension out."""

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        if cxx is None or not compiles(cxx, ["-std=c++17"]):
            warnings.warn(
                "megalm: no C++17 compiler found (looked for $CXX, g++, c++, clang++): installing without the extension. "
                "Everything works on the plain PyTorch reference ops, more slowly; install g++ and run `make build`.",
                stacklevel=1,
            )
            return
        cuda = cuda_home()
        name = f"extension-{sysconfig.get_config_var('SOABI')}{'-cuda' if cuda else ''}"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        Build(
            output, ROOT / "build" / name, cxx, ["-O3"], ["-Wl,-s"] if sys.platform == "linux" else [], cuda=cuda
        ).run()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def main() -> int:
    """Builds megalm/_C in place, incrementally; 0 also where there is no compiler (the reference ops serve)."""
    cxx = compiler()
    if cxx is None:
        print("megalm: no C++ compiler found: the plain PyTorch reference ops will be used", file=sys.stderr)
        return 0
    cuda = cuda_home()
    name = f"extension-{sysconfig.get_config_var('SOABI')}{'-cuda' if cuda else ''}"
    output = ROOT / "megalm" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    link_flags = ["-Wl,-s"] if sys.platform == "linux" else []
    try:
        Build(output, ROOT / "build" / name, cxx, ["-O3"], link_flags, cuda=cuda).run()
    except (subprocess.CalledProcessError, RuntimeError) as error:
        print(f"megalm: the extension could not be built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
