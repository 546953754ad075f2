#!/usr/bin/env bash
# Trains the four mini models with several seeds, all at the same time, spread over the GPUs:
#     train/minis.sh CORPUS OUTPUT "SEED ..." [override ...]
# Logs and models are written to OUTPUT/mini-NAME-SEED. Runs that were stopped go on from their checkpoints when the
# script is started again. The exit status is 1 if any run failed.
set -u
corpus=$1 output=$2 seeds=$3
shift 3
cd "$(dirname "$0")/.." || exit 1
gpus=$(nvidia-smi --list-gpus | wc -l)
pids=()
turn=0
for seed in $seeds; do
  place=$turn # each seed begins one GPU later, so that the slow models are on different GPUs
  for name in attention based mamba jrt; do
    folder=$output/mini-$name-$seed
    mkdir -p "$folder"
    CUDA_VISIBLE_DEVICES=$((place % gpus)) \
      python3 train/run.py "experiment=mini/$name" "data.folder=$corpus" "output=$folder" "seed=$seed" "$@" \
      >>"$folder/console.log" 2>&1 &
    pids+=($!)
    place=$((place + 1))
  done
  turn=$((turn + 1))
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
