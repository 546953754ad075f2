#!/usr/bin/env bash
# Tables 8 and 9: SuperGLUE of the 360M and the 1.3B models with 0, 1 and 5 examples. Table 10 is made from the same runs:
# `jrt report OUTPUT_DIR --layout table10`. With --workers N, N runs go at once, all on the same GPU.
set -euo pipefail
source "$(dirname "$0")/../prompt_scripts/common.sh"

models=hazyresearch/JRT-360M-30B,hazyresearch/based-360M-30B,hazyresearch/mamba-360M-30B,hazyresearch/attn-360M-30B
models+=,hazyresearch/JRT-1B-50B,hazyresearch/based-1b-50b,hazyresearch/mamba-1b-50b,hazyresearch/attn-1b-50bn
batch_size=16
read_arguments "$@"

IFS=, read -ra names <<< "$models"
for model in "${names[@]}"; do
  if [ -z "$model" ]; then continue; fi
  for shots in 0 1 5; do
    beside jrt lm-eval --model jrt --model_args "pretrained=$model" --tasks "${tasks:-recall_super_glue}" --num_fewshot "$shots" \
      --batch_size "$batch_size" --device "$device" --output_path "$output/super_glue/$(basename "$model")/$shots" \
      ${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"}
  done
done
await_all
step jrt report "$output/super_glue" --layout table8
step jrt report "$output/super_glue" --layout table9
exit $status
