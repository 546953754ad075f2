"""Backend "cuda": Hopper kernels for linear attention as torch operators (prefill, prefix encoder, decode step).

Gradients of prefill and encoder come from `jrt.ops.cuda_backward`. A prefix and the text after it are one operator,
which launches the encoder's kernels and then those of the prefill. A kernel for both would save only a launch: the text
needs the state of the whole prefix, and each of the two fills the GPU by itself.

The kernels live in the module `jrt_kernels` (`extension`). This file checks what they can serve (`unsupported`),
allocates tensors, and passes addresses.

Shapes: B batch, T tokens, H heads, d = 16 query/key size, D value size, F = 153 features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import checks, extension, packages
from jrt.ops.call import Call
from jrt.ops.extension import (
    VECTOR_BYTES,
    address,
    aligned,
    contiguous_rows,
    dtype_name,
    mask_view,
    multiprocessors,
    view,
)
from jrt.ops.feature_map import State, feature_count
from jrt.ops.registration import register, without_rule

DIM = 16
FEATURES = feature_count(DIM)
LONGEST = 2**30  # most tokens: the kernels count them in 32 bits
DTYPES = (torch.bfloat16, torch.float16)


def unsupported(call: Call) -> str | None:
    """The reason why the kernels cannot serve this call; None if they can. Works without CUDA and without the
    extension."""
    q, k, v, mask = call.k if call.q is None else call.q, call.k, call.v, call.mask
    if q.device.type != "cuda":
        return f"tensors are on {q.device}; expected a CUDA device"
    if reason := extension.missing(q.device.index):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: expected bfloat16 or float16"
    if q.shape[-1] != DIM:
        return f"query size d = {q.shape[-1]}: the kernels are built for {DIM}"
    if v.shape[-1] % 8:
        return f"value size D = {v.shape[-1]}: expected a multiple of 8"
    if call.log_decay is not None:
        return "log_decay is not implemented in the kernels"
    if call.cu_seqlens is not None:
        return "packed sequences are not implemented in the kernels"
    states = () if call.initial_state is None else tuple(call.initial_state)
    if reason := _no_gradient(call):
        return reason
    if any(x.dtype != torch.float32 for x in states):
        return f"initial_state is {' and '.join(str(x.dtype) for x in states)}; expected float32"
    if q.shape[1] > LONGEST or (mask is not None and q.shape[0] * q.shape[1] >= 2**31):
        return f"{q.shape[0]} x {q.shape[1]} tokens: the kernels count them in 32 bits"
    for name, x in (("k" if q is k else "q", q), ("k", k), ("v", v)):
        if reason := unsuitable_layout(name, x):
            return reason
    if call.prefix is not None and (reason := unsupported(call.prefix)):
        return f"prefix: {reason}"
    return None


def linear_attention(call: Call) -> tuple[Tensor, State]:
    """`jrt.ops.linear_attention`, for calls for which `unsupported` returns None."""
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in call.tensors())
    S, z = (None, None) if call.initial_state is None else call.initial_state
    one_token = call.k.shape[1] == 1 and not wants_gradient
    operator = torch.ops.jrt.linear_attention_decode if one_token else torch.ops.jrt.linear_attention_prefill
    o, S, z = operator(call.q, call.k, call.v, S, z, call.mask, call.normalize)
    return o, State(S, z)


def encode_prefix(call: Call) -> State:
    """`jrt.ops.encode_prefix`, for calls for which `unsupported` returns None."""
    return State(*torch.ops.jrt.encode_prefix(call.k, call.v, call.mask))


def prefix_linear_attention(call: Call) -> tuple[Tensor, State]:
    """`jrt.ops.prefix_linear_attention`, for calls for which `unsupported` returns None."""
    of_prefix = call.prefix
    assert of_prefix is not None
    o, S, z, _, _ = torch.ops.jrt.prefix_linear_attention_prefill(
        call.q, call.k, call.v, of_prefix.k, of_prefix.v, call.mask, of_prefix.mask, call.normalize
    )
    return o, State(S, z)


def decode_step(q: Tensor, k: Tensor, v: Tensor, state: State, normalize: bool = True) -> Tensor:
    """Linear attention for one token after `state`, which is updated in place.

    Args:
        q, k: (B, 1, H, 16); v: (B, 1, H, D).
        state: contiguous, fp32.
        normalize: as in `jrt.ops.linear_attention`.

    Returns:
        o (B, 1, H, D).

    Raises:
        ValueError: the kernel cannot serve the call, or the state cannot be updated in place.
    """
    checks.keys_and_values(k, v, None)
    checks.queries(q, k)
    checks.state(state, k, v)
    if reason := unsupported(Call(q, k, v, state, normalize=normalize)):
        raise ValueError(f"decode_step: {reason}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *state)):
        raise ValueError("decode_step: an input requires grad and a state that is updated in place has no gradient")
    return torch.ops.jrt.linear_attention_decode_in_place(q, k, v, state.S, state.z, normalize)


# ---- the operators


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_S: Tensor | None,
    initial_z: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.shape[1] == 1:  # in fp32, as PyTorch computes one token; the kernels of longer texts round its features
        return _decode(q, k, v, initial_S, initial_z, mask, normalize)
    o = v.new_empty(v.shape)  # (B, T, H, D) contiguous
    k, v = without_padding(k, mask), without_padding(v, mask)
    return o, *_launch_prefill(q, k, v, o, initial_S, initial_z, mask, normalize)


def _prefill_fake(q, k, v, initial_S, initial_z, mask, normalize):
    return v.new_empty(v.shape), *empty_state(v)


def _encode(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _launch_prefill(None, without_padding(k, mask), without_padding(v, mask), None, None, None, mask, True)


def _encode_fake(k, v, mask):
    return empty_state(v)


def _pair(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    prefix_mask: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Also returns the state between prefix and text."""
    between = _encode(prefix_k, prefix_v, prefix_mask)
    return *_prefill(q, k, v, *between, mask, normalize), *between


