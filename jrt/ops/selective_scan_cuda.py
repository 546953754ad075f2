"""The CUDA kernels of the selective scan (kernels/selective_scan.cu) as torch operators, forward and backward.

The kernels compute the softplus of the step sizes themselves, so that they can read these in the inputs' dtype. The
states between chunks of 16 steps are saved for the backward pass, which computes the others again. Results are bit for
bit reproducible.

Shapes: B batch, T steps, E channels, N = 16 states a channel, K chunks, S segments, P slices of 128 channels
(backward).
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import extension
from jrt.ops.call import ScanCall
from jrt.ops.extension import address, dtype_name
from jrt.ops.registration import refuse_second_derivative, register, without_rule

STATES, STEPS = 16, 16  # N; steps of a chunk
FORWARD_WIDTH, BACKWARD_WIDTH = 32, 128  # channels of a block
# Blocks for each multiprocessor, into which the texts are cut: as many as it holds at a time.
FORWARD_BLOCKS, BACKWARD_BLOCKS = 6, 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(call: ScanCall) -> str | None:
    """The reason why the kernels cannot serve the call; None if they can."""
    u, delta, A, B, C, *_, gate = call
    if u.device.type != "cuda":
        return f"tensors are on {u.device}; expected a CUDA device"
    if reason := extension.missing(u.device.index):
        return reason
    if A.shape[1] != STATES:
        return f"{A.shape[1]} states a channel: the kernels are built for {STATES}"
    if u.dtype not in DTYPES or any(x.dtype != u.dtype for x in (delta, B, C)):
        kinds = ", ".join(str(x.dtype) for x in (u, delta, B, C))
        return f"u, delta, B and C are {kinds}: expected one of float32, bfloat16 and float16 for all four"
    if gate is not None and gate.dtype != u.dtype:
        return f"the gate is {gate.dtype}: expected the inputs' {u.dtype}"
    if any(x.dtype == torch.float64 for x in call.tensors()):
        return "they compute in fp32 and an input is fp64"
    if u.shape[0] > 65535 or u.shape[1] >= 2**31 - STEPS:
        return "the text or the batch is too large for one launch"
    return without_rule(call.tensors())


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    gate: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """`jrt.ops.selective_scan`, for inputs for which `unsupported` returns None.

    keep: save what a gradient needs, because one will be computed."""
    y, state, _, _ = torch.ops.jrt.selective_scan_cuda(u, delta, A, B, C, D, delta_bias, initial_state, gate, keep)
    return y, state


def segments(u: Tensor, width: int, blocks: int) -> int:
    """Number of segments into which each text is cut, so that there are about `blocks` blocks of `width` channels for
    each multiprocessor."""
    count = torch.cuda.get_device_properties(u.device).multi_processor_count * blocks
    return max(1, min(count // (u.shape[0] * slices(u, width)), -(-u.shape[1] // STEPS)))


def slices(u: Tensor, width: int) -> int:
    """Number of slices of `width` channels."""
    return -(-u.shape[2] // width)


# ---- the operators


def _forward(
    u, delta, A, B, C, D, delta_bias, initial_state, gate, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the state after the last step, the states before each chunk, and y before the gate; the last two if kept."""
    u, delta, B, C, gate = u.contiguous(), delta.contiguous(), _rows(B), _rows(C), _gate(gate)
    y, end, between, plain = _forward_fake(u, delta, A, B, C, D, delta_bias, initial_state, gate, keep)
    start = None if initial_state is None else initial_state.float().contiguous()
    kept = plain if plain.numel() else None
    with _Launch(u, delta, A, B, C, D, delta_bias, gate, kept, FORWARD_WIDTH, FORWARD_BLOCKS) as launch:
        states = launch.states(start, end, between if keep else None)
        launch.kernels.scan_forward(
            launch.inputs, launch.strides, states, launch.sizes, launch.dtype, y.data_ptr(), launch.stream
        )
    return y, end, between, plain


