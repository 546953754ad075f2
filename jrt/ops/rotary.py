"""Queries and keys, rotated by their positions (RoFormer, arXiv 2104.09864), and values, from one projection's output.

In training on a GPU one Triton kernel splits and rotates, and one joins and rotates back the three gradients: each
number is read and written once. All other calls are plain PyTorch (`rotary_pytorch.py`).

Shapes: B batch, T tokens, H heads, D head size, R = half the rotary dimensions, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import checks, rotary_pytorch
from jrt.ops.packages import triton_unavailable
from jrt.ops.registration import refuse_second_derivative, register, without_rule

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (B, T, 3 H D) into queries, keys and values (B, T, H, D), and rotates queries and keys.

    Args:
        cos, sin: (B, T, 1, R) of the angles, fp32.
        heads: H.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    checks.rotation(qkv, cos, sin, heads)
    if not _fuses(qkv) or without_rule((qkv, cos, sin)):
        return rotary_pytorch.split_rotated(qkv, cos, sin, heads)
    return torch.ops.jrt.split_rotated(qkv, cos, sin, heads)


def _fuses(x: Tensor) -> bool:
    """Whether the Triton kernels serve this input: in training, on a GPU. Never imports triton."""
    return not triton_unavailable(x) and x.dtype in DTYPES and x.requires_grad and torch.is_grad_enabled()


# ---- the operators. `rotary_triton` imports triton, so it is imported where it is called.


def _split(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    from jrt.ops import rotary_triton

    q, k, v = _split_fake(qkv, cos, sin, heads)
    rotary_triton.split(qkv.contiguous(), cos, sin, (q, k, v))
    return q, k, v


def _split_fake(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*qkv.shape[:2], heads, qkv.shape[2] // (3 * heads))
    return qkv.new_empty(shape), qkv.new_empty(shape), qkv.new_empty(shape)


def _join(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv."""
    from jrt.ops import rotary_triton

    dqkv = _join_fake(dq, dk, dv, cos, sin)
    rotary_triton.join((dq.contiguous(), dk.contiguous(), dv.contiguous()), cos, sin, dqkv)
    return dqkv


def _join_fake(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return dq.new_empty(*dq.shape[:2], 3 * dq.shape[2] * dq.shape[3])


def _save(ctx, inputs, output) -> None:
    _, cos, sin, _ = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.jrt.join_rotated(dq, dk, dv, *ctx.saved_tensors), None, None, None


register(
    "split_rotated", "(Tensor qkv, Tensor cos, Tensor sin, int heads) -> (Tensor, Tensor, Tensor)", _split, _split_fake
)
register("join_rotated", "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor", _join, _join_fake)
refuse_second_derivative("join_rotated", "jrt.ops.rotary_pytorch.split_rotated")
torch.library.register_autograd("jrt::split_rotated", _gradients, setup_context=_save)
