#!/usr/bin/env bash
# All that needs a GPU, in two calls of at most 330 seconds each on a machine that has one. It needs nothing installed but a
# CUDA build of torch with numpy, pyyaml, rich, xxhash, pytest, pytest-xdist, pybind11, ninja and setuptools, nvcc, and g++;
# megalm itself is taken from this folder. Nothing is installed and nothing is downloaded.
#
#   scripts/gpu_check.sh A|B [STAGE ...] [--results FOLDER] [--seconds N] [--wheels FOLDER] [--python INTERPRETER] [--pretend cpu]
#
# A: is it right, and where is the time: torch alone (probe), tests, kernels, a training step in its variants, a run killed and
#    taken up again. B: beside others: a compiled plain Llama and transformers, 8G parameters, torch.compile's kernels, memcheck.
# scripts/gpu/stages.py lists the stages, with the time limit of each and the commands; a stage that fails does not keep the next
# from running.
#
# Results: three files in FOLDER (default benchmarks/results), DEVICE-DATE-COMMIT-CALL.json with every figure, -logs.tar.gz and
# -trace.json.gz, written again every few seconds (MEGALM_COMMIT: the commit's name where this is no git checkout).
# --wheels: wheels of what a run needs and this machine lacks, unpacked into a temporary folder for this call only;
#           scripts/gpu/wheels.txt lists them, with the command that fetches them.
# --pretend cpu: goes through every stage at tiny sizes on a machine without a GPU: it tries this script.
# Exit status: 0, 1 where a stage failed, 2 where the call cannot begin.
set -uo pipefail
cd "$(dirname "$0")/.."

python="" wheels="" pretend="" words=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python) python="$2"; shift 2 ;;
    --wheels) wheels="$2"; shift 2 ;;
    --pretend) pretend="$2"; words+=("$1" "$2"); shift 2 ;;
    -h | --help) sed -n '/^# All that/,/^# Exit status/p' "$0"; exit 0 ;;
    *) words+=("$1"); shift ;;
  esac
done
[ ${#words[@]} -gt 0 ] || { sed -n '/^# All that/,/^# Exit status/p' "$0" >&2; exit 2; }

serves='import sys, torch; sys.exit(0 if sys.argv[1] or torch.cuda.is_available() else 1)'
if [ -z "$python" ]; then
  for python in .venv/bin/python python3 python; do
    command -v "$python" >/dev/null && "$python" -c "$serves" "$pretend" 2>/dev/null && break
    python=""
  done
fi
if [ -z "$python" ] || ! "$python" -c "$serves" "$pretend" 2>/dev/null; then
  echo "gpu-check: no interpreter here (.venv/bin/python, python3, python) has a torch that sees a GPU; --pretend cpu tries the script." >&2
  exit 2
fi
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin"; do
  [ -d "$folder" ] && PATH="$PATH:$folder"
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" - "$pretend" <<'PY' || exit 2
import importlib.util, shutil, sys

needed = ("numpy", "yaml", "rich", "xxhash", "pytest", "pybind11", "ninja", "setuptools", *([] if sys.argv[1] else ["xdist"]))
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu-check: {sys.executable} lacks {', '.join(missing)}.")
if not sys.argv[1] and shutil.which("nvcc") is None:
    import torch

    sys.exit("gpu-check: nvcc is not on PATH: install the CUDA toolkit of torch's version, %s." % torch.version.cuda)
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit("gpu-check: no C++ compiler, g++ or clang++.")
PY

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ] && ! "$python" -c "import hydra" 2>/dev/null; then
  shopt -s nullglob
  found=("$wheels"/*.whl)
  shopt -u nullglob
  [ ${#found[@]} -gt 0 ] || { echo "gpu-check: --wheels $wheels: there is no wheel." >&2; exit 2; }
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --target "$scratch/wheels" "${found[@]}" || exit 2
  export PYTHONPATH="$PYTHONPATH:$scratch/wheels"
fi
"$python" -m scripts.gpu "${words[@]}"