def _forward_fake(
    u, delta, A, B, C, D, delta_bias, initial_state, gate, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    end = torch.empty(u.shape[0], *A.shape, dtype=torch.float32, device=u.device)
    chunks = -(-u.shape[1] // STEPS) if keep else 0
    between = torch.empty(u.shape[0], chunks, STATES, u.shape[2], dtype=torch.float32, device=u.device)
    return u.new_empty(u.shape), end, between, u.new_empty(u.shape if keep and gate is not None else 0)


def _backward(u, delta, A, B, C, D, delta_bias, gate, between, plain, dy, dstate) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias, initial_state and gate; those of A, D, bias and state in fp32."""
    u, delta, dy, B, C, gate = u.contiguous(), delta.contiguous(), dy.contiguous(), _rows(B), _rows(C), _gate(gate)
    batch, steps, channels = u.shape
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dgate = u.new_empty(u.shape if gate is not None else 0)
    with _Launch(u, delta, A, B, C, D, delta_bias, gate, plain, BACKWARD_WIDTH, BACKWARD_BLOCKS) as launch:
        parts = launch.segments

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        dA, dD, dbias, dinitial = empty(*A.shape), empty(channels), empty(channels), empty(batch, channels, STATES)
        dB, dC = (u.new_empty(batch, steps, STATES) for _ in range(2))
        of_segments = empty(batch, parts, STATES + 2, channels)
        of_steps = empty(2, slices(u, BACKWARD_WIDTH), batch, between.shape[1] * STEPS, STATES)
        states = launch.states(dstate.float().contiguous(), dinitial, between)
        tensors = (dy, du, ddelta, dA, dD, dbias, dB, dC, dgate, of_segments, of_steps)
        gradients = [x.data_ptr() for x in tensors]
        launch.kernels.scan_backward(
            launch.inputs, launch.strides, states, launch.sizes, launch.dtype, gradients, launch.stream
        )
    return du, ddelta, dA, dB, dC, dD, dbias, dinitial, dgate


def _backward_fake(u, delta, A, B, C, D, delta_bias, gate, between, plain, dy, dstate) -> tuple[Tensor, ...]:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    channels = u.shape[2]
    du, ddelta, dB, dC = (x.new_empty(x.shape) for x in (u, delta, B, C))
    dgate = u.new_empty(u.shape if gate is not None else 0)
    return (
        du, ddelta, empty(*A.shape), dB, dC, empty(channels), empty(channels), empty(u.shape[0], *A.shape), dgate,
    )  # fmt: skip


class _Launch:
    """The arguments that forward and backward kernels share.

    It holds the tensors whose addresses are passed, so that they are not freed before the kernels are launched. As a
    context manager it selects their device."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, gate, plain, width: int, blocks: int) -> None:
        rates = A.float().contiguous()
        skip = rates.new_zeros(u.shape[2]) if D is None else D.float().contiguous()
        bias = None if delta_bias is None else delta_bias.float().contiguous()
        self.kernels, self.segments = extension.module(), segments(u, width, blocks)
        self.tensors = [u, delta, bias, rates, B, C, skip, gate, plain]
        self.inputs = [address(x) for x in self.tensors]
        self.strides = [B.stride(0), B.stride(1), C.stride(0), C.stride(1), 0 if gate is None else gate.stride(1)]
        self.sizes = [*u.shape, self.segments]
        self.dtype = dtype_name(u.dtype)
        self.stream = torch.cuda.current_stream(u.device).cuda_stream
        self.device = torch.cuda.device_of(u)

    def states(self, start: Tensor | None, end: Tensor, between: Tensor | None) -> list[int]:
        batch, _, channels, parts = self.sizes
        local, spans = end.new_empty(batch, parts, STATES, channels), end.new_empty(batch, parts, channels)
        found = [start, end, between, local, spans]
        self.tensors += found
        return [address(x) for x in found]

    def __enter__(self) -> _Launch:
        self.device.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.device.__exit__(*error)


def _rows(x: Tensor) -> Tensor:
    """B or C with the N numbers of a step contiguous; copied if necessary."""
    return x if x.stride(2) == 1 else x.contiguous()


def _gate(gate: Tensor | None) -> Tensor | None:
    """The gate with one stride between all its B T rows, as a slice of a wider tensor has; copied if necessary."""
    if gate is None or (gate.stride(2) == 1 and gate.stride(0) == gate.shape[1] * gate.stride(1)):
        return gate
    return gate.contiguous()


def _save(ctx, inputs, output) -> None:
    *tensors, initial_state, gate, _ = inputs
    _, _, between, plain = output
    ctx.save_for_backward(*tensors, gate, between, plain)
    ctx.state_dtype = None if initial_state is None else initial_state.dtype


def _gradients(ctx, dy: Tensor, dstate: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    _, _, A, _, _, D, bias, gate, _, _ = ctx.saved_tensors
    found = torch.ops.jrt.selective_scan_cuda_backward(*ctx.saved_tensors, dy, dstate)
    du, ddelta, dA, dB, dC, dD, dbias, dh, dgate = found
    dD = None if D is None else dD.to(D.dtype)
    dbias = None if bias is None else dbias.to(bias.dtype)
    dh = None if ctx.state_dtype is None else dh.to(ctx.state_dtype)
    return du, ddelta, dA.to(A.dtype), dB, dC, dD, dbias, dh, None if gate is None else dgate, None


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
register(
    "selective_scan_cuda",
    f"({_INPUTS}, Tensor? initial_state, Tensor? gate, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
register(
    "selective_scan_cuda_backward",
    f"({_INPUTS}, Tensor? gate, Tensor between, Tensor plain, Tensor dy, Tensor dstate)"
    f" -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _backward_fake,
)
refuse_second_derivative("selective_scan_cuda_backward", "the op with backend='reference'")
torch.library.register_autograd("jrt::selective_scan_cuda", _gradients, setup_context=_save)
