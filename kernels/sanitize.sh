#!/usr/bin/env bash
# compute-sanitizer over the kernels at small shapes: memcheck (bounds, alignment) and racecheck (shared memory).
#
#     bash kernels/sanitize.sh [LOG FOLDER]
#
# Needs a Hopper GPU, compute-sanitizer (of the CUDA toolkit) and an importable jrt_kernels. Fails where a tool finds something.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-runs/sanitize}
mkdir -p "$logs"

# Texts of 1 to 1,000 tokens with states, masks and uneven ends; prefixes; pieces of a split text; decoding at batch 5.
small="(test_prefill_is_as_exact_as_eager and (65 or 63)) or test_unnormalized_output or test_reading_in_two_parts"
small="$small or (test_encode_prefix and 333-3) or (test_decode_step and -5) or test_a_row_does_not_depend or test_padding_leaves"

export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else an access past one tensor lands in its neighbour, unseen
for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
        python3 -m pytest -q -p no:cacheprovider -m "gpu or hopper" -k "$small" tests/test_cuda_kernels.py 2>&1 \
        | tee "$logs/$tool.log"
done
