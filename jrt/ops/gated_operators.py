"""The Triton kernels of `gated_triton` as torch operators, with the projection after them (see `jrt.ops.gated`).

Only the input is saved for the backward pass, which computes the product with the gate again for the gradient of the
projection's weight. `gated_triton` imports triton, so it is imported where it is called.

Shapes: B batch, T tokens, E channels, M hidden units, K taps, O outputs of the next projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops.registration import register


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
    x: Tensor, taps: Tensor, tap_bias: Tensor | None, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None
) -> Tensor:
    """starts: (T,) int32, the first token of each token's packed sequence; None: each row is one text."""
    from jrt.ops import gated_triton

    return _linear(gated_triton.convolution(x, taps, tap_bias, starts, is_gated=True), weight, bias)


def _gated_convolution_linear_fake(x, taps, tap_bias, weight, bias, starts=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _gated_convolution_linear_backward(
    x: Tensor, taps: Tensor, tap_bias: Tensor | None, weight: Tensor, starts: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, taps, tap_bias (fp32) and weight."""
    from jrt.ops import gated_triton

    with torch.autocast(x.device.type, enabled=False):
        by_product = dy @ weight
        dx, dtaps, dbias, product = gated_triton.convolution_backward(
            x, taps, tap_bias, by_product, starts, is_gated=True
        )
        assert product is not None
        return dx, dtaps, dbias, _weight_gradient(dy, product)


def _gated_convolution_linear_backward_fake(x, taps, tap_bias, weight, starts, dy):
    dtaps = taps.new_empty(taps.shape, dtype=torch.float32)
    return x.new_empty(x.shape), dtaps, dtaps.new_empty(taps.shape[0]), weight.new_empty(weight.shape)


def _silu_convolution(u: Tensor, taps: Tensor, tap_bias: Tensor | None, starts: Tensor | None = None) -> Tensor:
    from jrt.ops import gated_triton

    return gated_triton.convolution(u, taps, tap_bias, starts, is_gated=False)


def _silu_convolution_fake(u: Tensor, taps: Tensor, tap_bias: Tensor | None, starts: Tensor | None = None) -> Tensor:
    return u.new_empty(u.shape)


def _silu_convolution_backward(
    u: Tensor, taps: Tensor, tap_bias: Tensor | None, starts: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, taps and tap_bias, the last two in fp32."""
    from jrt.ops import gated_triton

    return gated_triton.convolution_backward(u, taps, tap_bias, dy, starts, is_gated=False)[:3]


def _silu_convolution_backward_fake(u, taps, tap_bias, starts, dy):
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
    x, taps, tap_bias, weight, bias, starts = inputs
    ctx.save_for_backward(x, taps, tap_bias, weight, starts)
    ctx.has_bias = bias is not None


def _convolution_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias, _, _ = ctx.saved_tensors
    dx, dtaps, dtap_bias, dweight = torch.ops.jrt.gated_convolution_linear_backward(*ctx.saved_tensors, dy)
    own = None if tap_bias is None else dtap_bias.to(tap_bias.dtype)
    return dx, dtaps.to(taps.dtype), own, dweight, _bias_gradient(dy) if ctx.has_bias else None, None


def _save_silu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _silu_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias, _ = ctx.saved_tensors
    du, dtaps, dtap_bias = torch.ops.jrt.silu_convolution_backward(*ctx.saved_tensors, dy)
    return du, dtaps.to(taps.dtype), None if tap_bias is None else dtap_bias.to(tap_bias.dtype), None


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
    f"(Tensor x, {_TAPS}, Tensor weight, Tensor? bias, Tensor? starts=None) -> Tensor",
    _gated_convolution_linear,
    _gated_convolution_linear_fake,
)
register(
    "gated_convolution_linear_backward",
    f"(Tensor x, {_TAPS}, Tensor weight, Tensor? starts, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    _gated_convolution_linear_backward,
    _gated_convolution_linear_backward_fake,
)
register(
    "silu_convolution",
    f"(Tensor u, {_TAPS}, Tensor? starts=None) -> Tensor",
    _silu_convolution,
    _silu_convolution_fake,
)
register(
    "silu_convolution_backward",
    f"(Tensor u, {_TAPS}, Tensor? starts, Tensor dy) -> (Tensor, Tensor, Tensor)",
    _silu_convolution_backward,
    _silu_convolution_backward_fake,
)
torch.library.register_autograd("jrt::swiglu_linear", _swiglu_gradients, setup_context=_save_swiglu)
torch.library.register_autograd(
    "jrt::gated_convolution_linear", _convolution_gradients, setup_context=_save_convolution
)
torch.library.register_autograd("jrt::silu_convolution", _silu_gradients, setup_context=_save_silu)
