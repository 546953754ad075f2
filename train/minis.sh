#!/usr/bin/env bash
# Trains the four mini models side by side, dealt out over the GPUs: train/minis.sh CORPUS OUTPUT [override ...]
# Logs and models land in OUTPUT/mini-NAME; ends with an error if any of the four did.
set -u
corpus=$1 output=$2
shift 2
cd "$(dirname "$0")/.." || exit 1
gpus=$(nvidia-smi --list-gpus | wc -l)
pids=()
for name in attention based mamba jrt; do # two GPUs: the two quick ones and the two slow ones are kept apart
  mkdir -p "$output/mini-$name"
  CUDA_VISIBLE_DEVICES=$((${#pids[@]} % gpus)) \
    python3 train/run.py "experiment=mini/$name" "data.folder=$corpus" "output=$output/mini-$name" "$@" \
    >"$output/mini-$name/console.log" 2>&1 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
