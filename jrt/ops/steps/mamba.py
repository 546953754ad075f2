"""The selective scan of one token, with step size, skip and gate; the state is updated in place.

delta = softplus(W r + b), h = exp(delta A) h + delta u B, y = (h C + D u) silu(gate) (arXiv 2312.00752, equation 2).

Shapes: B batch, E channels, N states a channel, R rank of the time step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.steps.launch import after_previous, early, release_next

CHANNELS = 32  # channels of one program


def selective_step(
    u: Tensor, gate: Tensor, selected: Tensor, weight: Tensor, bias: Tensor, A_log: Tensor, D: Tensor, h: Tensor,
    y: Tensor,
) -> None:  # fmt: skip
    """Writes y (B, E), and updates the state h (B, E, N) fp32 in place.

    Args:
        u: (B, E), the scan's input; gate: (B, E), after silu.
        selected: (B, R + 2 N), the outputs of x_proj: r (the low-rank step size), B and C of this token.
        weight, bias: (E, R) and (E,), of dt_proj.
        A_log, D: (E, N) and (E,).
    """
    batch, channels, states = h.shape
    rank = weight.shape[1]
    _selective_kernel[(triton.cdiv(channels, CHANNELS), batch)](
        u, gate, selected, weight, bias, A_log, D, h, y, channels,
        N=states, R=rank, BE=CHANNELS, BN=triton.next_power_of_2(states), BR=triton.next_power_of_2(rank),
        num_warps=4, **early(h.device),
    )  # fmt: skip


@triton.jit
def _softplus(x):
    y = tl.exp(tl.minimum(x, 20.0))
    u = 1 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * (y / (u - 1)))  # exact to rounding for small y too
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def _selective_kernel(
    u, gate, selected, weight, bias, A_log, D, h, y, E,
    N: tl.constexpr, R: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1)
    e, n, r = tl.program_id(0) * BE + tl.arange(0, BE), tl.arange(0, BN), tl.arange(0, BR)
    channel = e < E
    grid = channel[:, None] & (n < N)[None, :]
    w = tl.load(weight + e[:, None] * R + r[None, :], mask=channel[:, None] & (r < R)[None, :], other=0.0)
    rates = -tl.exp(tl.load(A_log + e[:, None] * N + n[None, :], mask=grid, other=0.0).to(tl.float32))
    skip = tl.load(D + e, mask=channel, other=0.0).to(tl.float32)
    shift = tl.load(bias + e, mask=channel, other=0.0).to(tl.float32)
    dtype: tl.constexpr = u.dtype.element_ty
    release_next(PDL)
    after_previous(PDL)
    base = selected + b * (R + 2 * N)
    rank = tl.load(base + r, mask=r < R, other=0.0).to(tl.float32)
    reads = tl.load(base + R + n, mask=n < N, other=0.0).to(tl.float32)
    asks = tl.load(base + R + N + n, mask=n < N, other=0.0).to(tl.float32)
    place = h + (b.to(tl.int64) * E + e[:, None]) * N + n[None, :]
    state = tl.load(place, mask=grid, other=0.0)
    at = b * E + e
    x = tl.load(u + at, mask=channel, other=0.0).to(tl.float32)
    opened = tl.load(gate + at, mask=channel, other=0.0).to(tl.float32)
    time = tl.sum(w.to(tl.float32) * rank[None, :], 1).to(dtype).to(tl.float32) + shift
    delta = _softplus(time)
    state = state * tl.exp(delta[:, None] * rates) + (delta * x)[:, None] * reads[None, :]
    tl.store(place, state, mask=grid)
    out = (tl.sum(state * asks[None, :], 1) + skip * x).to(dtype).to(tl.float32)
    tl.store(y + at, out * opened, mask=channel)
