"""Backend "triton": linear attention forward and backward, prefix encoder and decode step, on any GPU that Triton
supports.

This module checks whether the kernels can serve a call, and registers them as operators. Triton itself is imported with
the first call. The kernels are in `forward`, `backward`, `sums` and `decode`. Their common parts are in `features` (the
feature map in tiles), `state` (the state in registers) and `places` (addresses). `launch` launches them, and `pair`
does so for a prefix and the text after it together; `sizes` and `tensors` have what both need.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, H heads, d query/key size, D value size,
F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops.call import Call
from jrt.ops.feature_map import State, feature_count
from jrt.ops.packages import triton_unavailable
from jrt.ops.registration import refuse_second_derivative, register, without_rule

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_KEY, LARGEST_VALUE = 32, 128
LONGEST = 2**30  # tokens: kernels count them in 32 bits


def unsupported(call: Call) -> str | None:
    """The reason why the kernels cannot serve this call; None if they can. Never imports triton."""
    k, D = call.k, call.v.shape[-1]
    if reason := triton_unavailable(k):
        return reason
    if call.prefix is not None and (reason := unsupported(call.prefix)):
        return f"prefix: {reason}"
    if k.device.type == "cpu" and k.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies no bfloat16"
    if any(x.dtype not in DTYPES for x in call.tensors()):
        return f"dtypes {', '.join(str(x.dtype) for x in call.tensors())}: expected bfloat16, float16 or float32"
    if k.shape[-1] > LARGEST_KEY:
        return f"query size d = {k.shape[-1]}: expected at most {LARGEST_KEY}"
    if D > LARGEST_VALUE:
        return f"value size D = {D}: expected at most {LARGEST_VALUE}"
    if k.shape[0] * k.shape[1] > LONGEST:
        return f"{k.shape[0]} x {k.shape[1]} tokens: the kernels count them in 32 bits"
    if call.log_decay is not None and call.log_decay.requires_grad and torch.is_grad_enabled():
        return "log_decay requires grad and the kernels take it for a constant"
    return without_rule(call.tensors())


def linear_attention(call: Call) -> tuple[Tensor, State]:
    """`jrt.ops.linear_attention`, for calls for which `unsupported` returns None."""
    S, z = (None, None) if call.initial_state is None else (x.float() for x in call.initial_state)
    o, S, z = torch.ops.jrt.linear_attention_triton(
        call.q, call.k, call.v, S, z, call.mask, call.log_decay, call.cu_seqlens, call.normalize
    )
    return o, State(S, z)


def encode_prefix(call: Call) -> State:
    """`jrt.ops.encode_prefix`, for calls for which `unsupported` returns None."""
    return State(*torch.ops.jrt.encode_prefix_triton(call.k, call.v, call.mask, call.cu_seqlens))


def prefix_linear_attention(call: Call) -> tuple[Tensor, State]:
    """`jrt.ops.prefix_linear_attention`, for calls for which `unsupported` returns None."""
    assert call.prefix is not None
    of_prefix = call.prefix
    o, S, z, _, _ = torch.ops.jrt.prefix_linear_attention_triton(
        call.q, call.k, call.v, of_prefix.k, of_prefix.v, call.mask, of_prefix.mask, call.log_decay, call.cu_seqlens,
        of_prefix.cu_seqlens, call.normalize,
    )  # fmt: skip
    return o, State(S, z)


# ---- the operators. `launch` and `pair` import triton, so they are imported where they are called.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from jrt.ops.triton import launch

    return launch.forward(q, k, v, S, z, mask, log_decay, cu_seqlens, normalize)


def _forward_fake(q, k, v, S, z, mask, log_decay, cu_seqlens, normalize):
    return v.new_empty(v.shape), *_empty_state(k, v, cu_seqlens)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    do: Tensor,
    dS: Tensor,
    dz: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from jrt.ops.triton import launch

    return launch.backward(q, k, v, S, z, mask, log_decay, cu_seqlens, o, do, dS, dz, normalize)


def _backward_fake(q, k, v, S, z, mask, log_decay, cu_seqlens, o, do, dS, dz, normalize):
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_empty_state(k, v, cu_seqlens)


def _prefix(k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    from jrt.ops.triton import launch

    return launch.prefix(k, v, mask, cu_seqlens)


def _prefix_fake(k, v, mask, cu_seqlens):
    return _empty_state(k, v, cu_seqlens)


def _prefix_backward(
    k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, dS: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    from jrt.ops.triton import launch

    return launch.prefix_backward(k, v, mask, cu_seqlens, dS, dz)


def _prefix_backward_fake(k, v, mask, cu_seqlens, dS, dz):
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    prefix_mask: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix_cu_seqlens: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from jrt.ops.triton import pair

    return pair.forward(
        q, k, v, prefix_k, prefix_v, mask, prefix_mask, log_decay, cu_seqlens, prefix_cu_seqlens, normalize
    )


def _pair_fake(
    q, k, v, prefix_k, prefix_v, mask, prefix_mask, log_decay, cu_seqlens, prefix_cu_seqlens, normalize
):  # fmt: skip
    return v.new_empty(v.shape), *_empty_state(k, v, cu_seqlens), *_empty_state(k, v, cu_seqlens)


def _pair_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    prefix_mask: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix_cu_seqlens: Tensor | None,
    o: Tensor,
    S: Tensor,
    z: Tensor,
    do: Tensor,
    dS: Tensor,
    dz: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from jrt.ops.triton import pair

    return pair.backward(
        q, k, v, prefix_k, prefix_v, mask, prefix_mask, log_decay, cu_seqlens, prefix_cu_seqlens, o, S, z, do, dS, dz,
        normalize,
    )  # fmt: skip


def _pair_backward_fake(
    q, k, v, prefix_k, prefix_v, mask, prefix_mask, log_decay, cu_seqlens, prefix_cu_seqlens, o, S, z, do, dS, dz,
    normalize,
):  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))


def _empty_state(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    count = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (count, k.shape[2], feature_count(k.shape[3]))
    return v.new_empty(*shape, v.shape[3], dtype=torch.float32), v.new_empty(shape, dtype=torch.float32)


def save_call(ctx, inputs, output) -> None:
    """Saves inputs and output of `linear_attention` for its gradients; all else is computed again."""
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors, output[0])


def gradients_of_call(ctx, do: Tensor, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, S and z, and None for the rest."""
    *tensors, o = ctx.saved_tensors
    dq, dk, dv, initial_S, initial_z = torch.ops.jrt.linear_attention_backward(*tensors, o, do, dS, dz, ctx.normalize)
    if tensors[3] is None:
        initial_S = initial_z = None
    return dq, dk, dv, initial_S, initial_z, None, None, None, None


