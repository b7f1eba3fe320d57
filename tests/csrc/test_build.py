"""Finding the CUDA toolkit: what is called nvcc on PATH need not lie in it."""

import pytest

from scripts.build_extension import cuda_library_folder, toolkit


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def home(tmp_path):
    """A toolkit with an nvcc that says where it is, as the true one does."""
    folder = tmp_path / "cuda-13.0"
    _program(folder / "bin" / "nvcc", f"echo '#$ _HERE_={folder}/bin' >&2; echo '#$ TOP={folder}/bin/..' >&2; exit 1")
    return folder


@pytest.mark.parametrize("way", ["itself", "link", "script"])
def test_toolkit_of_nvcc(home, tmp_path, way):
    nvcc = home / "bin" / "nvcc"
    if way == "link":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "nvcc").symlink_to(nvcc)
        nvcc = tmp_path / "bin" / "nvcc"
    if way == "script":
        nvcc = _program(tmp_path / "bin" / "nvcc", f'exec {nvcc} "$@"')
    assert toolkit(str(nvcc)) == home


def test_where_the_static_runtime_lies(home):
    (home / "lib64").mkdir()  # there, but without what is wanted
    with pytest.raises(RuntimeError, match="libcudart_static"):
        cuda_library_folder(home)
    library = home / "targets" / "x86_64-linux" / "lib"
    library.mkdir(parents=True)
    (library / "libcudart_static.a").touch()
    assert cuda_library_folder(home) == library
