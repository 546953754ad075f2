#!/usr/bin/env bash
# Table 4: JRT-RNN at 512 tokens with each rule for prompts that are shorter than its encoder: pad, repeat, iterate.
set -euo pipefail
source "$(dirname "$0")/../prompt_scripts/common.sh"

models=hazyresearch/JRT-360M-30B,hazyresearch/JRT-1B-50B
batch_size=8
read_arguments "$@"

given=(${more[@]+"${more[@]}"})
for rule in pad repeat iterate; do
  more=(--short-prompt "$rule" ${given[@]+"${given[@]}"})
  evaluate "$rule/pages" fda,swde once jrt-table2-512
  if [ -z "$tasks" ]; then evaluate "$rule/nq" nq_512 once jrt-table2-nq; fi
done
collect --layout table4
