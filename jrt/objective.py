"""JRT-RNN's training objective: recover masked tokens in the prefix, predict the next token after it (equation 5).

Shapes: B batch, T tokens, V vocabulary rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def mask_prefix(
    input_ids: Tensor, prefix_length: Tensor, mask_token: int, probability: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replaces a share of the prefix by the mask token (always the mask token: no 80/10/10 split).

    Args:
        input_ids: (B, T).
        prefix_length: (B,) tokens of each row that its encoder reads.
        mask_token: id that stands for a hidden token.
        probability: share of prefix tokens that are hidden.
        generator: source of the draw, on the device of `input_ids`.

    Returns:
        The inputs with masks, and labels (B, T): the original id at hidden places, IGNORED elsewhere.
    """
    draw = torch.rand(input_ids.shape, generator=generator, device=input_ids.device)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = (draw < probability) & (columns < prefix_length[:, None])
    return input_ids.masked_fill(hidden, mask_token), input_ids.masked_fill(~hidden, IGNORED)


def prefix_loss(logits: Tensor, masked_labels: Tensor, next_labels: Tensor, masked_weight: float = 0.25) -> Tensor:
    """Mean next-token loss + `masked_weight` x mean masked-token loss, as the release sums them (undivided).

    Args:
        logits: (B, T, V).
        masked_labels: (B, T) from `mask_prefix`; each token at its own place.
        next_labels: (B, T) the token after each place; IGNORED where it must not count (inside the prefix).
        masked_weight: 0.25 in the paper.

    Returns:
        A scalar; a batch without masked (or without next-token) labels contributes 0 for that part.
    """
    return mean_loss(logits, next_labels) + masked_weight * mean_loss(logits, masked_labels)


def mean_loss(logits: Tensor, labels: Tensor, items: int | Tensor | None = None) -> Tensor:
    """Cross-entropy over the labels that count, in fp32; 0 where none does.

    Args:
        logits: (..., V).
        labels: (...), IGNORED where nothing counts.
        items: what the sum is divided by; None: the number of labels that count.
    """
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum().clamp(min=1) if items is None else items)
