#!/usr/bin/env bash
# All that needs a GPU, in one call on a machine that has one. It needs nothing installed but a CUDA build of torch with
# numpy, pyyaml, rich, xxhash, pytest, pybind11, ninja and setuptools, nvcc, and g++; megalm itself is taken from this
# folder. Nothing is installed and nothing is downloaded.
#
#   scripts/gpu_check.sh [--python INTERPRETER] [--results FOLDER] [--seconds N] [--wheels FOLDER] [STAGE ...]
#
# Stages (default: all, in this order; one that fails does not keep the next from running):
#   build      the extension, for this machine's GPU, against its torch
#   test       every op's tests on CUDA and torch.compile's, and the trainer's, optimizer's and checkpoints' (tests/gpu)
#   train      a short run of the tiny model, killed and taken up again, beside the same run on the CPU (device_run);
#              then tools.bench train: 50M and 1.3G parameters in bf16, beside Hugging Face eager and compiled
#   bench      tools.bench kernels and moe_kernels: first each kernel beside eager PyTorch and the libraries that are
#              installed, then with torch.compile, which takes minutes
#   sanitize   compute-sanitizer's memcheck, racecheck and synccheck on the kernels (MEGALM_SANITIZE_SECONDS each, 150)
#
# Results go to FOLDER (default benchmarks/results) as DEVICE-DATE-COMMIT-*.json (MEGALM_COMMIT: where this is no git
# checkout), a line or a round at a time; with --results each stage's output, too, as STAGE.log. --seconds: a stage that
# is running then is stopped, and what it has written stays (default: an hour). `test` takes at most an equal share of the
# time that is left for it and the stages behind it, so do the measurements of `train`; `bench` takes the rest.
#
# --wheels: wheels of what a run needs and this machine lacks: a bare torch lacks hydra-core, omegaconf,
# antlr4-python3-runtime (and, to read compressed data, zstandard). They are unpacked into a temporary folder, for this
# call only. Without Hydra the run of `train` and the tests that compose a configuration are skipped, and it is said. On
# a machine with a network, for one without:
#   pip wheel --no-deps --wheel-dir FOLDER hydra-core omegaconf antlr4-python3-runtime==4.9.3
#
# Where one call may last ten minutes only, the most telling things first:
#   1st:   scripts/gpu_check.sh --seconds 560 --wheels FOLDER --results OUT build test train
#   2nd:   scripts/gpu_check.sh --seconds 560 --results OUT build bench
#   3rd:   scripts/gpu_check.sh --seconds 560 --results OUT build sanitize       (build: seconds, where it is still there)
# Exit status: 0, 1 where a stage failed, 2 where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

python="" results="" seconds=3600 wheels="" stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python) python="$2"; shift 2 ;;
    --results) results="$2"; shift 2 ;;
    --seconds) seconds="$2"; shift 2 ;;
    --wheels) wheels="$2"; shift 2 ;;
    build | test | train | bench | sanitize) stages+=("$1"); shift ;;
    *) sed -n '/^# All that/,/^# Exit status/p' "$0"; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build test train bench sanitize)

sees_gpu='import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)'
if [ -z "$python" ]; then
  for python in .venv/bin/python python3 python; do
    command -v "$python" >/dev/null && "$python" -c "$sees_gpu" 2>/dev/null && break
    python=""
  done
fi
if [ -z "$python" ] || ! "$python" -c "$sees_gpu" 2>/dev/null; then
  echo "gpu-check: no interpreter here (.venv/bin/python, python3, python) has a torch that sees a GPU." >&2
  exit 2
fi
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin"; do
  [ -d "$folder" ] && PATH="$PATH:$folder"
done
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Only pytest's own plug-ins: those of other packages may not load here.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

"$python" - <<'PY' || exit 2
import importlib.util, shutil, sys
import torch

