#!/usr/bin/env bash
# All that needs a GPU, in one call on a machine that has one. It needs nothing installed but a CUDA build of torch with
# numpy, pytest, pybind11, ninja and setuptools, nvcc, and g++; megalm itself is taken from this folder.
#
#   scripts/gpu_check.sh [--python INTERPRETER] [--results FOLDER] [--seconds N] [STAGE ...]
#
# Stages (default: all, in this order; one that fails does not keep the next from running):
#   build      the extension, for this machine's GPU, against its torch
#   test       every op's tests on CUDA, and torch.compile's
#   bench      python -m tools.bench kernels and moe_kernels, as JSON: first each kernel beside eager PyTorch and the
#              libraries that are installed, then with torch.compile, which takes minutes
#   sanitize   compute-sanitizer's memcheck, racecheck and synccheck on the kernels (MEGALM_SANITIZE_SECONDS each, 150)
# Results go to FOLDER (default benchmarks/results), a line at a time; with --results each stage's output, too, as
# STAGE.log. --seconds: a stage that is running then is stopped, and what it has written stays (default: an hour).
# Exit status: 0, 1 where a stage failed, 2 where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

python="" results="" seconds=3600 stages=()
while [ $# -gt 0 ]; do
  case "$1" in
    --python) python="$2"; shift 2 ;;
    --results) results="$2"; shift 2 ;;
    --seconds) seconds="$2"; shift 2 ;;
    build | test | bench | sanitize) stages+=("$1"); shift ;;
    *) sed -n '2,16p' "$0"; exit 2 ;;
  esac
done
[ ${#stages[@]} -gt 0 ] || stages=(build test bench sanitize)

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

missing = [name for name in ("numpy", "pytest", "pybind11", "ninja", "setuptools") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu-check: {sys.executable} lacks {', '.join(missing)}.")
if shutil.which("nvcc") is None:
    sys.exit("gpu-check: nvcc is not on PATH: install the CUDA toolkit of torch's version, %s." % torch.version.cuda)
if shutil.which("g++") is None and shutil.which("clang++") is None:
    sys.exit("gpu-check: no C++ compiler, g++ or clang++.")
print("gpu-check:", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, sys.executable)
PY

mkdir -p "${results:=benchmarks/results}"
logs="$results"
[ "$results" != benchmarks/results ] || logs="$(mktemp -d)"

# Runs a command for what is left of the time, at most $1 seconds.
within() {
  local most="$1" left=$((seconds - SECONDS))
  shift
  [ $left -lt 1 ] && { echo "out of time: $*"; return 124; }
  timeout $((left < most ? left : most)) "$@"
}

build() {
  within 3600 "$python" -m scripts.build_extension &&
    "$python" -c "from megalm.ops.backend import library, why_missing; m = library(); assert m and m.has_cuda, why_missing() or 'built without CUDA'"
}

check() {
  within 3600 "$python" -m pytest tests/ops -k "cuda or compile" -p no:cacheprovider --durations 5
}

bench() {
  local device commit stem status=0 subject
  device="$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")"
  commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  stem="$results/$device-$(date +%Y-%m-%d)-$commit"
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
    within "${MEGALM_SANITIZE_SECONDS:-150}" compute-sanitizer --tool "$tool" --error-exitcode 77 $only \
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
failed=0
for stage in "${stages[@]}"; do
  echo "== $stage"
  begun=$SECONDS
  function="$stage"
  [ "$stage" = test ] && function=check
  "$function" 2>&1 | tee "$logs/$stage.log"
  if [ "${PIPESTATUS[0]}" -eq 0 ]; then outcome[$stage]=passed; else outcome[$stage]=FAILED failed=1; fi
  outcome[$stage]+=" in $((SECONDS - begun)) s"
  # Nothing else can run without the build.
  [ "$stage" = build ] && [ $failed -eq 1 ] && break
done
echo "== summary"
for stage in "${stages[@]}"; do echo "$stage: ${outcome[$stage]:-not run}"; done
exit $failed
