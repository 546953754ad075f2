"""The Triton kernels of `gated_triton` as torch operators, with the projection after them (see `jrt.ops.gated`).

Only the input is saved for the backward pass, which computes the product with the gate again for the gradient of the
projection's weight. `gated_triton` imports triton, so it is imported where it is called.

Shapes: B batch, N packed sequences (or the B rows), T tokens, E channels, M hidden units, K taps, O outputs of the next
projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jrt.ops.registration import refuse_second_derivative, register


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
    x: Tensor,
    taps: Tensor,
    tap_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    from jrt.ops import gated_triton

    return _linear(gated_triton.convolution(x, taps, tap_bias, state, mask, cu_seqlens, is_gated=True), weight, bias)


def _gated_convolution_linear_fake(x, taps, tap_bias, weight, bias, state=None, mask=None, cu_seqlens=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _gated_convolution_linear_backward(
    x: Tensor,
    taps: Tensor,
    tap_bias: Tensor | None,
    weight: Tensor,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, taps, tap_bias, weight and state; those of taps, tap_bias and state in fp32."""
    from jrt.ops import gated_triton

    text = (x, taps, tap_bias, state, mask, cu_seqlens)
    with torch.autocast(x.device.type, enabled=False):
        by_product = dy @ weight
        dx, dtaps, dbias, product = gated_triton.convolution_backward(*text, by_product, is_gated=True)
        assert product is not None
        return dx, dtaps, dbias, _weight_gradient(dy, product), _state_gradient(*text, by_product)


def _gated_convolution_linear_backward_fake(x, taps, tap_bias, weight, state, mask, cu_seqlens, dy):
    dtaps, dstate = taps.new_empty(taps.shape, dtype=torch.float32), _state_gradient_fake(taps, state)
    return x.new_empty(x.shape), dtaps, dtaps.new_empty(taps.shape[0]), weight.new_empty(weight.shape), dstate


