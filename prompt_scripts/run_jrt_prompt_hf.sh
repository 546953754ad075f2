#!/usr/bin/env bash
# Table 1 for models of the Hugging Face hub (GLA, Mamba, Mamba-2): six tasks, read once and twice, window 1000 / 50.
# The mean gain over the runs of this script and of run_jrt_prompt_hazy.sh: `jrt report OUTPUT_DIRS --layout mean-gain`.
# Tables 13 and 14: few_shot.sh.
# Models outside transformers itself (GLA) need the package flash-linear-attention.
set -euo pipefail
source "$(dirname "$0")/common.sh"

models=fla-hub/gla-1.3B-100B,fla-hub/gla-2.7B-100B
models+=,state-spaces/mamba-130m,state-spaces/mamba-370m,state-spaces/mamba-1.4b,state-spaces/mamba-2.8b
models+=,state-spaces/mamba2-130m,state-spaces/mamba2-370m,state-spaces/mamba2-1.3b,state-spaces/mamba2-2.7b
batch_size=32
read_arguments "$@"

evaluate table1 swde,fda,squad,drop,nq_1024,triviaqa once,twice jrt-table1
collect
