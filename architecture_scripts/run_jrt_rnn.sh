#!/usr/bin/env bash
# Table 2: JRT-RNN and its baselines read once, with windows of 512, 1024 and 2048 tokens and an answer room of 50. The NQ
# datasets are cut beforehand. In the paper's cells of length 512, the JRT models' short prompts are filled up by repeating
# them: add `-- --short-prompt repeat`, with --models for the JRT models and another OUTPUT_DIR.
# Table 3, from the same runs: `jrt report OUTPUT_DIR --layout table3`. Table 4: short_prompts.sh.
set -euo pipefail
source "$(dirname "$0")/../prompt_scripts/common.sh"

models=hazyresearch/JRT-360M-30B,hazyresearch/based-360M-30B,hazyresearch/mamba-360M-30B,hazyresearch/attn-360M-30B
models+=,hazyresearch/JRT-1B-50B,hazyresearch/based-1b-50b,hazyresearch/mamba-1b-50b,hazyresearch/attn-1b-50bn
batch_size=8
read_arguments "$@"

evaluate table2 squad,drop,swde,fda,triviaqa,nq_512,nq_1024,nq_2048 once jrt-table2
collect
