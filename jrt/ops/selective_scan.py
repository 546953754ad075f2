"""Selective scan: the recurrence of Mamba (arXiv 2312.00752, equation 2 with the discretisation of its section 3).

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t          y_t = (C_t . h_t + D u_t) silu(z_t)

Shapes: B batch, T steps, E channels, N states a channel, K chunks, L steps of a chunk. Five backends compute it:
"reference" is the loop over t and the definition; "chunked" is PyTorch with scratch memory that does not grow with T;
"triton" and "cuda" are the GPU kernels of `selective_scan_triton` and `selective_scan_cuda`; "mamba-ssm" is the package
of Mamba's authors, where it is installed (`mamba_ssm`). All but the first are custom operators, so that torch.compile
sees a single node. The three of this project save only the states between chunks, and compute the others again in the
backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops import checks, mamba_ssm, selective_scan_cuda
from jrt.ops.call import ScanCall
from jrt.ops.choice import choose as choose_backend
from jrt.ops.packages import triton_unavailable
from jrt.ops.registration import refuse_second_derivative, register, without_rule
from jrt.ops.selective_scan_pytorch import CHUNK as PYTORCH_CHUNK
from jrt.ops.selective_scan_pytorch import between_shape, chunked_backward, chunked_forward, state_dtype, stepwise

BACKENDS = ("reference", "chunked", "triton", "cuda", "mamba-ssm")
CHUNK = {"chunked": PYTORCH_CHUNK, "triton": 16}  # steps between two states kept for the backward


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    delta_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t + D u_t (arXiv 2312.00752, eq. 2),
    and multiplies y_t by silu(z_t) if there is a gate z (its figure 3).

    Args:
        u: input `(B, T, E)`.
        delta: step size `(B, T, E)`, at least 0 (after softplus). A step with delta = 0 leaves the state as it was, so
            padding is delta = 0.
        A: decay rates `(E, N)`, negative, fp32.
        B, C: input and output coefficients `(B, T, N)`.
        D: skip weights `(E,)`, or None for no skip.
        delta_bias: `(E,)`; the step size is then softplus(delta + delta_bias), and padding is delta = -inf. None: the
            step size is delta.
        initial_state: state before the first step `(B, E, N)`; None is zero.
        gate: z `(B, T, E)`; None: y is not multiplied.
        backend: "reference" (loop over T), "chunked" (PyTorch, any device), "triton" (GPU), "cuda" (Hopper GPU, built
            kernels) or "mamba-ssm" (the package, GPU); None takes the last of these that serves the call.

    Returns:
        y `(B, T, E)` in u's dtype, and the state after the last step `(B, E, N)` in fp32 (fp64 when an input is fp64).
        Sums run in the state's dtype whatever the inputs' dtypes are, which may differ from each other.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the backend asked for cannot serve the call. Only
            "reference" has second and forward-mode derivatives; None takes it for the latter.
    """
    call = ScanCall(u, delta, A, B, C, D, delta_bias, initial_state, gate)
    checks.selective_scan(*call)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in call.tensors())
    chosen = choose(call, backend)
    if chosen == "mamba-ssm":
        return mamba_ssm.selective_scan(u, delta, A, B, C, D, delta_bias, gate)
    if chosen == "cuda":
        return selective_scan_cuda.selective_scan(*call, keep)
    if delta_bias is not None:
        delta = F.softplus(delta.to(state_dtype(*call)) + delta_bias)
    inputs = (u, delta, A, B, C, D, initial_state)
    if chosen == "reference" or (u.shape[1] == 1 and chosen == "chunked"):  # one step is the definition itself
        y, state = stepwise(*inputs)
    else:
        y, state, _ = torch.ops.jrt.selective_scan(*inputs, chosen, keep)
    return y if gate is None else y * F.silu(gate), state


def choose(call: ScanCall, backend: str | None) -> str:
    """The backend that was asked for, or the fastest that serves the call; raises ValueError as
    `jrt.ops.choice.choose`."""
    order = tuple(reversed(BACKENDS))
    if call.u.shape[1] == 1:
        order = ("chunked", *order)
    return choose_backend(backend, order, lambda name: unsupported(name, call))


def unsupported(backend: str, call: ScanCall) -> str | None:
    """The reason why a backend cannot serve the call; None if it can. Never imports triton."""
    if backend == "mamba-ssm":
        return mamba_ssm.unsupported(call)
    if backend == "cuda":
        return selective_scan_cuda.unsupported(call)
    if backend == "reference" or (backend == "chunked" and call.u.shape[1] == 1):
        return None
    if backend == "triton":
        if reason := triton_unavailable(call.u):
            return f"{reason}; use 'chunked'"
        if any(x.dtype == torch.float64 for x in call._replace(gate=None).tensors()):
            return "it computes in fp32 and an input is fp64; use 'chunked'"
    return without_rule(call.tensors())


# ---- the operator, forward and backward.


def _forward(u, delta, A, B, C, D, initial_state, backend: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        if backend == "triton":
            from jrt.ops import selective_scan_triton

            y, state, between = selective_scan_triton.forward(u, delta, A, B, C, D, initial_state, CHUNK["triton"])
            return y, state, between if keep else between.new_empty(between_shape(u, A, CHUNK[backend], keep))
        return chunked_forward(u, delta, A, B, C, D, initial_state, keep)


def _forward_fake(u, delta, A, B, C, D, initial_state, backend: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(u, delta, A, B, C, D, initial_state)
    state = u.new_empty((u.shape[0], *A.shape), dtype=dtype)
    return u.new_empty(u.shape), state, u.new_empty(between_shape(u, A, CHUNK[backend], keep), dtype=dtype)


def _backward(u, delta, A, B, C, D, between, dy, dstate, backend: str) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, initial_state; those of A, D and initial_state in the state's dtype."""
    with torch.autocast(u.device.type, enabled=False):
        if backend == "triton":
            from jrt.ops import selective_scan_triton

            return selective_scan_triton.backward(u, delta, A, B, C, D, between, dy, dstate, CHUNK["triton"])
        return chunked_backward(u, delta, A, B, C, D, between, dy, dstate)


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
refuse_second_derivative("selective_scan_backward", "the op with backend='reference'")
torch.library.register_autograd("jrt::selective_scan", _gradients, setup_context=_save)
