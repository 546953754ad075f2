"""Element-wise operations fused with the projection after them: SwiGLU, and the gated short convolution.

As separate PyTorch operations, each of which reads and writes memory, they take a third of a training step. So in
training on a GPU they are Triton kernels that read each input once, forward and backward (`gated_operators`). The
kernels serve compiled training too: PyTorch's compiled SwiGLU is as fast (benchmarks/layers.py), but keeps one more
tensor of each layer, and a whole step takes longer. Three backends compute the convolution:

    triton          the kernels of `gated_triton`, forward and backward, in training on a GPU
    causal-conv1d   the package, where it is installed, on a GPU (`causal_conv1d`)
    pytorch         shifted products in PyTorch (`gated_pytorch`), anywhere

Shapes: B batch, N packed sequences, T tokens, E channels, M hidden units, K taps, O outputs of the next projection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jrt.ops import causal_conv1d, checks, gated_operators, gated_pytorch  # noqa: F401 - registers operators
from jrt.ops.choice import choose
from jrt.ops.packages import triton_unavailable
from jrt.ops.registration import without_rule
from jrt.ops.short_convolution import last_inputs

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the Triton kernels
BACKENDS = ("causal-conv1d", "triton", "pytorch")
# With a gate and a projection the Triton kernels come first, because they compute all three in one pass over memory: in
# training they take half the time of separate kernels for the convolution (benchmarks/layers.py).
GATED_BACKENDS = ("triton", "causal-conv1d", "pytorch")


class Call(NamedTuple):
    """The arguments of one convolution."""

    u: Tensor  # (B, T, E)
    weight: Tensor  # (E, K)
    bias: Tensor | None  # (E,)
    state: Tensor | None  # (B, K - 1, E), or (N, K - 1, E) for packed sequences
    mask: Tensor | None  # (B, T) bool, False where a token is padding
    cu_seqlens: Tensor | None  # (N + 1,), ends of packed sequences


def swiglu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(value * silu(gate)) for x = [value, gate].

    Args:
        x: (..., 2 M).
        linear: the projection from M units; if it has hooks or is a subclass of nn.Linear, it is called as a module.
    """
    checks.halves(x)
    if not _is_plain(linear) or _fusion_unsupported(x, *linear.parameters()):
        return gated_pytorch.swiglu_linear(x, linear)
    return torch.ops.jrt.swiglu_linear(x, *_weights(linear, x))


def gated_convolution_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear: nn.Module,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """linear(silu(conv(u)) * gate) for x = [u, gate], and the state after the last token.

    Args:
        x: (B, T, 2 E).
        weight: (E, K) taps; bias: (E,) or None.
        linear: the projection from E channels; if it has hooks or is a subclass of nn.Linear, it is called as a module.
        state: (B, K - 1, E) inputs before x; None: zeros.
        mask: (B, T) bool, False where a token is padding; None: no padding.
        cu_seqlens: (N + 1,) int32 or int64, for N sequences packed into one row (B = 1): sequence n has the tokens
            cu_seqlens[n] to cu_seqlens[n + 1] - 1. States are then (N, K - 1, E). On a GPU its values are not checked.
        backend: "triton" (training on a GPU), "causal-conv1d" (the package, on a GPU) or "pytorch"; None takes the
            fastest that can serve the call.

    Returns:
        The outputs (B, T, O), and the last K - 1 inputs of the convolution (B, K - 1, E).

    Raises:
        ValueError: shapes do not fit, or the backend that was asked for cannot serve the call.
    """
    checks.halves(x)
    u, gate = x.chunk(2, dim=-1)  # (B, T, E) each
    call = Call(u, weight, bias, state, mask, cu_seqlens)
    checks.convolution(*call)
    chosen = choose(backend, GATED_BACKENDS, lambda name: unsupported(name, call, linear))
    if chosen == "triton":
        y = torch.ops.jrt.gated_convolution_linear(x, weight, bias, *_weights(linear, x), state, mask, cu_seqlens)
        return y, _state_after(call)
    if chosen == "causal-conv1d":
        c, state = causal_conv1d.silu_convolution(*call)
        return linear(c * gate), state
    return gated_pytorch.gated_convolution_linear(x, weight, bias, linear, state, mask, cu_seqlens)


def silu_convolution(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(conv(u)) (B, T, E) for u (B, T, E), and the state; other arguments as in `gated_convolution_linear`."""
    call = Call(u, weight, bias, state, mask, cu_seqlens)
    checks.convolution(*call)
    chosen = choose(backend, BACKENDS, lambda name: unsupported(name, call))
    if chosen == "triton":
        y = torch.ops.jrt.silu_convolution(u, weight, bias, state, mask, cu_seqlens)
        return y, _state_after(call)
    if chosen == "causal-conv1d":
        return causal_conv1d.silu_convolution(*call)
    return gated_pytorch.silu_convolution(*call)


def unsupported(backend: str, call: Call, linear: nn.Module | None = None) -> str | None:
    """The reason why a backend cannot serve the convolution and the projection after it, if there is one; None if it
    can. Never imports triton."""
    u, weight, bias, state, _, cu_seqlens = call
    if backend == "causal-conv1d":
        return causal_conv1d.unsupported(u, weight, bias, state, cu_seqlens)
    if backend == "pytorch":
        return None
    if linear is not None and not _is_plain(linear):
        return "the projection is not a plain nn.Linear without hooks, so it has to be called"
    return _fusion_unsupported(u, weight, bias, state, *(() if linear is None else linear.parameters()))


def _fusion_unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    """The reason why the Triton kernels of SwiGLU and convolution cannot serve inputs like x, with other tensors of any
    kind; None if they can."""
    if reason := triton_unavailable(x):
        return reason
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: expected bfloat16, float16 or float32"
    if not (x.requires_grad and torch.is_grad_enabled()):
        return "no gradient is wanted, and the kernels are for training"
    return without_rule(tensor for tensor in (x, *others) if tensor is not None)


def _is_plain(linear: nn.Module) -> bool:
    """Whether the module is an nn.Linear that nobody has changed, so that it can be replaced by `F.linear`.

    Others have hooks, a forward of their own (accelerate, which loads the weights in it), or weights of another class
    (quantised ones)."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return False
    return type(linear.weight) in (nn.Parameter, Tensor)


def _weights(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of x, which under autocast is the half-precision one."""
    assert isinstance(linear, nn.Linear)
    bias = linear.bias
    return linear.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _state_after(call: Call) -> Tensor:
    """The last K - 1 inputs, zero where they are padding."""
    u, mask, before = call.u, call.mask, call.weight.shape[1] - 1
    if call.cu_seqlens is None:
        last = slice(max(0, u.shape[1] - before), None)
        u, mask = u[:, last], None if mask is None else mask[:, last]
    if mask is not None:
        u = u.masked_fill(~mask[..., None], 0)
    return last_inputs(u, before + 1, call.state, call.cu_seqlens)
