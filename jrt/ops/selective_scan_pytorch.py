"""The selective scan in plain PyTorch: step by step (the definition), and in chunks with scratch memory independent of
T.

Shapes: B batch, T steps, E channels, N states a channel, K chunks, L steps of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32  # steps of a chunk; the state before each is saved for the backward pass


def state_dtype(*inputs: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


def _cast(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype = state_dtype(*inputs)
    return tuple(None if x is None else x.to(dtype) for x in inputs)


def stepwise(u, delta, A, B, C, D, initial_state) -> tuple[Tensor, Tensor]:
    """The definition, step by step; its gradients are autograd's."""
    dtype = u.dtype
    u, delta, A, B, C, D, h = _cast(u, delta, A, B, C, D, initial_state)
    if h is None:
        h = u.new_zeros(u.shape[0], *A.shape)  # (B, E, N)
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))  # (B, E)
    y = torch.stack(outputs, dim=1)  # (B, T, E)
    if D is not None:
        y = y + D * u
    return y.to(dtype), h


# ---- "chunked": several chunks, called lanes, run in parallel, each from a zero state. Then the true state at each
# lane's start, multiplied by the decays since then, is added. Products are of decays only, which lie in [0, 1]. Nothing
# is divided by such a product, which could underflow to zero.

LANE_ELEMENTS = 1 << 21  # states (B x L x E x N) that the lanes of one segment may hold


def _lanes(batch: int, A: Tensor, steps: int) -> int:
    """Number of whole chunks that run in parallel, at least one."""
    length = CHUNK
    return max(1, min(LANE_ELEMENTS // (batch * length * A.numel()), steps // length))


def _scan_forwards(decay: Tensor, value: Tensor, h: Tensor, lanes: int) -> Tensor:
    """h_t = decay_t h_{t-1} + value_t along dim 1 from the state h. Overwrites decay and value, and returns value."""
    decay, value = (x.unflatten(1, (lanes, -1)) for x in (decay, value))  # (B, K, L, E, N)
    value[:, 0, 0].addcmul_(decay[:, 0, 0], h)
    for t in range(1, value.shape[2]):
        value[:, :, t].addcmul_(decay[:, :, t], value[:, :, t - 1])
    if lanes > 1:
        for t in range(1, value.shape[2]):
            decay[:, :, t] *= decay[:, :, t - 1]
        for k in range(1, lanes):  # the true state at each lane's end, one lane after another; the rest is parallel
            value[:, k, -1].addcmul_(decay[:, k, -1], value[:, k - 1, -1])
        value[:, 1:, :-1].addcmul_(decay[:, 1:, :-1], value[:, :-1, -1:])
    return value.flatten(1, 2)


def _scan_backwards(decay: Tensor, value: Tensor) -> Tensor:
    """g_t = decay_t g_{t+1} + value_t along dim 1, g_L = 0. Overwrites both arguments and returns value."""
    span = 1
    while span < value.shape[1]:
        value[:, :-span] += decay[:, :-span] * value[:, span:]
        decay[:, :-span] = decay[:, :-span] * decay[:, span:]
        span *= 2
    return value


def _states(u, delta, A, B, h, lanes: int) -> Tensor:
    """States of one segment (B, lanes L, E, N), after the state h (B, E, N)."""
    decay = (delta[..., None] * A).exp_()
    value = (delta * u)[..., None] * B[:, :, None, :]
    return _scan_forwards(decay, value, h, lanes)


def chunked_forward(u, delta, A, B, C, D, initial_state, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(u, delta, A, B, C, D, initial_state)
    A, D, h = (None if x is None else x.to(dtype) for x in (A, D, initial_state))
    batch, steps, length = u.shape[0], u.shape[1], CHUNK
    h = A.new_zeros(batch, *A.shape) if h is None else h  # (B, E, N)
    y = u.new_empty(u.shape)  # (B, T, E)
    between = A.new_empty(between_shape(u, A, CHUNK, keep))  # (B, K, N, E)
    start = 0
    while start < steps:
        lanes = _lanes(batch, A, steps - start)
        now = slice(start, min(steps, start + lanes * length))  # the last chunk may be a short one, alone
        u_k, delta_k, B_k, C_k = (x[:, now].to(A.dtype) for x in (u, delta, B, C))
        states = _states(u_k, delta_k, A, B_k, h, lanes)  # (B, K L, E, N)
        if keep:
            first = start // length
            between[:, first] = h.mT
            between[:, first + 1 : first + lanes] = states[:, length - 1 : -1 : length].mT
        y_k = torch.matmul(states, C_k[..., None])[..., 0]  # (B, K L, E)
        y[:, now] = y_k if D is None else y_k + D * u_k
        h = states[:, -1]
        start = now.stop
    return y, h.clone(memory_format=torch.contiguous_format), between


def chunked_backward(u, delta, A, B, C, D, between, dy, dstate) -> tuple[Tensor, ...]:
    """Gradients from the last chunk to the first; g (B, L, E, N) is the gradient of the loss by the states h."""
    A, D = (x.to(between.dtype) for x in (A, D))
    steps, length = u.shape[1], CHUNK
    du, ddelta, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, delta, B, C))
    dA, dD = torch.zeros_like(A), torch.zeros_like(D)
    dh = dstate.to(A.dtype)  # (B, E, N), by the state that a chunk hands on
    for k in reversed(range(between.shape[1])):
        now = slice(k * length, min(steps, (k + 1) * length))
        u_k, delta_k, B_k, C_k, dy_k = (x[:, now].to(A.dtype) for x in (u, delta, B, C, dy))
        h_in = between[:, k].mT  # (B, E, N)
        decay = torch.exp(delta_k[..., None] * A)
        states = _states(u_k, delta_k, A, B_k, h_in, lanes=1)
        before = torch.cat([h_in[:, None], states[:, :-1]], dim=1)  # h_{t-1}
        g = dy_k[..., None] * C_k[:, :, None, :]
        g[:, -1] += dh
        g = _scan_backwards(torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1), g)
        dh = decay[:, 0] * g[:, 0]

        through = g * decay * before  # by delta_t A
        dA += (through * delta_k[..., None]).sum((0, 1))
        by_input = torch.matmul(g, B_k[..., None])[..., 0]  # (B, L, E), by delta_t u_t
        ddelta[:, now] = (through * A).sum(-1) + by_input * u_k
        du[:, now] = by_input * delta_k + D * dy_k
        dB[:, now] = (g * (delta_k * u_k)[..., None]).sum(2)
        dC[:, now] = (states * dy_k[..., None]).sum(2)
        dD += (dy_k * u_k).sum((0, 1))
    return du, ddelta, dA, dB, dC, dD, dh


def between_shape(u: Tensor, A: Tensor, chunk: int, keep: bool) -> tuple[int, ...]:
    """Shape (B, K, N, E) of the states before each chunk; channels are last, so that the GPU reads contiguous
    memory."""
    chunks = -(-u.shape[1] // chunk) if keep else 0
    return u.shape[0], chunks, A.shape[1], A.shape[0]
