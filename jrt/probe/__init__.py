"""Measures on a model's own weights whether its output for a row of tokens depends on anything but that row.

An evaluation pads prompts, puts several into a batch, reads a page that they share once, and copies states between
rows. All of this is correct for a model that masks padding and keeps its rows apart. For another model it gives wrong
answers without an error.
"""

import copy

import torch
from transformers import PreTrainedModel

from jrt.foreign.greedy import set_aside
from jrt.probe.findings import CHECKS, Check, Findings, RunMode
from jrt.probe.trials import LENGTH, STATES, Trials, largest_logit, read_row

PASSES = 20
"""The most calls of the model's `forward` in one probe."""

__all__ = ["CHECKS", "LENGTH", "PASSES", "STATES", "Check", "Findings", "RunMode", "largest_logit", "probe", "read_row"]


@torch.no_grad()
def probe(model: PreTrainedModel, pad_token_id: int = 0) -> Findings:
    """Runs all checks on a causal language model, in at most PASSES calls of at most LENGTH tokens a row.

    The model and its generation settings are left as they were. A check that fails is part of the result, not an error.

    pad_token_id: the id in padded columns; it should be the one with which the model will be run."""
    training = model.training
    model.eval()
    plain = copy.copy(model)  # the same weights, with settings of its own
    plain.config = copy.copy(model.config)
    set_aside(plain)
    calls: list[None] = []
    with plain.register_forward_pre_hook(lambda *_: calls.append(None)):
        checks = tuple(Trials(plain, pad_token_id).checks())
    model.train(training)
    return Findings(checks, str(model.dtype).removeprefix("torch."), len(calls))
