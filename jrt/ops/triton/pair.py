"""Launches the kernels for a prefix and the text after it: one launch for both where both have the same work to do.

- Forward, a text that is cut into pieces needs the sums of its pieces, as the prefix does. So one launch computes both,
  and one scan gives the state after the prefix and before each piece. A text in one piece has no sums, so there is
  nothing to join.
- Backward, the scan over the pieces of the text also gives the gradient of the state after the prefix. So one launch
  computes the gradients of all keys and values. With the text in one piece, that gradient is a result of the launch for
  the text, and the prefix follows in a second one. It does so too where a kernel for both would not fit.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, M prefix tokens, H heads, d query/key size,
D value size, F features.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from jrt.ops.triton import launch
from jrt.ops.triton.backward import both_keys_kernel
from jrt.ops.triton.sizes import Pieces, choose_tiles, constants, cut
from jrt.ops.triton.sums import both_pieces_kernel
from jrt.ops.triton.tensors import empty_state, mask_bytes, mask_stride, offsets, on, rows, sequences, strides, tables


def forward(
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
    """o (B, T, H, D), the final state S (N, H, F, D) and z (N, H, F), and the state between prefix and text."""
    cu, d, D = offsets(cu_seqlens, k), k.shape[-1], v.shape[-1]
    pieces = cut(k, cu, choose_tiles("forward", d, D, k.dtype), "forward")
    if pieces.number == sequences(k, cu):
        S, z = launch.prefix(prefix_k, prefix_v, prefix_mask, prefix_cu_seqlens)
        return *launch.forward(q, k, v, S, z, mask, log_decay, cu_seqlens, normalize), S, z
    q, k, v, prefix_k, prefix_v = (rows(x) for x in (q, k, v, prefix_k, prefix_v))
    mask, prefix_mask = mask_bytes(mask), mask_bytes(prefix_mask)
    prefix_cu = offsets(prefix_cu_seqlens, prefix_k)
    prefix_pieces = cut(prefix_k, prefix_cu, choose_tiles("sums", d, D, k.dtype), "forward")
    before = empty_state(v, pieces.number, d)
    parts = empty_state(v, prefix_pieces.number, d)
    between = empty_state(v, sequences(k, cu), d)
    tiles, H = choose_tiles("sums", d, D, k.dtype), k.shape[2]
    given = prefix_mask if mask is None else mask, mask if prefix_mask is None else prefix_mask
    with on(k.device):
        both_pieces_kernel[((pieces.number + prefix_pieces.number) * H, triton.cdiv(D, tiles.DV))](
            k, v, given[0], *before, *_places(k, cu, pieces), *strides(k), *strides(v), mask_stride(mask),
            prefix_k, prefix_v, given[1], *parts, *_places(prefix_k, prefix_cu, prefix_pieces),
            *strides(prefix_k), *strides(prefix_v), mask_stride(prefix_mask), log_decay, H, pieces.number,
            HAS_PREFIX_MASK=prefix_mask is not None, **constants(k, v, mask, log_decay, cu, tiles),
        )  # fmt: skip
    launch.scan_pieces(
        before, between, (None, None), log_decay, pieces, k, cu, reverse=False,
        prefix_parts=parts, prefix_pieces=prefix_pieces,
    )  # fmt: skip
    return *launch.outputs(q, k, v, *before, mask, log_decay, cu, pieces, normalize), *between


def backward(
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
    """Gradients of q, k, v, prefix_k and prefix_v. S and z: the state between prefix and text."""
    cu, d, D = offsets(cu_seqlens, k), k.shape[-1], v.shape[-1]
    tiles = choose_tiles("keys", d, D, k.dtype)
    pieces = cut(k, cu, choose_tiles("queries", d, D, k.dtype), "backward")
    if pieces.number == sequences(k, cu) or not fits_both(d, D, k.dtype):
        dq, dk, dv, dS, dz = launch.backward(q, k, v, S, z, mask, log_decay, cu_seqlens, o, do, dS, dz, normalize)
        return dq, dk, dv, *launch.prefix_backward(prefix_k, prefix_v, prefix_mask, prefix_cu_seqlens, dS, dz)
    q, k, v, prefix_k, prefix_v, do = (rows(x) for x in (q, k, v, prefix_k, prefix_v, do))
    mask, prefix_mask, o = mask_bytes(mask), mask_bytes(prefix_mask), o.contiguous()
    prefix_cu = offsets(prefix_cu_seqlens, prefix_k)
    prefix_pieces = cut(prefix_k, prefix_cu, tiles, "backward")
    dS, dz = dS.float().contiguous(), dz.float().contiguous()

    before = launch.states_before(k, v, S, z, mask, log_decay, cu, pieces)
    dq, weights = launch.queries_gradient(q, k, v, *before, mask, log_decay, cu, o, do, pieces, normalize)
    after = launch.sums(q, do, None, log_decay, cu, pieces, every=True, weights=weights)
    between = torch.empty_like(dS), torch.empty_like(dz)
    launch.scan_pieces(after, (dS, dz), between, log_decay, pieces, q, cu, reverse=True)
    dk, dv = launch.parts_of(k, v, tiles.DV), v.new_empty(v.shape)
    prefix_dk, prefix_dv = launch.parts_of(prefix_k, v, tiles.DV), prefix_v.new_empty(prefix_v.shape)
    H = k.shape[2]
    with on(k.device):
        both_keys_kernel[((pieces.number + prefix_pieces.number) * H, len(dk))](
            q, k, v, mask, log_decay, do, *weights, *after, dk, dv, *_places(k, cu, pieces),
            *strides(q), *strides(k), *strides(v), *strides(do), mask_stride(mask), dk.stride(0),
            prefix_k, prefix_v, prefix_mask, *between, prefix_dk, prefix_dv,
            *_places(prefix_k, prefix_cu, prefix_pieces), *strides(prefix_k), *strides(prefix_v),
            mask_stride(prefix_mask), prefix_dk.stride(0), H, pieces.number, HAS_PREFIX_MASK=prefix_mask is not None,
            **constants(k, v, mask, log_decay, cu, tiles),
        )  # fmt: skip
    return dq, launch.sum_of(dk, k), dv, launch.sum_of(prefix_dk, prefix_k), prefix_dv


def fits_both(d: int, D: int, dtype: torch.dtype) -> bool:
    """Whether `both_keys_kernel` serves these sizes: both parts have tiles of one size, and in four bytes it would need
    more shared memory than smaller GPUs have."""
    return dtype == torch.bfloat16 and choose_tiles("keys", d, D, dtype) == choose_tiles("prefix keys", d, D, dtype)


def _places(k: Tensor, cu_seqlens: Tensor | None, pieces: Pieces) -> tuple[Tensor | int | None, ...]:
    """The arguments of `places.find_piece`, without the piece's number."""
    return *tables(pieces, cu_seqlens), k.shape[1], pieces.a_sequence, pieces.tokens