def _pair_fake(q, k, v, prefix_k, prefix_v, mask, prefix_mask, normalize):
    return v.new_empty(v.shape), *empty_state(v), *empty_state(v)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_S: Tensor | None,
    initial_z: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    S, z = empty_state(v)
    k, v = without_padding(k, mask), without_padding(v, mask)
    return _launch_decode(q, k, v, aligned(initial_S), initial_z, S, z, mask, normalize), S, z


def _decode_in_place(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, normalize: bool) -> Tensor:
    if v.shape[1] != 1:
        raise ValueError(f"decode_step takes one token, got T = {v.shape[1]}")
    expected = (v.shape[0], v.shape[2], FEATURES, v.shape[3])
    if S.shape != expected or z.shape != expected[:3] or not (S.is_contiguous() and z.is_contiguous()):
        raise ValueError(f"the state is updated in place: expected contiguous S {expected} and z {expected[:3]}")
    if S.data_ptr() % VECTOR_BYTES:
        raise ValueError(f"the state is updated in place: expected S to begin at a multiple of {VECTOR_BYTES} bytes")
    return _launch_decode(q, k, v, S, z, S, z, None, normalize)


def _decode_in_place_fake(q, k, v, S, z, normalize):
    return v.new_empty(v.shape)


_CALL = "Tensor q, Tensor k, Tensor v, Tensor? initial_S, Tensor? initial_z, Tensor? mask, bool normalize"
register("linear_attention_prefill", f"({_CALL}) -> (Tensor, Tensor, Tensor)", _prefill, _prefill_fake)
register("linear_attention_decode", f"({_CALL}) -> (Tensor, Tensor, Tensor)", _decode, _prefill_fake)
_PAIR = (
    "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? mask, Tensor? prefix_mask, bool normalize"
)
register("prefix_linear_attention_prefill", f"({_PAIR}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _pair, _pair_fake)
register("encode_prefix", "(Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)", _encode, _encode_fake)
register(
    "linear_attention_decode_in_place",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) S, Tensor(b!) z, bool normalize) -> Tensor",
    _decode_in_place,
    _decode_in_place_fake,
)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros at padding, where it may hold NaN: in a matrix product, 0 times NaN would be NaN.

    This happens inside the operators, so that autograd saves the inputs and not these copies. The backward kernels do
    not read padding.
    """
    return x if mask is None else x.masked_fill(~mask[:, :, None, None], 0)


def _launch_decode(q, k, v, old_S, old_z, S, z, mask, normalize) -> Tensor:
    batch, _, heads, value_dim = v.shape
    q, k, v, mask = aligned(q), aligned(k), aligned(v), contiguous_rows(mask)
    if old_S is not None:
        old_S, old_z = old_S.contiguous(), old_z.contiguous()
    o, device = v.new_empty(v.shape), v.device.index
    extension.module().decode_step(
        view(q), view(k), view(v), view(o), mask_view(mask),
        (address(old_S), address(old_z)), (S.data_ptr(), z.data_ptr()), (batch, heads, value_dim),
        dtype_name(v.dtype), normalize, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return o


def _launch_prefill(q, k, v, o, initial_S, initial_z, mask, normalize) -> tuple[Tensor, Tensor]:
    kernels, device = extension.module(), v.device.index
    q, k, v, mask = aligned(q), aligned(k), aligned(v), contiguous_rows(mask)
    if initial_S is not None:
        initial_S, initial_z = initial_S.contiguous(), initial_z.contiguous()
    batch, tokens, heads, value_dim = v.shape
    S, z = empty_state(v)
    pieces = kernels.prefill_pieces(batch, tokens, heads, value_dim, q is None, multiprocessors(device))
    floats = kernels.prefill_workspace(batch, heads, value_dim, pieces)
    workspace = v.new_empty(floats, dtype=torch.float32) if floats else None
    kernels.prefill(
        view(q), view(k), view(v), view(o),
        mask_view(mask), (address(initial_S), address(initial_z)), (S.data_ptr(), z.data_ptr()), address(workspace),
        (batch, tokens, heads, value_dim), pieces,
        dtype_name(v.dtype), normalize, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return S, z


def empty_state(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, value_dim = v.shape
    S = v.new_empty(batch, heads, FEATURES, value_dim, dtype=torch.float32)
    return S, v.new_empty(batch, heads, FEATURES, dtype=torch.float32)


def _no_gradient(call: Call) -> str | None:
    """The reason why a derivative that the call asks for cannot be computed; None if there is no problem."""
    if reason := without_rule(call.tensors()):
        return reason
    if not torch.is_grad_enabled():
        return None
    if not packages.TRITON_INSTALLED and any(x.requires_grad for x in call.tensors()):
        return "an input requires grad and the backward needs triton, which is not installed"
    return None


def unsuitable_layout(name: str, x: Tensor) -> str | None:
    if x.stride(-1) != 1:
        return f"{name} has strides {x.stride()}: its last dimension must be contiguous"
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    if any(stride % 8 or stride <= 0 for stride in strides):
        return f"{name} has strides {x.stride()}: expected positive multiples of 8 elements"
    return None
