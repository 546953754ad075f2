#!/usr/bin/env bash
# Table 1 for the models that the authors trained (Based, Mamba, attention; 1.3B, 50B tokens): six tasks, once and twice.
set -euo pipefail
source "$(dirname "$0")/common.sh"

models=hazyresearch/based-1b-50b,hazyresearch/mamba-1b-50b,hazyresearch/attn-1b-50bn
batch_size=32
read_arguments "$@"

evaluate table1 swde,fda,squad,drop,nq_1024,triviaqa once,twice jrt-table1
collect