def save_prefix(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def gradients_of_prefix(ctx, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.jrt.encode_prefix_backward(*ctx.saved_tensors, dS, dz), None, None


def save_pair(ctx, inputs, output) -> None:
    """Saves the state between prefix and text too, so that the prefix is not read again for it."""
    *tensors, ctx.normalize = inputs
    o, _, _, S, z = output
    ctx.mark_non_differentiable(S, z)
    ctx.save_for_backward(*tensors, o, S, z)


def gradients_of_pair(ctx, do: Tensor, dS: Tensor, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, prefix_k and prefix_v, and None for the rest."""
    backward = torch.ops.jrt.prefix_linear_attention_backward
    return *backward(*ctx.saved_tensors, do, dS, dz, ctx.normalize), *[None] * 6


_CALL = "Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, Tensor? mask, Tensor? log_decay, Tensor? cu_seqlens"
_PREFIX = "Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens"
_PAIR = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? mask, Tensor? prefix_mask, "
    "Tensor? log_decay, Tensor? cu_seqlens, Tensor? prefix_cu_seqlens"
)
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
register("linear_attention_triton", f"({_CALL}, bool normalize) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake)
register(
    "linear_attention_backward",
    f"({_CALL}, Tensor o, Tensor do, Tensor dS, Tensor dz, bool normalize) -> {_FIVE}",
    _backward,
    _backward_fake,
)
register("encode_prefix_triton", f"({_PREFIX}) -> (Tensor, Tensor)", _prefix, _prefix_fake)
register(
    "encode_prefix_backward",
    f"({_PREFIX}, Tensor dS, Tensor dz) -> (Tensor, Tensor)",
    _prefix_backward,
    _prefix_backward_fake,
)
register("prefix_linear_attention_triton", f"({_PAIR}, bool normalize) -> {_FIVE}", _pair, _pair_fake)
register(
    "prefix_linear_attention_backward",
    f"({_PAIR}, Tensor o, Tensor S, Tensor z, Tensor do, Tensor dS, Tensor dz, bool normalize) -> {_FIVE}",
    _pair_backward,
    _pair_backward_fake,
)
torch.library.register_autograd("jrt::linear_attention_triton", gradients_of_call, setup_context=save_call)
torch.library.register_autograd("jrt::encode_prefix_triton", gradients_of_prefix, setup_context=save_prefix)
torch.library.register_autograd("jrt::prefix_linear_attention_triton", gradients_of_pair, setup_context=save_pair)
for _name in ("linear_attention", "encode_prefix", "prefix_linear_attention"):
    refuse_second_derivative(f"{_name}_backward")
