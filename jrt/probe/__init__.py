"""Whether a model's output for a row depends on anything but the row: measured, on its own weights.

An evaluation pads prompts, asks several at once, reads a page that they share once, and copies states. All of this is right
for a model that masks padding and keeps its rows apart, and silently wrong for one that does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from jrt.foreign.greedy import set_aside
from jrt.probe.findings import CHECKS, Check, Findings, RunMode
from jrt.probe.trials import LENGTH, STATES, Trials, read_row

PASSES = 20
"""The most calls of a model's `forward` that a probe makes."""

__all__ = [
    "CHECKS",
    "LENGTH",
    "PASSES",
    "STATES",
    "Check",
    "Findings",
    "RunMode",
    "probe",
    "read_row",
]


@torch.no_grad()
def probe(model: PreTrainedModel, pad_token_id: int = 0) -> Findings:
    """Tries a causal model in at most PASSES calls of at most LENGTH tokens a row; the model is left as it was.

    pad_token_id: the id in padded columns, as the model will be run with."""
    training = model.training
    model.eval()
    with _plain_settings(model), _counted(model) as calls:
        trials = Trials(model, pad_token_id)
        checks = tuple(trials.checks())
    model.train(training)
    return Findings(checks, str(model.dtype).removeprefix("torch."), calls[0])


@contextmanager
def _plain_settings(model: PreTrainedModel) -> Iterator[None]:
    """The model with plain greedy settings, and then with its own again."""
    own, config = model.generation_config, dict(vars(model.config))
    set_aside(model)
    try:
        yield
    finally:
        model.generation_config = own
        vars(model.config).update(config)


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts calls of `forward`, in a list of one number."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()
