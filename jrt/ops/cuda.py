"""Hopper kernels for linear attention as torch custom ops: prefill, prefix encoder, decode step. Forward only.

The kernels live in the extension module `jrt_kernels` (kernels/, built by JRT_BUILD_KERNELS=1); this file checks what
they can serve, allocates, and passes addresses. Where they cannot, `unsupported` says why.

Shapes: B batch, T tokens, H heads, d = 16 query/key size, D value size, F = 153 features.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jrt.ops import checks
from jrt.ops.feature_map import State, feature_count

DIM = 16
FEATURES = feature_count(DIM)
INTERFACE = 2  # of jrt_kernels
LONGEST = 2**30  # tokens: kernels count them in 32 bits
VECTOR_BYTES = 16  # decoding moves the state in these
DTYPES = (torch.bfloat16, torch.float16)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State | None,
    mask: Tensor | None,
    log_decay: Tensor | None,
    normalize: bool,
) -> str | None:
    """Why the kernels cannot serve this call, or None. Safe without CUDA and without the extension."""
    if q.device.type != "cuda":
        return f"tensors are on {q.device}; expected a CUDA device"
    if reason := _missing(q.device.index):
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype}: expected bfloat16 or float16"
    if q.shape[-1] != DIM:
        return f"query size d = {q.shape[-1]}: the kernels are built for {DIM}"
    if v.shape[-1] % 8:
        return f"value size D = {v.shape[-1]}: expected a multiple of 8"
    if log_decay is not None:
        return "log_decay is not implemented in the kernels"
    states = () if initial_state is None else tuple(initial_state)
    if torch.is_grad_enabled() and any(_is_differentiated(x) for x in (q, k, v, *states)):
        return "an input requires grad and the kernels have no derivative"
    if any(x.dtype != torch.float32 for x in states):
        return f"initial_state is {' and '.join(str(x.dtype) for x in states)}; expected float32"
    if any(x.device != q.device for x in (k, v, *states, *(() if mask is None else (mask,)))):
        return f"a tensor is not on {q.device}, as q is"
    if q.shape[1] > LONGEST or (mask is not None and q.shape[0] * q.shape[1] >= 2**31):
        return f"{q.shape[0]} x {q.shape[1]} tokens: the kernels count them in 32 bits"
    for name, x in (("k" if q is k else "q", q), ("k", k), ("v", v)):
        if reason := _unsuitable_layout(name, x):
            return reason
    return None


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, initial_state: State | None, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, State]:
    """`jrt.ops.linear_attention` for calls that `unsupported` lets pass."""
    S, z = (None, None) if initial_state is None else (x.contiguous() for x in initial_state)
    o, S, z = (_decode if q.shape[1] == 1 else _prefill)(q, k, v, S, z, _contiguous_rows(mask), normalize)
    return o, State(S, z)


def encode_prefix(k: Tensor, v: Tensor, mask: Tensor | None) -> State:
    """`jrt.ops.encode_prefix` for calls that `unsupported` lets pass."""
    return State(*_encode(k, v, _contiguous_rows(mask)))


def decode_step(q: Tensor, k: Tensor, v: Tensor, state: State, normalize: bool = True) -> Tensor:
    """One token on top of `state`, which is updated in place.

    Args:
        q, k: (B, 1, H, 16); v: (B, 1, H, D).
        state: contiguous fp32.

    Returns:
        o (B, 1, H, D).

    Raises:
        ValueError: the kernel cannot serve the call, or the state cannot be updated in place.
    """
    checks.keys_and_values(k, v, None)
    checks.queries(q, k)
    checks.state(state, k, v)
    if reason := unsupported(q, k, v, state, None, None, normalize):
        raise ValueError(f"decode_step: {reason}")
    return _decode_in_place(q, k, v, state.S, state.z, normalize)


@torch.library.custom_op("jrt::linear_attention_prefill", mutates_args=(), device_types="cuda")
def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_S: Tensor | None,
    initial_z: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    o = v.new_empty(v.shape)  # (B, T, H, D) contiguous
    return o, *_launch_prefill(q, k, v, o, initial_S, initial_z, mask, normalize)


@_prefill.register_fake
def _(q, k, v, initial_S, initial_z, mask, normalize):
    return v.new_empty(v.shape), *_empty_state(v)


@torch.library.custom_op("jrt::encode_prefix", mutates_args=(), device_types="cuda")
def _encode(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return _launch_prefill(None, k, v, None, None, None, mask, True)


@_encode.register_fake
def _(k, v, mask):
    return _empty_state(v)


@torch.library.custom_op("jrt::linear_attention_decode", mutates_args=(), device_types="cuda")
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_S: Tensor | None,
    initial_z: Tensor | None,
    mask: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    S, z = _empty_state(v)
    if initial_S is not None and initial_S.data_ptr() % VECTOR_BYTES:
        initial_S = initial_S.clone()
    return _launch_decode(q, k, v, initial_S, initial_z, S, z, mask, normalize), S, z


@_decode.register_fake
def _(q, k, v, initial_S, initial_z, mask, normalize):
    return v.new_empty(v.shape), *_empty_state(v)


@torch.library.custom_op("jrt::linear_attention_decode_in_place", mutates_args=("S", "z"), device_types="cuda")
def _decode_in_place(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor, normalize: bool) -> Tensor:
    if v.shape[1] != 1:
        raise ValueError(f"decode_step takes one token, got T = {v.shape[1]}")
    expected = (v.shape[0], v.shape[2], FEATURES, v.shape[3])
    if S.shape != expected or z.shape != expected[:3] or not (S.is_contiguous() and z.is_contiguous()):
        raise ValueError(f"the state is updated in place: expected contiguous S {expected} and z {expected[:3]}")
    if S.data_ptr() % VECTOR_BYTES:
        raise ValueError(f"the state is updated in place: expected S to begin at a multiple of {VECTOR_BYTES} bytes")
    return _launch_decode(q, k, v, S, z, S, z, None, normalize)


@_decode_in_place.register_fake
def _(q, k, v, S, z, normalize):
    return v.new_empty(v.shape)


def _launch_decode(q, k, v, old_S, old_z, S, z, mask, normalize) -> Tensor:
    batch, _, heads, value_dim = v.shape
    o, device = v.new_empty(v.shape), v.device.index
    _module().decode_step(
        _view(q), _view(k), _view(v), _view(o), _mask_view(mask),
        (_address(old_S), _address(old_z)), (S.data_ptr(), z.data_ptr()), (batch, heads, value_dim),
        _name(v.dtype), normalize, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return o


def _launch_prefill(q, k, v, o, initial_S, initial_z, mask, normalize) -> tuple[Tensor, Tensor]:
    kernels, device = _module(), v.device.index
    batch, tokens, heads, value_dim = v.shape
    S, z = _empty_state(v)
    pieces = kernels.prefill_pieces(batch, tokens, heads, value_dim, q is None, _multiprocessors(device))
    floats = kernels.prefill_workspace(batch, heads, value_dim, pieces)
    workspace = v.new_empty(floats, dtype=torch.float32) if floats else None
    kernels.prefill(
        _view(q), _view(k), _view(v), _view(o),
        _mask_view(mask), (_address(initial_S), _address(initial_z)), (S.data_ptr(), z.data_ptr()), _address(workspace),
        (batch, tokens, heads, value_dim), pieces,
        _name(v.dtype), normalize, device, torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip
    return S, z


def _empty_state(v: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, heads, value_dim = v.shape
    S = v.new_empty(batch, heads, FEATURES, value_dim, dtype=torch.float32)
    return S, v.new_empty(batch, heads, FEATURES, dtype=torch.float32)


def _view(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, and strides of batch, token and head."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def _mask_view(mask: Tensor | None) -> tuple[int, int]:
    """Address, and stride of batch."""
    return (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))


def _contiguous_rows(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernels read it: the tokens of a row side by side, offsets in 32 bits."""
    if mask is None or ((mask.stride(1) == 1 or mask.shape[1] == 1) and mask.shape[0] * mask.stride(0) < 2**31):
        return mask
    return mask.contiguous()


