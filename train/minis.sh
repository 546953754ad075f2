#!/usr/bin/env bash
# Trains the four mini models side by side on one GPU: train/minis.sh CORPUS OUTPUT [override ...]
# Logs and models land in OUTPUT/mini-NAME; ends with an error if any of the four did.
set -u
corpus=$1 output=$2
shift 2
cd "$(dirname "$0")/.." || exit 1
pids=()
for name in attention mamba based jrt; do
  mkdir -p "$output/mini-$name"
  python3 train/run.py "experiment=mini/$name" "data.folder=$corpus" "output=$output/mini-$name" "$@" \
    >"$output/mini-$name/console.log" 2>&1 &
  pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
