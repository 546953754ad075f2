"""Element-wise operations fused with the projection after them: SwiGLU, and the gated short convolution.

As separate PyTorch operations, each of which reads and writes memory, they take a third of a training step. So in
training on a GPU they are Triton kernels that read each input once, forward and backward. Only the input is saved for
the backward pass, which computes the product with the gate again for the gradient of the projection's weight. All other
calls are plain PyTorch (`gated_pytorch`). The kernels serve compiled training too: PyTorch's compiled SwiGLU is as fast
(benchmarks/layers.py), but keeps one more tensor of each layer, and a whole step takes longer.

Shapes: B batch, T tokens, E channels, M hidden units, K taps, N = B x T tokens, O outputs of the next projection.
"""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jrt.ops import gated_pytorch
from jrt.ops.registration import register

INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """linear(value * silu(gate)) for x = [value, gate].

    Args:
        x: (..., 2 M).
        linear: the projection from M units; if it has hooks or is a subclass of nn.Linear, it is called as a module.
    """
    if not (_fuses(x) and _is_plain(linear)):
        return gated_pytorch.swiglu_linear(x, linear)
    return torch.ops.jrt.swiglu_linear(x, *_weights(linear, x))


def gated_convolution_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    linear: nn.Module,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """linear(silu(conv(u)) * gate) for x = [u, gate], and the state after the last token.

    Args:
        x: (B, T, 2 E).
        weight: (E, K) taps; bias: (E,) or None.
        linear: the projection from E channels; if it has hooks or is a subclass of nn.Linear, it is called as a module.
        state: (B, K - 1, E) inputs before x; None: zeros.
        mask: (B, T) bool, False where a token is padding; None: no padding.

    Returns:
        The outputs (B, T, O), and the last K - 1 inputs of the convolution (B, K - 1, E).
    """
    if state is not None or mask is not None or not (_fuses(x) and _is_plain(linear)):
        return gated_pytorch.gated_convolution_linear(x, weight, bias, linear, state, mask)
    y = torch.ops.jrt.gated_convolution_linear(x, weight, bias, *_weights(linear, x))
    return y, _last_inputs(x[..., : weight.shape[0]], weight.shape[1])