def _silu_convolution(
    u: Tensor,
    taps: Tensor,
    tap_bias: Tensor | None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    from jrt.ops import gated_triton

    return gated_triton.convolution(u, taps, tap_bias, state, mask, cu_seqlens, is_gated=False)


def _silu_convolution_fake(u, taps, tap_bias, state=None, mask=None, cu_seqlens=None):
    return u.new_empty(u.shape)


def _silu_convolution_backward(
    u: Tensor,
    taps: Tensor,
    tap_bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, taps, tap_bias and state, all but the first in fp32."""
    from jrt.ops import gated_triton

    text = (u, taps, tap_bias, state, mask, cu_seqlens)
    du, dtaps, dbias, _ = gated_triton.convolution_backward(*text, dy, is_gated=False)
    return du, dtaps, dbias, _state_gradient(*text, dy)


def _silu_convolution_backward_fake(u, taps, tap_bias, state, mask, cu_seqlens, dy):
    dtaps = taps.new_empty(taps.shape, dtype=torch.float32)
    return u.new_empty(u.shape), dtaps, dtaps.new_empty(taps.shape[0]), _state_gradient_fake(taps, state)


def _state_gradient(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dy: Tensor,
) -> Tensor:
    """The gradient of the state from which a convolution starts, which the kernels leave out.

    Only the first K - 1 outputs of each sequence read the state, so these are computed again.

    Args:
        x: u (B, T, E), or [u, gate] (B, T, 2 E).
        taps, bias, state, mask, cu_seqlens: as in `jrt.ops.silu_convolution`.
        dy: (B, T, E), the gradient of silu(conv(u)), or of silu(conv(u)) * gate.

    Returns:
        (N, K - 1, E) in fp32; empty if there is no state.
    """
    if state is None:
        return _state_gradient_fake(taps, state)
    (channels, count), before, length = taps.shape, state.shape[1], x.shape[1]
    taps, step = taps.float(), torch.arange(before, device=x.device)
    if cu_seqlens is None:
        row, token = torch.arange(x.shape[0], device=x.device)[:, None], step[None]
        inside = (token < length).expand(x.shape[0], -1)  # (N, K - 1)
    else:
        row, token = torch.zeros_like(cu_seqlens[:-1, None]), cu_seqlens[:-1, None] + step
        inside = token < cu_seqlens[1:, None]
    token = token.clamp(max=length - 1)
    first = x[row, token].float()  # (N, K - 1, E or 2 E)
    shown = inside if mask is None else inside & mask[row, token]
    u = torch.where(shown[..., None], first[..., :channels], 0)
    inputs = torch.cat([state.float(), u], 1)  # (N, 2 K - 2, E)
    c = sum((taps[:, k] * inputs[:, k : k + before] for k in range(count)), torch.zeros_like(u))
    c = c if bias is None else c + bias.float()
    share = torch.sigmoid(c)
    by_c = dy[row, token].float() * share * (1 + c * (1 - share))
    if x.shape[2] > channels:
        by_c = by_c * first[..., channels:]
    by_c = torch.where(inside[..., None], by_c, 0)
    gradient = torch.zeros_like(u)
    for t in range(before):  # the output at place t reads the state's inputs from t on
        for i in range(t, before):
            gradient[:, i] += taps[:, i - t] * by_c[:, t]
    return gradient


def _state_gradient_fake(taps: Tensor, state: Tensor | None) -> Tensor:
    return taps.new_empty(0 if state is None else state.shape, dtype=torch.float32)


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
    *tensors, bias, state, mask, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, state, mask, cu_seqlens)
    ctx.has_bias = bias is not None


def _convolution_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias, _, state, _, _ = ctx.saved_tensors
    dx, dtaps, dtap_bias, dweight, dstate = torch.ops.jrt.gated_convolution_linear_backward(*ctx.saved_tensors, dy)
    dbias = _bias_gradient(dy) if ctx.has_bias else None
    of_bias, of_state = _as(dtap_bias, tap_bias), _as(dstate, state)
    return dx, dtaps.to(taps.dtype), of_bias, dweight, dbias, of_state, None, None


def _save_silu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _silu_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    _, taps, tap_bias, state, _, _ = ctx.saved_tensors
    du, dtaps, dtap_bias, dstate = torch.ops.jrt.silu_convolution_backward(*ctx.saved_tensors, dy)
    return du, dtaps.to(taps.dtype), _as(dtap_bias, tap_bias), _as(dstate, state), None, None


def _as(gradient: Tensor, x: Tensor | None) -> Tensor | None:
    """The gradient in the dtype of x; None if x is None."""
    return None if x is None else gradient.to(x.dtype)


def _bias_gradient(dy: Tensor) -> Tensor:
    return dy.flatten(0, -2).sum(0)


_TAPS = "Tensor taps, Tensor? tap_bias"
_TEXT = "Tensor? state=None, Tensor? mask=None, Tensor? cu_seqlens=None"
_SAVED_TEXT = "Tensor? state, Tensor? mask, Tensor? cu_seqlens"
register("swiglu_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _swiglu_linear, _swiglu_linear_fake)
register(
    "swiglu_linear_backward",
    "(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor)",
    _swiglu_linear_backward,
    _swiglu_linear_backward_fake,
)
register(
    "gated_convolution_linear",
    f"(Tensor x, {_TAPS}, Tensor weight, Tensor? bias, {_TEXT}) -> Tensor",
    _gated_convolution_linear,
    _gated_convolution_linear_fake,
)
register(
    "gated_convolution_linear_backward",
    f"(Tensor x, {_TAPS}, Tensor weight, {_SAVED_TEXT}, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_convolution_linear_backward,
    _gated_convolution_linear_backward_fake,
)
register(
    "silu_convolution",
    f"(Tensor u, {_TAPS}, {_TEXT}) -> Tensor",
    _silu_convolution,
    _silu_convolution_fake,
)
register(
    "silu_convolution_backward",
    f"(Tensor u, {_TAPS}, {_SAVED_TEXT}, Tensor dy) -> (Tensor, Tensor, Tensor, Tensor)",
    _silu_convolution_backward,
    _silu_convolution_backward_fake,
)
refuse_second_derivative("swiglu_linear_backward", "jrt.ops.gated_pytorch.swiglu_linear")
refuse_second_derivative("gated_convolution_linear_backward", "the op with backend='pytorch'")
refuse_second_derivative("silu_convolution_backward", "the op with backend='pytorch'")
torch.library.register_autograd("jrt::swiglu_linear", _swiglu_gradients, setup_context=_save_swiglu)
torch.library.register_autograd(
    "jrt::gated_convolution_linear", _convolution_gradients, setup_context=_save_convolution
)
torch.library.register_autograd("jrt::silu_convolution", _silu_gradients, setup_context=_save_silu)
