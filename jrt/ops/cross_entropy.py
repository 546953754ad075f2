"""The cross-entropy of a projection's outputs, for training on a GPU, without the logits of all places in memory.

The forward pass computes the gradients as well, part by part, because the logits are there. The parts are large: each
of them reads and writes the fp32 gradient of the projection, which takes as long as the products of about 1,000 places.
No step waits for the device.

Shapes: N places, E width, V vocabulary rows.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops.registration import register

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLACES = 8192  # whose logits are in memory at a time


def has_linear_cross_entropy(hidden: Tensor) -> bool:
    """Whether `linear_cross_entropy` serves these hidden states: in training, on a GPU. Never imports triton."""
    on_device = hidden.is_cuda or (hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return INSTALLED and on_device and hidden.requires_grad and torch.is_grad_enabled()


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None = None, ignored: int = -100
) -> Tensor:
    """The sum over places of weight x cross-entropy of the logits hidden @ head.T: a fp32 scalar.

    Args:
        hidden: (N, E) in bf16, fp16 or fp32; under autocast in any of them, and converted to autocast's dtype.
        head: (V, E).
        labels: (N,) ids below V, or `ignored` where there is no label.
        weights: (N,) fp32; None: all are 1.
        ignored: the label of places that do not count.

    Raises:
        ValueError: hidden states are fp64.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy: expected hidden in bfloat16, float16 or float32, got {dtype}")
    return torch.ops.jrt.linear_cross_entropy(hidden.to(dtype), head, labels, weights, ignored)[0]


# ---- the operator


def _forward(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its gradients by hidden (N, E) and by head (V, E), the latter in fp32."""
    from jrt.ops import cross_entropy_triton

    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    by_hidden = torch.empty_like(hidden)
    by_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = head.to(hidden.dtype)
        for start in range(0, len(hidden), PLACES):
            own = slice(start, start + PLACES)
            logits = F.linear(hidden[own], weight)  # (PLACES, V)
            part = None if weights is None else weights[own]
            cross_entropy_triton.replace_by_gradient(logits, labels[own], part, ignored, losses[own])
            torch.mm(logits, weight, out=by_hidden[own])
            _add_product(by_head, logits.mT, hidden[own])
    return losses.sum(), by_hidden, by_head


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with sums in total's dtype, which may be wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _forward_fake(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor | None, ignored: int
) -> tuple[Tensor, Tensor, Tensor]:
    by_head = torch.empty(head.shape, dtype=torch.float32, device=head.device)
    return by_head.new_empty(()), torch.empty_like(hidden), by_head


def _save(ctx, inputs, output) -> None:
    _, by_hidden, by_head = output
    ctx.mark_non_differentiable(by_hidden, by_head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(by_hidden, by_head)
    ctx.head_dtype = inputs[1].dtype


def _gradients(ctx, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    by_hidden, by_head = ctx.saved_tensors
    return by_hidden * dloss, (by_head * dloss).to(ctx.head_dtype), None, None, None


register(
    "linear_cross_entropy",
    "(Tensor hidden, Tensor head, Tensor labels, Tensor? weights, int ignored) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
torch.library.register_autograd("jrt::linear_cross_entropy", _gradients, setup_context=_save)
