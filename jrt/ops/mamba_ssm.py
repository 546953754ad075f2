"""The selective scan by the package mamba-ssm (https://github.com/state-spaces/mamba), where it is installed.

Its function has texts as (B, E, T) with the steps contiguous, so inputs and outputs are transposed in memory. It starts
from a zero state. Its operator here saves the inputs alone: the backward pass calls the function again, so that
torch.compile sees two nodes and no code of the package. The package ignores the gradient of the last state, which the
chunked backend computes where there is one.

The adapter is written to the signature and the checks of version 2.3. It is tested with a stand-in that computes the
same in PyTorch (tests/test_optional_packages.py); the package's own kernels have not been run, or measured.

Shapes: B batch, T steps, E channels, N states a channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops import packages
from jrt.ops.call import ScanCall
from jrt.ops.registration import register

PACKAGE, MODULE, NAME = "mamba-ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STATES = 256


def unsupported(call: ScanCall) -> str | None:
    """The reason why the package cannot serve the call; None if it can."""
    u, delta, A, B, C, _, _, initial_state, gate = call
    if reason := packages.unavailable(PACKAGE, MODULE, NAME, call):
        return reason
    if initial_state is not None:
        return "it starts from a zero state, and initial_state is given"
    if u.dtype not in DTYPES or any(x is not None and x.dtype != u.dtype for x in (delta, B, C, gate)):
        kinds = ", ".join(str(x.dtype) for x in (u, delta, B, C, gate) if x is not None)
        return f"u, delta, B, C and the gate are {kinds}: expected one of float32, bfloat16 and float16 for all"
    if any(x.dtype == torch.float64 for x in call.tensors()):
        return "it computes in fp32 and an input is fp64"
    if A.shape[1] > MOST_STATES:
        return f"{A.shape[1]} states a channel: expected at most {MOST_STATES}"
    return packages.unordered_sums(PACKAGE, call)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`jrt.ops.selective_scan`, for inputs for which `unsupported` returns None."""
    y, state = torch.ops.jrt.selective_scan_mamba_ssm(u, delta, A, B, C, D, delta_bias, gate)
    if torch.compiler.is_compiling():  # it compiles no second derivatives
        return y, state
    instead = "the op with backend='reference'"
    return packages.once_differentiable(y, instead), packages.once_differentiable(state, instead)


# ---- the operators


def _forward(u, delta, A, B, C, D, delta_bias, gate) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y, state = _call_package(_package_inputs(u, delta, A, B, C, D, delta_bias, gate))
    return y.mT.contiguous(), state.float().contiguous()


def _forward_fake(u, delta, A, B, C, D, delta_bias, gate) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)


def _backward(u, delta, A, B, C, D, delta_bias, gate, dy) -> tuple[Tensor, ...]:
    """Gradients of all inputs, empty for those that are None; those of A, D and delta_bias in fp32."""
    given = [None if x is None else x.requires_grad_() for x in _package_inputs(u, delta, A, B, C, D, delta_bias, gate)]
    with torch.enable_grad():
        y, _ = _call_package(given)
    leaves = [x for x in given if x is not None]
    found = iter(torch.autograd.grad(y, leaves, dy.mT.contiguous()))
    gradients = [u.new_empty(0) if x is None else next(found) for x in given]
    return tuple(x.mT.contiguous() if x.ndim == 3 else x for x in gradients)


def _backward_fake(u, delta, A, B, C, D, delta_bias, gate, dy) -> tuple[Tensor, ...]:
    weights = [u.new_empty(0) if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in (A, D, delta_bias)]
    du, ddelta, dB, dC = (x.new_empty(x.shape) for x in (u, delta, B, C))
    dgate = u.new_empty(0 if gate is None else gate.shape)
    return du, ddelta, weights[0], dB, dC, weights[1], weights[2], dgate


def _package_inputs(u, delta, A, B, C, D, delta_bias, gate) -> list[Tensor | None]:
    """The inputs as the package wants them, detached: texts (B, E, T) or (B, N, T), weights in fp32."""

    def text(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().mT.contiguous()

    def weight(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().float().contiguous()

    return [text(u), text(delta), weight(A), text(B), text(C), weight(D), weight(delta_bias), text(gate)]


def _call_package(inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """y (B, E, T) and the last state (B, E, N)."""
    u, delta, A, B, C, D, delta_bias, gate = inputs
    assert u is not None
    with torch.autocast(u.device.type, enabled=False):
        return packages.function(MODULE, NAME)(
            u, delta, A, B, C, D, z=gate, delta_bias=delta_bias, delta_softplus=delta_bias is not None,
            return_last_state=True,
        )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)  # the state's gradient is None in a model's training


def _gradients(ctx, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    u, delta, A, B, C, _, delta_bias, _ = inputs
    found = torch.ops.jrt.selective_scan_mamba_ssm_backward(*inputs, torch.zeros_like(u) if dy is None else dy)
    gradients: list[Tensor | None] = [
        None if x is None else gradient.to(x.dtype) for x, gradient in zip(inputs, found, strict=True)
    ]
    if dstate is not None:
        for index, more in _state_gradients(u, delta, A, B, C, delta_bias, dstate).items():
            before = gradients[index]
            assert before is not None
            gradients[index] = before + more.to(before.dtype)
    return tuple(gradients)


def _state_gradients(u, delta, A, B, C, delta_bias, dstate) -> dict[int, Tensor]:
    """Gradients through the last state, by the input's place in the operator. C, D and the gate have none."""
    wide = delta.float()
    steps = wide if delta_bias is None else F.softplus(wide + delta_bias.float())
    _, _, between = torch.ops.jrt.selective_scan(u, steps, A, B, C, None, None, "chunked", True)
    no_skip, no_output = A.new_zeros(A.shape[0]), torch.zeros_like(u)
    du, dsteps, dA, dB, _, _, _ = torch.ops.jrt.selective_scan_backward(
        u, steps, A, B, C, no_skip, between, no_output, dstate, "chunked"
    )
    if delta_bias is None:
        return {0: du, 1: dsteps, 2: dA, 3: dB}
    ddelta = dsteps * torch.sigmoid(wide + delta_bias.float())
    return {0: du, 1: ddelta, 2: dA, 3: dB, 6: ddelta.sum((0, 1))}


_INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? gate"
register("selective_scan_mamba_ssm", f"({_INPUTS}) -> (Tensor, Tensor)", _forward, _forward_fake)
register(
    "selective_scan_mamba_ssm_backward",
    f"({_INPUTS}, Tensor dy) -> ({', '.join(['Tensor'] * 8)})",
    _backward,
    _backward_fake,
)
torch.library.register_autograd("jrt::selective_scan_mamba_ssm", _gradients, setup_context=_save)
