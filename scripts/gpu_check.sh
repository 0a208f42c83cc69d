#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, tables of bandwidth and step time.
#   scripts/gpu_check.sh [OUTDIR]      results and logs go to OUTDIR (default: gpu-check)
# The last lines say what passed. Exit status 0 if all did; a missing compute-sanitizer is said, not failed.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(realpath -m "${1:-gpu-check}")
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$out"
cd "$root" || exit 1
status=0
summary=()

step() {  # NAME COMMAND...: run it, keep its output, remember how it went
  local name=$1; shift
  echo "== $name"
  if "$@" 2>&1 | tee "$out/$name.log"; then summary+=("passed  $name"); else summary+=("FAILED  $name"); status=1; fi
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no CUDA device that this torch can use" >&2
  exit 1
fi
step build "$python" -m stylegan_rooted ops build
step tests "$python" -m pytest -m gpu -rs tests/test_gpu.py
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck synccheck initcheck; do
    step "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --kernel-name kns=kernel_entry \
      "$python" -m pytest -m gpu -q tests/test_gpu.py -k "test_goldens or types_and_layouts or finite_differences"
  done
else
  summary+=("absent  compute-sanitizer")
fi
step table "$python" scripts/gpu_table.py --json "$out/table.json"
printf '%s\n' "" "${summary[@]}"
exit "$status"
