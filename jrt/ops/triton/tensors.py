"""Tensors as the kernels take them: contiguous last dimensions, strides, masks as bytes, memory for states.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, H heads, D value size, F features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from jrt.ops.feature_map import feature_count
from jrt.ops.triton.sizes import Pieces


def sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """N."""
    return k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def empty_state(v: Tensor, count: int, d: int) -> tuple[Tensor, Tensor]:
    """Memory for S (count, H, F, D) and z (count, H, F)."""
    H, D, F = v.shape[2], v.shape[3], feature_count(d)
    return v.new_empty(count, H, F, D, dtype=torch.float32), v.new_empty(count, H, F, dtype=torch.float32)


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; copied if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(x: Tensor | None) -> Tensor | None:
    """x in contiguous memory; copied if necessary."""
    return None if x is None else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of batch, token and head."""
    batch, token, head, _ = x.stride()
    return batch, token, head


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as bytes, with the tokens of a row contiguous."""
    if mask is None:
        return None
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


def offsets(cu_seqlens: Tensor | None, k: Tensor) -> Tensor | None:
    """First tokens of packed sequences as the kernels read them; none lies beyond the last token."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32).clamp(0, k.shape[1])


def mask_stride(mask: Tensor | None) -> int:
    """The stride of batch; 0 without a mask."""
    return 0 if mask is None else mask.stride(0)


def on(device: torch.device) -> AbstractContextManager:
    """In this context kernels are launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tables(pieces: Pieces, cu_seqlens: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tables that `places.find_piece` reads for packed sequences."""
    return pieces.sequence, pieces.start, pieces.end, cu_seqlens
