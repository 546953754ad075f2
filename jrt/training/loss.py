"""The model together with its loss, as one module for data parallelism. The logits of all tokens are never in memory at
once.

Shapes: B rows, T tokens, E width, V vocabulary rows, N = B x T places (a place is one token position of one row).
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jrt.cache import LayerState
from jrt.mixers import TokenBatch
from jrt.model import LanguageModel
from jrt.training.objective import IGNORED, Objective, Targets, greedy_answers

CHUNK = 2048  # places whose logits are in memory at a time
LIGER_PARTS = 8  # parts of liger-kernel are larger than its default by this factor: fewer sums of the head's gradient
ChunkSum = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SPREAD = 8  # `room_for` leaves room for this many standard deviations more masked places than their mean


class ModelWithLoss(nn.Module):
    """Returns (4,) sums over a batch: cross-entropy of next tokens, cross-entropy of masked tokens, correct answers,
    answers.

    The training loop divides them by the counts of the whole batch, which may be spread over devices and passes.

    Args:
        model: a language model with any pattern.
        recovers: whether the objective masks tokens of the prefix, which the model has to recover.
    """

    def __init__(self, model: LanguageModel, recovers: bool) -> None:
        super().__init__()
        self.model, self.recovers = model, recovers
        self.chunk_sum: ChunkSum = _chunk_sum

    def compile_parts(self, fullgraph: bool = False) -> None:
        """Compiles each block of the model, what follows the last, and the loss of a chunk.

        Blocks of the same kind share one compiled graph, so there are as many compilations as kinds of layers."""
        torch._dynamo.config.recompile_limit = 64  # kinds of layers x lengths
        # DistributedDataParallel would have each block cut into graphs of 25 MB of weights, so that their gradients are
        # sent early. The gradients of a block are early enough, and cuts end the fusion of operations.
        torch._dynamo.config.optimize_ddp = False
        for block in self.model.blocks:
            block.forward = _compiled(block.forward, fullgraph)
        last = torch.compile(self.model.last, dynamic=False, fullgraph=fullgraph)
        self.model.last = last  # type: ignore[method-assign]
        self.chunk_sum = torch.compile(_chunk_sum, dynamic=False)

    def checkpoint_blocks(self) -> None:
        """Saves memory: only each block's input is kept, and the backward pass computes the rest again.

        Call it after `compile_parts`."""
        for block in self.model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        masked: Tensor,
        prefix_length: Tensor | None,
        weights: Tensor | None,
        room: tuple[int, int],
        answers: Tensor | None = None,
    ) -> Tensor:
        """The four sums; arguments as in `jrt.training.objective.Targets`, room: the result of `room_for`, answers: (B,
        T) as in `greedy_answers`, None for a training step, whose counts of answers are then 0."""
        hidden, _ = self.model.read(input_ids, prefix_length=prefix_length)
        hidden, labels, masked = hidden.flatten(0, 1), labels.flatten(), masked.flatten()  # (N, E), (N,), (N,)
        weights = None if weights is None else weights.flatten()
        head = self.model.head.weight
        following = _sum_where(hidden, head, labels.masked_fill(masked, IGNORED), weights, room[0], self.chunk_sum)
        recovered = correct = asked = torch.zeros_like(following)
        if self.recovers and room[1]:
            recovered = _sum_where(hidden, head, labels.masked_fill(~masked, IGNORED), None, room[1], self.chunk_sum)
        if answers is not None:
            likeliest = torch.cat([F.linear(part, head).argmax(-1) for part in hidden.split(CHUNK)])  # (N,)
            correct, asked = greedy_answers(likeliest.view_as(answers), labels.view_as(answers), answers)
        return torch.stack([following, recovered, correct.float(), asked.float()])


def room_for(objective: Objective, rows: int, length: int, prefix: int | None) -> tuple[int, int]:
    """The most places of a (rows, length) batch that have a next-token label, and the most that have a masked label.

    These are Python numbers, so that shapes are known without waiting for the device. The number of masked places is
    random; its bound lies SPREAD standard deviations above its mean. prefix: tokens of every row's prefix; None if rows
    differ, and any place may have a label.
    """
    if prefix is None:
        return rows * length, rows * length
    following = rows * (length - prefix + (objective.predicts_first and prefix > 0))
    mean = rows * prefix * objective.masked_share
    deviation = math.sqrt(mean * (1 - objective.masked_share))
    return following, min(rows * prefix, math.ceil(mean + SPREAD * deviation) + 1)


def _sum_where(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None, room: int, chunk_sum: ChunkSum
) -> Tensor:
    if room < len(labels):  # take the first `room` places, after sorting those with a label to the front
        chosen = (labels == IGNORED).int().argsort(stable=True)[:room]
        hidden, labels = hidden[chosen], labels[chosen]
        weights = None if weights is None else weights[chosen]
    return summed_cross_entropy(hidden, head, labels, weights, chunk_sum)


def _chunk_sum(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    logits = F.linear(hidden, head).float()  # (N, V)
    if weights is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return (F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none") * weights).sum()


def summed_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    chunk_sum: ChunkSum = _chunk_sum,
) -> Tensor:
    """Sum of the (weighted) cross-entropies of the logits hidden @ head.T, fp32 scalar.

    The logits of all places are never in memory at once. On a GPU, liger-kernel computes it if it is installed and no
    weights are given. Otherwise the logits of CHUNK places are in memory, and the backward pass computes them again.

    Args:
        hidden: (N, E).
        head: (V, E).
        labels: (N,) ids, IGNORED where there is no label.
        weights: (N,) fp32; None: all weigh 1.
        chunk_sum: the function for one chunk, for instance a compiled one.
    """
    if weights is None and hidden.is_cuda and len(hidden) and has_liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
        return liger_fused_linear_cross_entropy(
            hidden.to(dtype),
            head.to(dtype),
            labels,
            ignore_index=IGNORED,
            reduction="sum",
            accum_dtype=torch.float32,
            chunk_mem_const=LIGER_PARTS,
        ).float()
    if len(hidden) <= CHUNK:
        return chunk_sum(hidden, head, labels, weights)
    parts = []
    for start in range(0, len(hidden), CHUNK):
        own = slice(start, start + CHUNK)
        part = None if weights is None else weights[own]
        parts.append(checkpoint(chunk_sum, hidden[own], head, labels[own], part, use_reentrant=False))
    return torch.stack(parts).sum()


@functools.cache
def has_liger() -> bool:
    """Whether liger-kernel is installed (`pip install 'jrt[gpu]'`)."""
    return importlib.util.find_spec("liger_kernel") is not None


def loss_of(sums: Tensor, totals: Tensor, objective: Objective) -> Tensor:
    """The loss of the paper's equation 5 (see `Objective` for its scale).

    sums: (2,) summed cross-entropies of next and of masked tokens; totals: (2,) their weights, over the whole batch."""
    means = sums / totals.clamp(min=1e-9)
    return means[0] + objective.masked_weight * means[1]


def _compiled(forward: Callable, fullgraph: bool) -> Callable:
    """A block's forward, compiled. In training it returns None for the state.

    The backward pass of a compiled function adds the gradients of all results. That of the state would be zeros, as
    large as keys and values."""

    def without_state(x: Tensor, update: Tensor | None, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        x, update, _ = forward(x, update, batch, None)
        return x, update

    trained = torch.compile(without_state, dynamic=False, fullgraph=fullgraph)
    whole = torch.compile(forward, dynamic=False, fullgraph=fullgraph)

    def call(
        x: Tensor, update: Tensor | None, batch: TokenBatch, state: LayerState | None
    ) -> tuple[Tensor, Tensor, LayerState | None]:
        if torch.is_grad_enabled() and state is None:
            return *trained(x, update, batch), None
        return whole(x, update, batch, state)

    return call


def split_rows(targets: Targets, rows: int) -> list[Targets]:
    """Splits targets into parts of at most `rows` rows, for gradient accumulation."""
    parts = []
    for i in range(0, len(targets.labels), rows):
        part: dict[str, Any] = {name: x if x is None else x[i : i + rows] for name, x in vars(targets).items()}
        parts.append(Targets(**part))
    return parts
