"""The backends of the gated short convolution, and which of them serves a call.

    triton          the kernels of `gated_triton`, forward and backward, in training on a GPU
    causal-conv1d   the package, where it is installed, on a GPU (`causal_conv1d`)
    pytorch         shifted products in PyTorch (`gated_pytorch`), anywhere

Shapes: B batch, N packed sequences, T tokens, E channels, K taps.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor, nn

from jrt.ops import causal_conv1d, checks
from jrt.ops.convolution_call import Call
from jrt.ops.registration import without_rule

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("causal-conv1d", "triton", "pytorch")
# With a gate and a projection the Triton kernels come first, because they compute all three in one pass over memory: in
# training they take half the time of separate kernels for the convolution (benchmarks/layers.py).
GATED_BACKENDS = ("triton", "causal-conv1d", "pytorch")


def choose(call: Call, backend: str | None) -> str:
    """The backend that was asked for, or the first that serves the call.

    Raises:
        ValueError: the arguments do not fit, there is no such backend, or it cannot serve the call.
    """
    checks.convolution(*call[:6])
    if backend is None:
        order = BACKENDS if call.linear is None else GATED_BACKENDS
        return next(name for name in order if unsupported(name, call) is None)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {BACKENDS}, or None for the fastest")
    if reason := unsupported(backend, call):
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend


def unsupported(backend: str, call: Call) -> str | None:
    """The reason why a backend cannot serve the call; None if it can."""
    if backend == "triton":
        return _triton_unsupported(call)
    return causal_conv1d.unsupported(call) if backend == "causal-conv1d" else None


def _triton_unsupported(call: Call) -> str | None:
    """Never imports triton."""
    if call.linear is not None and not is_plain(call.linear):
        return "the projection is not a plain nn.Linear without hooks, so it has to be called"
    given = (call.u, call.weight, call.bias, call.state, *(() if call.linear is None else call.linear.parameters()))
    return fusion_unsupported(*given)


def fusion_unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    """The reason why the Triton kernels of SwiGLU and convolution cannot serve inputs like x, with other tensors of any
    kind; None if they can."""
    if not INSTALLED:
        return "triton is not installed"
    if not (x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")):
        return f"tensors are on {x.device}; expected a CUDA device"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}: expected bfloat16, float16 or float32"
    if not (x.requires_grad and torch.is_grad_enabled()):
        return "no gradient is wanted, and the kernels are for training"
    return without_rule(tensor for tensor in (x, *others) if tensor is not None)


def is_plain(linear: nn.Module) -> bool:
    """Whether the module is an nn.Linear that nobody has changed, so that it can be replaced by `F.linear`.

    Others have hooks, a forward of their own (accelerate, which loads the weights in it), or weights of another class
    (quantised ones)."""
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return False
    return type(linear.weight) in (nn.Parameter, Tensor)
