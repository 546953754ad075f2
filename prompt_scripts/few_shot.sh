#!/usr/bin/env bash
# Table 14: Mamba with the default prompt, two examples (2-shot), and JRT-Prompt.
# The same runs give Table 13 (error modes): `jrt report OUTPUT_DIR --layout table13`.
set -euo pipefail
source "$(dirname "$0")/common.sh"

models=state-spaces/mamba-130m,state-spaces/mamba-370m,state-spaces/mamba-1.4b,state-spaces/mamba-2.8b
batch_size=32
read_arguments "$@"

evaluate table14 fda,swde,squad once,2shot,twice jrt-table1
collect --layout table14