def silu_convolution(
    u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(conv(u)) (B, T, E) for u (B, T, E), and the state; other arguments as in `gated_convolution_linear`."""
    if state is not None or mask is not None or not _fuses(u):
        return gated_pytorch.silu_convolution(u, weight, bias, state, mask)
    return torch.ops.jrt.silu_convolution(u, weight, bias), _last_inputs(u, weight.shape[1])


def _fuses(x: Tensor) -> bool:
    """Whether the Triton kernels serve this input: in training, on a GPU. Never imports triton."""
    on_device = x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return INSTALLED and on_device and x.dtype in DTYPES and x.requires_grad and torch.is_grad_enabled()


def _is_plain(linear: nn.Module) -> bool:
    """Whether the module is an nn.Linear without hooks, so that it can be replaced by `F.linear`."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


def _weights(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of x, which under autocast is the half-precision one."""
    assert isinstance(linear, nn.Linear)
    bias = linear.bias
    return linear.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _last_inputs(u: Tensor, taps: int) -> Tensor:
    """The last `taps` - 1 inputs (B, taps - 1, E); zeros come first if the text is shorter."""
    return F.pad(u[:, max(0, u.shape[1] - taps + 1) :], (0, 0, max(0, taps - 1 - u.shape[1]), 0))


# ---- the operators. `gated_triton` imports triton, so it is imported where it is called.


def _swiglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from jrt.ops import gated_triton

    return _linear(gated_triton.swiglu(x), weight, bias)


def _swiglu_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _swiglu_linear_backward(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    from jrt.ops import gated_triton

    with torch.autocast(x.device.type, enabled=False):
        dx, product = gated_triton.swiglu_backward(x, dy @ weight)
        return dx, _weight_gradient(dy, product)


def _swiglu_linear_backward_fake(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _gated_convolution_linear(
    x: Tensor, taps: Tensor, tap_bias: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    from jrt.ops import gated_triton

    return _linear(gated_triton.convolution(x, taps, tap_bias, is_gated=True), weight, bias)


def _gated_convolution_linear_fake(x, taps, tap_bias, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _gated_convolution_linear_backward(
    x: Tensor, taps: Tensor, tap_bias: Tensor | None, weight: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, taps, tap_bias (fp32) and weight."""
    from jrt.ops import gated_triton

    with torch.autocast(x.device.type, enabled=False):
        dx, dtaps, dbias, product = gated_triton.convolution_backward(x, taps, tap_bias, dy @ weight, is_gated=True)
        assert product is not None
        return dx, dtaps, dbias, _weight_gradient(dy, product)


def _gated_convolution_linear_backward_fake(x, taps, tap_bias, weight, dy):
    dtaps = taps.new_empty(taps.shape, dtype=torch.float32)
    return x.new_empty(x.shape), dtaps, dtaps.new_empty(taps.shape[0]), weight.new_empty(weight.shape)


def _silu_convolution(u: Tensor, taps: Tensor, tap_bias: Tensor | None) -> Tensor:
    from jrt.ops import gated_triton

    return gated_triton.convolution(u, taps, tap_bias, is_gated=False)


def _silu_convolution_fake(u: Tensor, taps: Tensor, tap_bias: Tensor | None) -> Tensor:
    return u.new_empty(u.shape)


def _silu_convolution_backward(
    u: Tensor, taps: Tensor, tap_bias: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, taps and tap_bias, the last two in fp32."""
    from jrt.ops import gated_triton

    return gated_triton.convolution_backward(u, taps, tap_bias, dy, is_gated=False)[:3]


def _silu_convolution_backward_fake(u, taps, tap_bias, dy):
    dtaps = taps.new_empty(taps.shape, dtype=torch.float32)
    return u.new_empty(u.shape), dtaps, dtaps.new_empty(taps.shape[0])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """(O, M) from dy (..., O) and x (..., M)."""
    return dy.flatten(0, -2).mT @ x.flatten(0, -2)


def _save_swiglu(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _swiglu_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.jrt.swiglu_linear_backward(*ctx.saved_tensors, dy)
    return dx, dweight, _bias_gradient(dy) if ctx.has_bias else None


def _save_convolution(ctx, inputs, output) -> None:
    *tensors, bias = inputs
    ctx.save_for_backward(*tensors)
    ctx.has_bias = bias is not None


def _convolution_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias, _ = ctx.saved_tensors
    dx, dtaps, dtap_bias, dweight = torch.ops.jrt.gated_convolution_linear_backward(*ctx.saved_tensors, dy)
    own = None if tap_bias is None else dtap_bias.to(tap_bias.dtype)
    return dx, dtaps.to(taps.dtype), own, dweight, _bias_gradient(dy) if ctx.has_bias else None


def _save_silu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _silu_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias = ctx.saved_tensors
    du, dtaps, dtap_bias = torch.ops.jrt.silu_convolution_backward(*ctx.saved_tensors, dy)
    return du, dtaps.to(taps.dtype), None if tap_bias is None else dtap_bias.to(tap_bias.dtype)


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.flatten(0, -2).sum(0)


_TAPS = "Tensor taps, Tensor? tap_bias"
register("swiglu_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _swiglu_linear, _swiglu_linear_fake)
register(
    "swiglu_linear_backward",
    "(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor)",
    _swiglu_linear_backward,
    _swiglu_linear_backward_fake,
)
register(
    "gated_convolution_linear",
    f"(Tensor x, {_TAPS}, Tensor weight, Tensor? bias) -> Tensor",
    _gated_convolution_linear,
    _gated_convolution_linear_fake,
)
register(
    "gated_convolution_linear_backward",
    f"(Tensor x, {_TAPS}, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_convolution_linear_backward,
    _gated_convolution_linear_backward_fake,
)
register("silu_convolution", f"(Tensor u, {_TAPS}) -> Tensor", _silu_convolution, _silu_convolution_fake)
register(
    "silu_convolution_backward",
    f"(Tensor u, {_TAPS}, Tensor dy) -> (Tensor, Tensor, Tensor)",
    _silu_convolution_backward,
    _silu_convolution_backward_fake,
)
torch.library.register_autograd("jrt::swiglu_linear", _swiglu_gradients, setup_context=_save_swiglu)
torch.library.register_autograd(
    "jrt::gated_convolution_linear", _convolution_gradients, setup_context=_save_convolution
)
torch.library.register_autograd("jrt::silu_convolution", _silu_gradients, setup_context=_save_silu)