def _is_differentiated(x: Tensor) -> bool:
    """Whether a gradient or a forward-mode tangent is wanted with respect to it."""
    return x.requires_grad or forward_ad.unpack_dual(x).tangent is not None


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unsuitable_layout(name: str, x: Tensor) -> str | None:
    if x.stride(-1) != 1:
        return f"{name} has strides {x.stride()}: its last dimension must be contiguous"
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    if any(stride % 8 or stride <= 0 for stride in strides) or x.storage_offset() % 8:
        return f"{name} has strides {x.stride()} and offset {x.storage_offset()}: expected positive multiples of 8 elements"
    return None


def _missing(device: int) -> str | None:
    """Why the kernels cannot run on this device at all."""
    return _probe(device)


# torch.compiler.assume_constant_result, less its import of the compiler: torch.compile cannot trace the probing.
_missing._dynamo_marked_constant = True


@functools.cache
def _probe(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the kernels need a Hopper GPU (compute capability 9.0), this one has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("jrt_kernels") is None:
        return "the extension jrt_kernels is not built: install with JRT_BUILD_KERNELS=1 and --no-build-isolation"
    try:
        kernels = _module()
    except ImportError as error:
        return f"the extension jrt_kernels cannot be loaded ({error}): build it again on this machine"
    if (found := getattr(kernels, "interface", None)) != INTERFACE:
        return f"the extension jrt_kernels has interface {found}, expected {INTERFACE}: build it again"
    return None


@functools.cache
def _module():
    return importlib.import_module("jrt_kernels")


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
