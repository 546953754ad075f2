#!/usr/bin/env bash
# compute-sanitizer over every kernel at small shapes: memcheck (bounds, alignment) and racecheck (shared memory).
#
#     bash benchmarks/sanitize_kernels.sh [LOG FOLDER]
#
# Needs a Hopper GPU, compute-sanitizer (of the CUDA toolkit) and an importable jrt_kernels. Fails where a tool finds something.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-runs/sanitize}
mkdir -p "$logs"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else an access past one tensor lands in its neighbour, unseen
for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 python3 benchmarks/kernel_launches.py 2>&1 | tee "$logs/$tool.log"
done
