"""The short convolution by the package causal-conv1d, where it is installed
(https://github.com/Dao-AILab/causal-conv1d).

Its function takes inputs (B, E, T) whose channels are contiguous: this is the transpose of the project's layout
(B, T, E), so nothing is copied. It also takes the state before the text, (B, E, K - 1), or the number of each token's
packed sequence. The state after the last token is read from the inputs, so it needs no gradient from the package.

The adapter is written to the signature and the checks of version 1.7. It is tested with a stand-in that computes the
same in PyTorch (tests/test_optional_packages.py); the package's own kernels have not been run, or measured.

Shapes: B batch, N packed sequences, T tokens, E channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import packages
from jrt.ops.packing import owners
from jrt.ops.short_convolution import last_inputs

PACKAGE, MODULE, NAME = "causal-conv1d", "causal_conv1d", "causal_conv1d_fn"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAPS = (2, 3, 4)
ALIGNMENT = 16  # bytes that the kernels read at once


def unsupported(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """The reason why the package cannot serve the call; None if it can."""
    tensors = (u, weight, bias, state)
    if reason := packages.unavailable(PACKAGE, MODULE, NAME, tensors):
        return reason
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it, and compiles or takes other kernels instead"
    if u.dtype not in DTYPES or weight.dtype not in DTYPES:
        return f"u is {u.dtype} and weight {weight.dtype}: expected float32, bfloat16 or float16"
    if weight.shape[1] not in TAPS:
        return f"{weight.shape[1]} taps: expected one of {TAPS}"
    if u.shape[2] % 8:
        return f"{u.shape[2]} channels: expected a multiple of 8"
    if state is not None and cu_seqlens is not None:
        return "it takes a state or packed sequences, not both"
    return packages.unordered_sums(PACKAGE, tensors)


def silu_convolution(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`jrt.ops.silu_convolution`, for calls for which `unsupported` returns None."""
    if mask is not None:
        u = u.masked_fill(~mask[..., None], 0)
    y = packages.function(MODULE, NAME)(
        _rows(u).mT,
        weight,
        None if bias is None else bias.to(weight.dtype),
        seq_idx=None if cu_seqlens is None else owners(cu_seqlens, u.shape[1]).int()[None],  # (1, T)
        initial_states=None if state is None else _rows(state.to(u.dtype)).mT,  # (B, E, K - 1)
        activation="silu",
    )  # (B, E, T)
    y = packages.once_differentiable(y, "the op with backend='pytorch'")
    return y.mT, last_inputs(u, weight.shape[1], state, cu_seqlens)


def _rows(x: Tensor) -> Tensor:
    """x (B, T, E) as the kernels read it: channels contiguous, rows aligned; copied if necessary."""
    batch, row, channel = x.stride()
    aligned = row > 0 and row % 8 == 0 and batch % 8 == 0 and x.storage_offset() * x.element_size() % ALIGNMENT == 0
    return x if channel == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
