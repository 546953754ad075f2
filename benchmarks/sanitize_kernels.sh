#!/usr/bin/env bash
# Runs every kernel at small shapes under compute-sanitizer: memcheck (bounds, alignment) and racecheck (shared memory).
#
#     bash benchmarks/sanitize_kernels.sh [LOG FOLDER [KERNELS ...]]
#
# KERNELS: hopper, backward, scan, triton, step (benchmarks/kernel_launches.py); all five if none is named. The Triton kernels
# run under memcheck only, because Triton's compiler places the barriers of their shared memory.
# Needs compute-sanitizer (from the CUDA toolkit) and, for the first three, a Hopper GPU and an importable jrt_kernels. The exit
# status is not 0 if a tool finds an error.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-runs/sanitize}
shift || true
mkdir -p "$logs"
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else an access past a tensor could hit the next tensor, unnoticed
for kernels in "${@:-hopper backward scan triton step}"; do
    for kernel in $kernels; do
        for tool in memcheck racecheck; do
            [[ $tool == racecheck && ($kernel == triton || $kernel == step) ]] && continue
            compute-sanitizer --tool "$tool" --error-exitcode 1 python3 benchmarks/kernel_launches.py "$kernel" 2>&1 |
                tee "$logs/$kernel-$tool.log"
        done
    done
done
