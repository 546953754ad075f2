"""Selective scan: the recurrence of Mamba (arXiv 2312.00752, equation 2 with the discretisation of its section 3).

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t          y_t = C_t . h_t + D u_t

Shapes: B batch, T steps, E channels, N states a channel, K chunks, L steps of a chunk.
Three backends compute it: "reference" is the loop above and the truth, "chunked" is PyTorch with memory bounded in T,
and "triton" are the GPU kernels of `selective_scan_triton`. The last two are one custom operator each way, so that
torch.compile sees a single node; both keep only the states between chunks and compute the rest again in the backward.
"""

import importlib.util
import os

import torch
from torch import Tensor

from jrt.ops.registration import register

BACKENDS = ("reference", "chunked", "triton")
CHUNK = {"chunked": 32, "triton": 16}  # steps between two states kept for the backward
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and read y_t = C_t . h_t + D u_t (arXiv 2312.00752, eq. 2).

    Args:
        u: input `(B, T, E)`.
        delta: step size `(B, T, E)`, at least 0 (after softplus). A step with delta = 0 leaves the state as it was, so
            padding is delta = 0.
        A: decay rates `(E, N)`, negative, fp32.
        B, C: input and output coefficients `(B, T, N)`.
        D: skip weights `(E,)`, or None for no skip.
        initial_state: state before the first step `(B, E, N)`; None is zero.
        backend: "reference" (loop over T), "chunked" (PyTorch, any device) or "triton" (GPU); None takes the fastest
            that serves the call.

    Returns:
        y `(B, T, E)` in u's dtype, and the state after the last step `(B, E, N)` in fp32 (fp64 when an input is fp64).
        Sums run in the state's dtype whatever the inputs' dtypes are, which may differ from each other.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend asked for cannot serve the call.
    """
    _check(u, delta, A, B, C, D, initial_state)
    inputs = (u, delta, A, B, C, D, initial_state)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"selective_scan: unknown backend {backend!r}, expected one of {', '.join(BACKENDS)} or None")
    one_step = u.shape[1] == 1
    reason = None if backend in ("reference", "chunked") else triton_unsupported(inputs)
    if backend == "triton" and reason:
        raise ValueError(f"selective_scan: backend 'triton' cannot serve this call: {reason}")
    if backend is None:
        backend = "triton" if u.is_cuda and not one_step and reason is None else "chunked"
    if backend == "reference" or (backend == "chunked" and one_step):  # one step of decoding is the definition itself
        return _reference(*inputs)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, state, _ = torch.ops.jrt.selective_scan(*inputs, backend, keep)
    return y, state


def triton_unsupported(inputs: tuple[Tensor | None, ...]) -> str | None:
    """Why the Triton kernels cannot serve these inputs, or None when they can. Never imports triton."""
    if not TRITON_INSTALLED:
        return "triton is not installed; use 'chunked'"
    if any(x is not None and x.dtype == torch.float64 for x in inputs):
        return "it computes in fp32 and an input is fp64; use 'chunked'"
    if not inputs[0].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors, these are on {inputs[0].device}; use 'chunked'"
    return None


def _check(u, delta, A, B, C, D, initial_state) -> None:
    if u.ndim != 3 or A.ndim != 2:
        found = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan: expected u (B, T, E) and A (E, N), got {found}")
    batch, steps, channels = u.shape
    states = A.shape[1]
    if steps == 0:
        raise ValueError("selective_scan: expected at least one step, got T = 0")
    wanted = {
        "u": (u, (batch, steps, channels)),
        "delta": (delta, (batch, steps, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, steps, states)),
        "C": (C, (batch, steps, states)),
        "D": (D, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    for name, (x, shape) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: expected {name} of shape {shape}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"selective_scan: expected {name} in a floating-point dtype, got {x.dtype}")
        if x.device != u.device:
            raise ValueError(f"selective_scan: expected {name} on u's device {u.device}, got {x.device}")


def _state_dtype(*inputs: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in inputs) else torch.float32


def _cast(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype = _state_dtype(*inputs)
    return tuple(None if x is None else x.to(dtype) for x in inputs)


def _reference(u, delta, A, B, C, D, initial_state) -> tuple[Tensor, Tensor]:
    """The definition, step by step; autograd gives its gradients."""
    dtype = u.dtype
    u, delta, A, B, C, D, h = _cast(u, delta, A, B, C, D, initial_state)
    if h is None:
        h = u.new_zeros(u.shape[0], *A.shape)  # (B, E, N)
    y = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, E, N)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))  # (B, E)
    y = torch.stack(y, dim=1)  # (B, T, E)
    if D is not None:
        y = y + D * u
    return y.to(dtype), h


# ---- "chunked": as many chunks as fit a budget run side by side as lanes, each from zero, position by position; then the
# states are carried from lane to lane and added. Products are of decays only, so that every factor lies in [0, 1] and
# nothing is ever divided by a product that may have vanished.

LANE_ELEMENTS = 1 << 21  # states (B x L x E x N) that the lanes of one segment may hold


def _lanes(batch: int, A: Tensor, steps: int) -> int:
    """Chunks that run side by side: whole ones, at least one."""
    length = CHUNK["chunked"]
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
        for k in range(1, lanes):  # what each lane has to add at its end is all that the next one waits for
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


def _chunked_forward(u, delta, A, B, C, D, initial_state, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _state_dtype(u, delta, A, B, C, D, initial_state)
    A, D, h = (None if x is None else x.to(dtype) for x in (A, D, initial_state))
    batch, steps, length = u.shape[0], u.shape[1], CHUNK["chunked"]
    h = A.new_zeros(batch, *A.shape) if h is None else h  # (B, E, N)
    y = u.new_empty(u.shape)  # (B, T, E)
    between = A.new_empty(_between_shape(u, A, "chunked", keep))  # (B, K, N, E)
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


def _chunked_backward(u, delta, A, B, C, D, between, dy, dstate) -> tuple[Tensor, ...]:
    """Gradients from the last chunk to the first; g (B, L, E, N) is the gradient of the loss by the states h."""
    A, D = (x.to(between.dtype) for x in (A, D))
    steps, length = u.shape[1], CHUNK["chunked"]
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


# ---- the operator, forward and backward.


def _between_shape(u: Tensor, A: Tensor, backend: str, keep: bool) -> tuple[int, ...]:
    """(B, K, N, E): the state before each chunk, channels last so that the GPU reads it in whole lines."""
    chunks = (u.shape[1] + CHUNK[backend] - 1) // CHUNK[backend] if keep else 0
    return u.shape[0], chunks, A.shape[1], A.shape[0]


def _forward(u, delta, A, B, C, D, initial_state, backend: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        if backend == "triton":
            from jrt.ops import selective_scan_triton

            y, state, between = selective_scan_triton.forward(u, delta, A, B, C, D, initial_state, CHUNK["triton"])
            return y, state, between if keep else between.new_empty(_between_shape(u, A, backend, keep))
        return _chunked_forward(u, delta, A, B, C, D, initial_state, keep)


def _forward_fake(u, delta, A, B, C, D, initial_state, backend: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _state_dtype(u, delta, A, B, C, D, initial_state)
    state = u.new_empty((u.shape[0], *A.shape), dtype=dtype)
    return u.new_empty(u.shape), state, u.new_empty(_between_shape(u, A, backend, keep), dtype=dtype)


def _backward(u, delta, A, B, C, D, between, dy, dstate, backend: str) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, initial_state; those of A, D and initial_state in the state's dtype."""
    with torch.autocast(u.device.type, enabled=False):
        if backend == "triton":
            from jrt.ops import selective_scan_triton

            return selective_scan_triton.backward(u, delta, A, B, C, D, between, dy, dstate, CHUNK["triton"])
        return _chunked_backward(u, delta, A, B, C, D, between, dy, dstate)


