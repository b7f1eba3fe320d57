#!/usr/bin/env bash
# All that needs a GPU, in one call on a machine that has one: builds the extension against its torch, runs the kernels'
# tests on CUDA, the kernels under compute-sanitizer, and the benchmark. Results go to benchmarks/results/.
#
#   scripts/gpu_check.sh [python]       the interpreter of an environment with a CUDA build of torch
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python}"

"$python" - <<'PY' || exit 2
import shutil, sys
import torch
if not torch.cuda.is_available():
    sys.exit("gpu-check: torch sees no GPU here (torch %s): run it on a machine that has one." % torch.__version__)
if shutil.which("nvcc") is None:
    sys.exit("gpu-check: nvcc is not on PATH: install the CUDA toolkit of torch's version, %s." % torch.version.cuda)
print("gpu-check:", torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
PY

echo "== build"
"$python" scripts/build_extension.py
"$python" -c "from megalm.ops.backend import library; assert library().has_cuda, 'megalm._C was built without CUDA'"

echo "== tests on CUDA"
"$python" -m pytest tests/ops tests/parallel/test_context.py -k "cuda or compile" -p no:cacheprovider

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-regex kns=megalm \
      "$python" -m pytest tests/ops -k "cuda and not compile" -x -p no:cacheprovider
  done
else
  echo "== compute-sanitizer is not installed: skipped"
fi

echo "== benchmark"
mkdir -p benchmarks/results
device="$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")"
commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
result="benchmarks/results/kernels-$device-$(date +%Y%m%d)-$commit.json"
"$python" -m tools.bench kernels --device cuda --json > "$result"
echo "written: $result"
