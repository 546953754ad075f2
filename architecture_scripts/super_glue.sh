#!/usr/bin/env bash
# Table 8: SuperGLUE with 5 examples, with lm-eval's own tasks (`-- --num_fewshot 0` for another number of examples).
# The prefix encoder does not read the answer choices that are scored. In the published numbers it did:
# `-- --model_args-extra compat=released` computes as they did. All cells of Tables 8 and 9: super_glue_tables.sh.
set -euo pipefail
source "$(dirname "$0")/../prompt_scripts/common.sh"

models=hazyresearch/JRT-360M-30B,hazyresearch/based-360M-30B,hazyresearch/mamba-360M-30B,hazyresearch/attn-360M-30B
batch_size=16
read_arguments "$@"

extra=
if [ "${more[0]:-}" = "--model_args-extra" ]; then
  if [ -z "${more[1]:-}" ]; then echo "$(basename "$0"): --model_args-extra needs a value" >&2; exit 2; fi
  extra=,${more[1]}; more=("${more[@]:2}")
fi
IFS=, read -ra names <<< "$models"
for model in "${names[@]}"; do
  if [ -z "$model" ]; then continue; fi
  beside jrt lm-eval --model jrt --model_args "pretrained=$model$extra" --tasks "${tasks:-recall_super_glue}" --num_fewshot 5 \
    --batch_size "$batch_size" --device "$device" --output_path "$output/super_glue/$(basename "$model")" \
    ${options[@]+"${options[@]}"} ${more[@]+"${more[@]}"}
done
await_all
step jrt report "$output/super_glue" --layout table8
exit $status
