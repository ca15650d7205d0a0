#!/usr/bin/env bash
# The four tools of compute-sanitizer over the scan tests, on a machine with a GPU.
#   tools/sanitize_gpu.sh [memcheck racecheck initcheck synccheck]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# Every tensor is an allocation of its own, so that a step beyond its end is seen.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
for tool in "${@:-memcheck racecheck initcheck synccheck}"; do
  for one in $tool; do
    echo "== $one"
    # cuBLAS is not ours: only our kernels are watched.
    compute-sanitizer --tool "$one" --error-exitcode 1 --target-processes all \
      --kernel-regex "kns=fused_rnn" \
      "$python" -m pytest -q -x -m gpu tests/test_stepwise.py \
      -k "(structures or projection or types or persistent) and (lstm or gru_reset_before or indrnn_tanh)"
  done
done
