"""Launches the kernels for a text or for a prefix alone, and allocates scratch memory.

`pair` launches them for a prefix and a text together; `sizes` has the sizes of tiles and pieces.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, H heads, P pieces of all sequences together,
d query/key size, D value size, F features.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from jrt.ops.feature_map import feature_count
from jrt.ops.triton.backward import keys_kernel, queries_kernel
from jrt.ops.triton.decode import decode_kernel
from jrt.ops.triton.forward import forward_kernel
from jrt.ops.triton.sizes import Pieces, choose_tiles, constants, cut, row_tiles
from jrt.ops.triton.sums import piece_kernel, scan_kernel
from jrt.ops.triton.tensors import (
    empty_state,
    mask_bytes,
    mask_stride,
    offsets,
    on,
    rows,
    sequences,
    strides,
    tables,
    whole,
)

SCAN_BLOCK, SCAN_AHEAD = 256, 8  # numbers of a state that a program of the scan has; pieces that it loads at once


def forward(
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
    """o (B, T, H, D), and the final state S (N, H, F, D) and z (N, H, F)."""
    q, k, v, mask, cu_seqlens = rows(q), rows(k), rows(v), mask_bytes(mask), offsets(cu_seqlens, k)
    if k.shape[1] == 1 and cu_seqlens is None:
        o = v.new_empty(v.shape)
        return o, *_decode(q, k, v, S, z, mask, log_decay, normalize, o)
    pieces = cut(k, cu_seqlens, choose_tiles("forward", k.shape[-1], v.shape[-1], k.dtype), "forward")
    S, z = states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces)
    return outputs(q, k, v, S, z, mask, log_decay, cu_seqlens, pieces, normalize)


def outputs(q, k, v, S, z, mask, log_decay, cu_seqlens, pieces, normalize) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `forward_kernel`, from the state before each piece (P, H, F, D) and (P, H, F), or None: zero."""
    (B, T, H, d), D = k.shape, v.shape[-1]
    tiles = choose_tiles("forward", d, D, k.dtype)
    o = v.new_empty(B, T, H, D)
    final_S, final_z = empty_state(v, sequences(k, cu_seqlens), d)
    with on(k.device):
        forward_kernel[(pieces.number * H, triton.cdiv(D, tiles.DV))](
            q, k, v, mask, log_decay, S, z, o, final_S, final_z, *tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *strides(q), *strides(k), *strides(v), mask_stride(mask),
            HAS_START=S is not None, NORMALIZE=normalize, **constants(k, v, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    return o, final_S, final_z


def backward(
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
    """Gradients of q, k, v and of the initial state S (N, H, F, D) and z (N, H, F)."""
    q, k, v, do, o = rows(q), rows(k), rows(v), rows(do), o.contiguous()
    mask, cu_seqlens = mask_bytes(mask), offsets(cu_seqlens, k)
    (_, T, H, d), D = k.shape, v.shape[-1]
    if T == 1 and cu_seqlens is None:
        # The gradient of the denominator holds do . o. With one token, nothing averages the rounding of o in it.
        o = o.new_empty(o.shape, dtype=torch.float32)
        _decode(q, k, v, S, z, mask, log_decay, normalize, o)
    pieces = cut(k, cu_seqlens, choose_tiles("queries", d, D, k.dtype), "backward")
    dS, dz = dS.float().contiguous(), dz.float().contiguous()
    initial_S, initial_z = torch.empty_like(dS), torch.empty_like(dz)

    S, z = states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces)
    dq, weights = queries_gradient(q, k, v, S, z, mask, log_decay, cu_seqlens, o, do, pieces, normalize)
    if pieces.number > dS.shape[0]:
        dS, dz = _scanned(q, do, dS, dz, None, log_decay, cu_seqlens, pieces, weights)
    tiles = choose_tiles("keys", d, D, k.dtype)
    dk, dv = parts_of(k, v, tiles.DV), v.new_empty(v.shape)
    with on(k.device):
        keys_kernel[(pieces.number * H, len(dk))](
            q, k, v, mask, log_decay, do, *weights, dS, dz, dk, dv, initial_S, initial_z, *tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *strides(q), *strides(k), *strides(v), *strides(do),
            mask_stride(mask), dk.stride(0), HAS_QUERIES=True, BY_PIECE=True,
            **constants(k, v, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    return dq, sum_of(dk, k), dv, initial_S, initial_z


def queries_gradient(
    q, k, v, S, z, mask, log_decay, cu_seqlens, o, do, pieces, normalize
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """dq, and the weights w and c (B, T, H) of each token, from the state before each piece."""
    (B, T, H, d), D = k.shape, v.shape[-1]
    tiles = choose_tiles("queries", d, D, k.dtype)
    dq = parts_of(q, v, tiles.DV)
    weight, sum_weight = (q.new_empty(B, T, H, dtype=torch.float32) for _ in range(2))
    with on(k.device):
        queries_kernel[(pieces.number * H, len(dq))](
            q, k, v, mask, log_decay, o, do, S, z, dq, weight, sum_weight, *tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *strides(q), *strides(k), *strides(v), *strides(do),
            mask_stride(mask), dq.stride(0), HAS_START=S is not None, NORMALIZE=normalize,
            **constants(k, v, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    return sum_of(dq, q), (weight, sum_weight)


def prefix(k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """S (N, H, F, D) and z (N, H, F) of a prefix."""
    k, v, mask, cu_seqlens = rows(k), rows(v), mask_bytes(mask), offsets(cu_seqlens, k)
    d, D = k.shape[-1], v.shape[-1]
    pieces = cut(k, cu_seqlens, choose_tiles("sums", d, D, k.dtype), "forward")
    count = sequences(k, cu_seqlens)
    S, z = sums(k, v, mask, None, cu_seqlens, pieces, every=True)
    if pieces.number == count:
        return S, z
    total = empty_state(v, count, d)
    scan_pieces((S, z), (None, None), total, None, pieces, k, cu_seqlens, reverse=False)
    return total


def prefix_backward(
    k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, dS: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v. A prefix has no causal order, so the pieces are independent of each other."""
    k, v, mask, cu_seqlens = rows(k), rows(v), mask_bytes(mask), offsets(cu_seqlens, k)
    (_, T, H, d), D = k.shape, v.shape[-1]
    tiles = choose_tiles("prefix keys", d, D, k.dtype)
    pieces = cut(k, cu_seqlens, tiles, "backward")
    dk, dv = parts_of(k, v, tiles.DV), v.new_empty(v.shape)
    dS, dz = dS.float().contiguous(), dz.float().contiguous()
    none = (None,) * 3
    with on(k.device):
        keys_kernel[(pieces.number * H, len(dk))](
            none[0], k, v, mask, none[0], none[0], none[0], none[0], dS, dz, dk, dv, none[0], none[0],
            *tables(pieces, cu_seqlens), T, H, pieces.a_sequence, pieces.tokens,
            0, 0, 0, *strides(k), *strides(v), 0, 0, 0, mask_stride(mask), dk.stride(0),
            HAS_QUERIES=False, BY_PIECE=False, **constants(k, v, mask, None, cu_seqlens, tiles),
        )  # fmt: skip
    return sum_of(dk, k), dv


def parts_of(x: Tensor, v: Tensor, columns: int) -> Tensor:
    """Memory for the gradient of x (B, T, H, d): a part for each tile of columns of v, in fp32 if there are several."""
    tiles = triton.cdiv(v.shape[-1], columns)
    return x.new_empty(tiles, *x.shape, dtype=x.dtype if tiles == 1 else torch.float32)


def sum_of(parts: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from its parts."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)


def _decode(q, k, v, S, z, mask, log_decay, normalize, o) -> tuple[Tensor, Tensor]:
    (B, _, H, d), D = k.shape, v.shape[-1]
    new_S, new_z = empty_state(v, B, d)
    columns = min(32, max(16, triton.next_power_of_2(D)))
    (q_batch, _, q_head), (k_batch, _, k_head), (v_batch, _, v_head) = strides(q), strides(k), strides(v)
    with on(k.device):
        decode_kernel[(B * H, triton.cdiv(D, columns))](
            q, k, v, mask, log_decay, whole(S), whole(z), o, new_S, new_z, H,
            q_batch, q_head, k_batch, k_head, v_batch, v_head, mask_stride(mask),
            HAS_MASK=mask is not None, HAS_DECAY=log_decay is not None, HAS_START=S is not None, NORMALIZE=normalize,
            d=d, D=D, F=feature_count(d), DV=columns, **row_tiles(d, 32), num_warps=4,
        )  # fmt: skip
    return new_S, new_z


def states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces) -> tuple[Tensor | None, Tensor | None]:
    """The state before each piece, (P, H, F, D) and (P, H, F); None if no sequence is cut and none has an initial
    state."""
    if pieces.number == sequences(k, cu_seqlens):
        return whole(S), whole(z)
    return _scanned(k, v, whole(S), whole(z), mask, log_decay, cu_seqlens, pieces, weights=None)


def _scanned(x, u, S, z, mask, log_decay, cu_seqlens, pieces, weights) -> tuple[Tensor, Tensor]:
    """The state before each piece, or, with `weights`, the gradient of the state after each piece."""
    parts = sums(x, u, mask, log_decay, cu_seqlens, pieces, every=False, weights=weights)
    scan_pieces(parts, (S, z), (None, None), log_decay, pieces, x, cu_seqlens, reverse=weights is not None)
    return parts


def sums(x, u, mask, log_decay, cu_seqlens, pieces, every, weights=None) -> tuple[Tensor, Tensor]:
    """Launches `piece_kernel`; every: also for the piece on which no other depends."""
    (_, T, H, d), D = x.shape, u.shape[-1]
    tiles = choose_tiles("sums", d, D, x.dtype)
    S, z = empty_state(u, pieces.number, x.shape[-1])
    weight, sum_weight = (None, None) if weights is None else weights
    with on(x.device):
        piece_kernel[(pieces.number * H, triton.cdiv(D, tiles.DV))](
            x, u, mask, weight, sum_weight, log_decay, S, z, *tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *strides(x), *strides(u), mask_stride(mask),
            GRADIENT=weights is not None, ALL=every, **constants(x, u, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    return S, z


def scan_pieces(
    parts: tuple[Tensor, Tensor],
    starts: tuple[Tensor | None, Tensor | None],
    totals: tuple[Tensor | None, Tensor | None],
    log_decay: Tensor | None,
    pieces: Pieces,
    k: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    prefix_parts: tuple[Tensor | None, Tensor | None] = (None, None),
    prefix_pieces: Pieces | None = None,
) -> None:
    """Launches `scan_kernel`, which works in place on the pieces' S (P, H, F, D) and z (P, H, F).

    With `prefix_parts`, the sums of a prefix's pieces, `starts` is not read: it gets their total.
    """
    H = k.shape[2]
    F, D = parts[0].shape[2:]
    programs = triton.cdiv(F * D, SCAN_BLOCK) + triton.cdiv(F, SCAN_BLOCK)
    count, first = (0, None) if prefix_pieces is None else (prefix_pieces.a_sequence, prefix_pieces.first)
    with on(k.device):
        scan_kernel[(programs, sequences(k, cu_seqlens) * H)](
            *parts, *starts, *totals, *prefix_parts, log_decay, pieces.start, pieces.end, pieces.first, first,
            k.shape[1], H, pieces.a_sequence, pieces.tokens, count, D=D, F=F,
            HAS_START=starts[0] is not None and prefix_pieces is None,
            HAS_TOTAL=totals[0] is not None, HAS_PREFIX=prefix_pieces is not None, HAS_DECAY=log_decay is not None,
            REVERSE=reverse, PACKED=cu_seqlens is not None, BLOCK=SCAN_BLOCK, AHEAD=SCAN_AHEAD, num_warps=2,
        )  # fmt: skip
