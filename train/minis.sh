#!/usr/bin/env bash
# Trains the four mini models at the same time, spread over the GPUs: train/minis.sh CORPUS OUTPUT [override ...]
# Logs and models are written to OUTPUT/mini-NAME. The exit status is 1 if any of the four runs failed.
set -u
corpus=$1 output=$2
shift 2
cd "$(dirname "$0")/.." || exit 1
gpus=$(nvidia-smi --list-gpus | wc -l)
pids=()
for name in attention based mamba jrt; do # in this order, two GPUs get one fast and one slow model each
  mkdir -p "$output/mini-$name"
  CUDA_VISIBLE_DEVICES=$((${#pids[@]} % gpus)) \
    python3 train/run.py "experiment=mini/$name" "data.folder=$corpus" "output=$output/mini-$name" "$@" \
    >"$output/mini-$name/console.log" 2>&1 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
