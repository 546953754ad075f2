#!/usr/bin/env bash
# Table 2 (and Table 3's 2k columns): JRT-RNN and its baselines read once, windows 512, 1024 and 2048 / 50, NQ as cut.
# The paper's length-512 cells fill short prompts by reading again: `-- --short-prompt repeat` for the JRT models, into
# another OUTPUT_DIR. Table 3: `jrt report OUTPUT_DIR --layout table3`. Table 4: short_prompts.sh.
set -euo pipefail
source "$(dirname "$0")/../prompt_scripts/common.sh"

models=hazyresearch/JRT-360M-30B,hazyresearch/based-360M-30B,hazyresearch/mamba-360M-30B,hazyresearch/attn-360M-30B
models+=,hazyresearch/JRT-1B-50B,hazyresearch/based-1b-50b,hazyresearch/mamba-1b-50b,hazyresearch/attn-1b-50bn
batch_size=8
read_arguments "$@"

evaluate table2 squad,drop,swde,fda,triviaqa,nq_512,nq_1024,nq_2048 once jrt-table2
collect
