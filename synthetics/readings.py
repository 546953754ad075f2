"""Reading orders: in which order a model reads the context and the question of a task, and how often.

Every reading ends with the question, so the answers are asked for in its last Q columns.

Shapes: N examples, C context tokens, Q question tokens, T tokens read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from synthetics.data import Examples

Reading = Callable[[Examples], Tensor]


def once(examples: Examples) -> Tensor:
    """context, question: (N, C + Q)."""
    return torch.cat([examples.context, examples.question], dim=1)


def twice(examples: Examples) -> Tensor:
    """context, context, question: (N, 2 C + Q). JRT-Prompt (paper section 3.2)."""
    return torch.cat([examples.context, examples.context, examples.question], dim=1)


def both_orders(examples: Examples) -> Tensor:
    """The context, then the context with its parts in the reverse order, then the question: (N, 2 C + Q)."""
    other = examples.context[:, examples.other_order]
    return torch.cat([examples.context, other, examples.question], dim=1)


def other_order(examples: Examples) -> Tensor:
    """The context with its parts in the reverse order, then the question: (N, C + Q)."""
    return torch.cat([examples.context[:, examples.other_order], examples.question], dim=1)


def question_first(examples: Examples) -> Tensor:
    """question, context, question: (N, C + 2 Q)."""
    return torch.cat([examples.question, examples.context, examples.question], dim=1)


READINGS: dict[str, Reading] = {
    "once": once,
    "twice": twice,
    "both-orders": both_orders,
    "other-order": other_order,
    "question-first": question_first,
}

READS_TWICE = {"twice", "both-orders"}  # readings with two contexts