def _backward_fake(u, delta, A, B, C, D, between, dy, dstate, backend: str) -> tuple[Tensor, ...]:
    du, ddelta, dB, dC = (x.new_empty(x.shape) for x in (u, delta, B, C))
    dA, dD = (x.new_empty(x.shape, dtype=between.dtype) for x in (A, D))
    return du, ddelta, dA, dB, dC, dD, between.new_empty((u.shape[0], *A.shape))


def _save(ctx, inputs, output) -> None:
    u, delta, A, B, C, D, initial_state, ctx.backend, _ = inputs
    _, _, between = output
    ctx.save_for_backward(u, delta, A, B, C, D, between)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _gradients(ctx, dy: Tensor, dstate: Tensor, dbetween: Tensor) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, between = ctx.saved_tensors
    skip = A.new_zeros(A.shape[0]) if D is None else D
    du, ddelta, dA, dB, dC, dD, dh = torch.ops.jrt.selective_scan_backward(
        u, delta, A, B, C, skip, between, dy, dstate, ctx.backend
    )
    dD = None if D is None else dD.to(D.dtype)
    dh = None if ctx.state_dtype is None else dh.to(ctx.state_dtype)
    return du, ddelta, dA.to(A.dtype), dB, dC, dD, dh, None, None


register(
    "selective_scan",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? initial_state, str backend, bool keep)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "selective_scan_backward",
    "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor between, Tensor dy, Tensor dstate,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("jrt::selective_scan", _gradients, setup_context=_save)