needed = ("numpy", "yaml", "rich", "xxhash", "pytest", "pybind11", "ninja", "setuptools")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu-check: {sys.executable} lacks {', '.join(missing)}.")
if shutil.which("nvcc") is None:
    sys.exit("gpu-check: nvcc is not on PATH: install the CUDA toolkit of torch's version, %s." % torch.version.cuda)
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit("gpu-check: no C++ compiler, g++ or clang++.")
print("gpu-check:", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, sys.executable)
PY

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
has_hydra() { "$python" -c "import hydra" 2>/dev/null; }
if [ -n "$wheels" ] && ! has_hydra; then
  shopt -s nullglob
  found=("$wheels"/*.whl)
  shopt -u nullglob
  [ ${#found[@]} -gt 0 ] || { echo "gpu-check: --wheels $wheels: there is no wheel." >&2; exit 2; }
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --target "$scratch/wheels" "${found[@]}" || exit 2
  export PYTHONPATH="$PYTHONPATH:$scratch/wheels"
fi

mkdir -p "${results:=benchmarks/results}"
logs="$results"
[ "$results" != benchmarks/results ] || logs="$scratch"

# Runs a command for what is left of the time, at most $1 seconds.
within() {
  local most="$1" left=$((seconds - SECONDS))
  shift
  [ $left -lt 1 ] && { echo "out of time: $*"; return 124; }
  timeout -s INT -k 20 $((left < most ? left : most)) "$@"  # interrupted, pytest and the benchmarks say how far they came
}

build() {
  within 3600 "$python" -m scripts.build_extension &&
    "$python" -c "from megalm.ops.backend import find_library, explain_missing; m = find_library(); assert m and m.has_cuda, explain_missing() or 'built without CUDA'"
}

# What is left of the time over $1: the share of one of so many that are to come.
share() {
  local left=$(((seconds - SECONDS) / $1))
  echo $((left > 1 ? left : 1))
}

check() {
  local code
  within "$(share "$coming")" "$python" -m pytest tests/gpu tests/ops -k "cuda or compile" -p no:cacheprovider --durations 5 -rs
  code=$?
  [ $code -ne 124 ] || echo "test: not all tests were reached in this stage's share of the time"
  return $code
}

# Where this call's results go: FOLDER/DEVICE-DATE-COMMIT.
stem() {
  local device commit
  device="$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")"
  commit="${MEGALM_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
  echo "$results/$device-$(date +%Y-%m-%d)-$commit"
}

train() {
  local stem status=0
  stem="$(stem)"
  if has_hydra; then
    within 600 "$python" -m tools.bench device_run --seconds "$(share 3)" --out "$stem-device-run.json" || status=1
  else
    echo "device_run: SKIPPED: Hydra is not importable here; give its wheels with --wheels FOLDER (see this script's head)"
  fi
  within 900 "$python" -m tools.bench train --device cuda --seconds "$(share 2)" --out "$stem-train-50m.json" || status=1
  within 900 "$python" -m tools.bench train --device cuda --shape 1b --rounds 4 --steps 5 --seconds "$(share 1)" \
    --out "$stem-train-1b.json" || status=1
  return $status
}

bench() {
  local stem status=0 subject
  stem="$(stem)"
  for subject in kernels moe_kernels; do
    within 3600 "$python" -m tools.bench "$subject" --device cuda --no-compile --out "$stem-$subject-eager.json" || status=1
  done
  for subject in kernels moe_kernels; do
    within 3600 "$python" -m tools.bench "$subject" --device cuda --out "$stem-$subject.json" || status=1
  done
  ls -l "$stem"*
  return $status
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: skipped"
    return 0
  fi
  # The option that limits it to our kernels has had two names; without one it is slower, and right all the same.
  local only="" option status=0 code
  for option in "--kernel-name kns=megalm" "--kernel-regex kns=megalm"; do
    compute-sanitizer $option true >/dev/null 2>&1 && only="$option" && break
  done
  for tool in memcheck racecheck synccheck; do
    echo "-- $tool $only"
    # Without torch's cache each tensor is an allocation of its own: beside it lies no other one's memory.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within "${MEGALM_SANITIZE_SECONDS:-150}" compute-sanitizer --tool "$tool" --error-exitcode 77 $only \
      "$python" -m pytest tests/ops -k "cuda and bf16" -x -p no:cacheprovider
    code=$?
    # 124: out of time, and nothing was found until then.
    if [ $code -eq 124 ]; then
      echo "-- $tool: nothing found in its time; not all tests were reached"
    elif [ $code -ne 0 ]; then
      echo "-- $tool: FAILED with status $code"
      status=1
    fi
  done
  return $status
}

declare -A outcome
failed=0 coming=${#stages[@]}
for stage in "${stages[@]}"; do
  echo "== $stage"
  begun=$SECONDS
  function="$stage"
  [ "$stage" = test ] && function=check
  "$function" 2>&1 | tee "$logs/$stage.log"
  if [ "${PIPESTATUS[0]}" -eq 0 ]; then outcome[$stage]=passed; else outcome[$stage]=FAILED failed=1; fi
  outcome[$stage]+=" in $((SECONDS - begun)) s"
  coming=$((coming - 1))
  # Nothing else can run without the build.
  [ "$stage" = build ] && [ $failed -eq 1 ] && break
done
echo "== summary"
for stage in "${stages[@]}"; do echo "$stage: ${outcome[$stage]:-not run}"; done
exit $failed
