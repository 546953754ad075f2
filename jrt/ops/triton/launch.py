"""Launches the kernels: chooses sizes of tiles, cuts sequences into pieces that run in parallel, allocates scratch
memory.

There is no autotuning: the sizes follow from d, D and the dtype by a table that was measured once.

Shapes: B batch, N sequences (B, or those packed into one row), T tokens, H heads, P pieces of all sequences together,
d query/key size, D value size, F features.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from jrt.ops.feature_map import feature_count
from jrt.ops.triton.backward import keys_kernel, queries_kernel
from jrt.ops.triton.decode import decode_kernel
from jrt.ops.triton.forward import forward_kernel
from jrt.ops.triton.sums import piece_kernel, scan_kernel

PRODUCTS_FP32 = "tf32x3"  # an fp32 product as three TF32 products: 22 bits of each factor
# The next two are ratios of times measured on an H100, for `piece_count`.
TOGETHER = 1.35  # time of two programs on one multiprocessor over that of one alone
SUMMING = {"forward": 0.6, "backward": 0.26}  # time of summing the pieces over that of the pass after it
LEAST_CHUNKS = 4  # chunks of a piece: for a shorter one, its state costs more time than running in parallel saves
SCAN_BLOCK, SCAN_AHEAD = 256, 8  # numbers of a state that a program of the scan has; pieces that it loads at once
MOST_TILES = 5  # most tiles of a state, see `state_tiles`


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles."""

    C: int  # tokens of a chunk
    DV: int  # value columns of a program
    rows: int  # most rows of a tile of the state
    warps: int
    stages: int


class Pieces(NamedTuple):
    """How the sequences are cut into pieces. The four tensors are for packed sequences only."""

    number: int  # P
    a_sequence: int  # pieces of each sequence; 0 for packed sequences, which have different numbers
    tokens: int  # tokens of a piece; the last one of a sequence may be shorter
    sequence: Tensor | None  # (P,) int32, -1 where there is no such piece
    start: Tensor | None  # (P,) int32
    end: Tensor | None  # (P,) int32
    first: Tensor | None  # (N + 1,) int32, a sequence's first piece


def choose_tiles(kernel: str, d: int, D: int, dtype: torch.dtype) -> Tiles:
    """Sizes for "forward", "sums", "queries", "keys" or "prefix keys", measured on an H100.

    With these sizes the kernels fit into the 99 KB of shared memory of smaller GPUs (sm_86, sm_89). C is the same for
    the kernels that work on the same pieces, so that a piece is a whole number of chunks for each of them.
    """
    columns = max(16, triton.next_power_of_2(D))
    narrow = kernel in ("queries", "keys", "prefix keys")  # the gradients need more registers beside the state
    if d > 16:
        C = 32 if dtype == torch.bfloat16 else 16
        return Tiles(C=C, DV=min(columns, 32), rows=128, warps=8, stages=1)
    if dtype != torch.bfloat16:  # operands of four bytes
        if kernel == "prefix keys":
            return Tiles(C=64, DV=min(columns, 64), rows=32, warps=4, stages=1)
        return Tiles(C=16, DV=min(columns, 64), rows=128, warps=8, stages=1)
    stages = 1 if kernel in ("keys", "prefix keys") else 2
    return Tiles(C=64, DV=min(columns, 64), rows=32 if narrow else 64, warps=4, stages=stages)


def piece_count(programs: int, chunks: int, device: torch.device, direction: str) -> int:
    """The number of pieces into which each sequence is cut: the fastest by a simple model of the pass.

    In the model, up to two programs share a multiprocessor, and the states of pieces have to be summed before the pass.

    Args:
        programs: programs of all sequences if none is cut.
        chunks: chunks of a sequence.
        direction: "forward" or "backward".
    """
    multiprocessors = _multiprocessors(device)

    def cost(pieces: int) -> float:
        waves = triton.cdiv(programs * pieces, 2 * multiprocessors)
        step = TOGETHER if programs * pieces > multiprocessors else 1.0
        return waves * step * triton.cdiv(chunks, pieces) * (1.0 if pieces == 1 else 1.0 + SUMMING[direction])

    most = min(chunks // LEAST_CHUNKS, 2 * multiprocessors // programs)
    return min(range(1, max(1, most) + 1), key=cost)


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
    q, k, v, mask, cu_seqlens = _rows(q), _rows(k), _rows(v), _bytes(mask), _offsets(cu_seqlens, k)
    (B, T, H, d), D = k.shape, v.shape[-1]
    o = v.new_empty(B, T, H, D)
    if T == 1 and cu_seqlens is None:
        return o, *_decode(q, k, v, S, z, mask, log_decay, normalize, o)
    tiles = choose_tiles("forward", d, D, k.dtype)
    pieces = _cut(k, cu_seqlens, tiles, "forward")
    final_S, final_z = _empty_state(v, _sequences(k, cu_seqlens), d)
    S, z = _states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces)
    with _on(k.device):
        forward_kernel[(pieces.number * H, triton.cdiv(D, tiles.DV))](
            q, k, v, mask, log_decay, S, z, o, final_S, final_z, *_tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *_strides(q), *_strides(k), *_strides(v), _mask_stride(mask),
            HAS_START=S is not None, NORMALIZE=normalize, **_constants(k, v, mask, log_decay, cu_seqlens, tiles),
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
    q, k, v, do, o = _rows(q), _rows(k), _rows(v), _rows(do), o.contiguous()
    mask, cu_seqlens = _bytes(mask), _offsets(cu_seqlens, k)
    (B, T, H, d), D = k.shape, v.shape[-1]
    if T == 1 and cu_seqlens is None:
        # The gradient of the denominator holds do . o. With one token, nothing averages the rounding of o in it.
        o = o.new_empty(o.shape, dtype=torch.float32)
        _decode(q, k, v, S, z, mask, log_decay, normalize, o)
    tiles = choose_tiles("queries", d, D, k.dtype)
    pieces = _cut(k, cu_seqlens, tiles, "backward")
    column_tiles = triton.cdiv(D, tiles.DV)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(do), _mask_stride(mask))
    sizes = (T, H, pieces.a_sequence, pieces.tokens)
    tables = _tables(pieces, cu_seqlens)
    grid = (pieces.number * H, column_tiles)
    partial = q.dtype if column_tiles == 1 else torch.float32
    dq, dk = (q.new_empty(column_tiles, B, T, H, d, dtype=partial) for _ in range(2))
    dv = v.new_empty(v.shape)
    weight, sum_weight = (q.new_empty(B, T, H, dtype=torch.float32) for _ in range(2))
    dS, dz = dS.float().contiguous(), dz.float().contiguous()
    initial_S, initial_z = torch.empty_like(dS), torch.empty_like(dz)

    S, z = _states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces)
    with _on(k.device):
        queries_kernel[grid](
            q, k, v, mask, log_decay, o, do, S, z, dq, weight, sum_weight, *tables, *sizes, *strides, dq.stride(0),
            HAS_START=S is not None, NORMALIZE=normalize, **_constants(k, v, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
        if pieces.number > dS.shape[0]:
            dS, dz = _scanned(q, do, dS, dz, None, log_decay, cu_seqlens, pieces, weights=(weight, sum_weight))
        tiles = choose_tiles("keys", d, D, k.dtype)
        keys_kernel[grid](
            q, k, v, mask, log_decay, do, weight, sum_weight, dS, dz, dk, dv, initial_S, initial_z, *tables, *sizes,
            *strides, dk.stride(0), HAS_QUERIES=True, BY_PIECE=True,
            **_constants(k, v, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    dq, dk = (x[0] if column_tiles == 1 else x.sum(0).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, initial_S, initial_z


def prefix(k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """S (N, H, F, D) and z (N, H, F) of a prefix."""
    k, v, mask, cu_seqlens = _rows(k), _rows(v), _bytes(mask), _offsets(cu_seqlens, k)
    d, D = k.shape[-1], v.shape[-1]
    pieces = _cut(k, cu_seqlens, choose_tiles("sums", d, D, k.dtype), "forward")
    sequences = _sequences(k, cu_seqlens)
    S, z = _sums(k, v, mask, None, cu_seqlens, pieces, every=True)
    if pieces.number == sequences:
        return S, z
    total_S, total_z = _empty_state(v, sequences, d)
    scan_pieces((S, z), (None, None), (total_S, total_z), None, pieces, k, cu_seqlens, reverse=False)
    return total_S, total_z


def prefix_backward(
    k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, dS: Tensor, dz: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of k and v. A prefix has no causal order, so the pieces are independent of each other."""
    k, v, mask, cu_seqlens = _rows(k), _rows(v), _bytes(mask), _offsets(cu_seqlens, k)
    (B, T, H, d), D = k.shape, v.shape[-1]
    tiles = choose_tiles("prefix keys", d, D, k.dtype)
    pieces = _cut(k, cu_seqlens, tiles, "backward")
    column_tiles = triton.cdiv(D, tiles.DV)
    partial = k.dtype if column_tiles == 1 else torch.float32
    dk = k.new_empty(column_tiles, B, T, H, d, dtype=partial)
    dv = v.new_empty(v.shape)
    dS, dz = dS.float().contiguous(), dz.float().contiguous()
    none = (None,) * 3
    with _on(k.device):
        keys_kernel[(pieces.number * H, column_tiles)](
            none[0], k, v, mask, none[0], none[0], none[0], none[0], dS, dz, dk, dv, none[0], none[0],
            *_tables(pieces, cu_seqlens), T, H, pieces.a_sequence, pieces.tokens,
            0, 0, 0, *_strides(k), *_strides(v), 0, 0, 0, _mask_stride(mask), dk.stride(0),
            HAS_QUERIES=False, BY_PIECE=False, **_constants(k, v, mask, None, cu_seqlens, tiles),
        )  # fmt: skip
    return dk[0] if column_tiles == 1 else dk.sum(0).to(k.dtype), dv


def _decode(q, k, v, S, z, mask, log_decay, normalize, o) -> tuple[Tensor, Tensor]:
    (B, _, H, d), D = k.shape, v.shape[-1]
    new_S, new_z = _empty_state(v, B, d)
    columns = min(32, max(16, triton.next_power_of_2(D)))
    (q_batch, _, q_head), (k_batch, _, k_head), (v_batch, _, v_head) = _strides(q), _strides(k), _strides(v)
    with _on(k.device):
        decode_kernel[(B * H, triton.cdiv(D, columns))](
            q, k, v, mask, log_decay, _whole(S), _whole(z), o, new_S, new_z, H,
            q_batch, q_head, k_batch, k_head, v_batch, v_head, _mask_stride(mask),
            HAS_MASK=mask is not None, HAS_DECAY=log_decay is not None, HAS_START=S is not None, NORMALIZE=normalize,
            d=d, D=D, F=feature_count(d), DV=columns, **_row_tiles(d, 32), num_warps=4,
        )  # fmt: skip
    return new_S, new_z


def _states_before(k, v, S, z, mask, log_decay, cu_seqlens, pieces) -> tuple[Tensor | None, Tensor | None]:
    """The state before each piece, (P, H, F, D) and (P, H, F); None if no sequence is cut and none has an initial
    state."""
    if pieces.number == _sequences(k, cu_seqlens):
        return _whole(S), _whole(z)
    return _scanned(k, v, _whole(S), _whole(z), mask, log_decay, cu_seqlens, pieces, weights=None)


def _scanned(x, u, S, z, mask, log_decay, cu_seqlens, pieces, weights) -> tuple[Tensor, Tensor]:
    """The state before each piece, or, with `weights`, the gradient of the state after each piece."""
    piece_S, piece_z = _sums(x, u, mask, log_decay, cu_seqlens, pieces, every=False, weights=weights)
    reverse = weights is not None
    scan_pieces((piece_S, piece_z), (S, z), (None, None), log_decay, pieces, x, cu_seqlens, reverse)
    return piece_S, piece_z


def _sums(x, u, mask, log_decay, cu_seqlens, pieces, every, weights=None) -> tuple[Tensor, Tensor]:
    (_, T, H, d), D = x.shape, u.shape[-1]
    tiles = choose_tiles("sums", d, D, x.dtype)
    S, z = _empty_state(u, pieces.number, x.shape[-1])
    weight, sum_weight = (None, None) if weights is None else weights
    with _on(x.device):
        piece_kernel[(pieces.number * H, triton.cdiv(D, tiles.DV))](
            x, u, mask, weight, sum_weight, log_decay, S, z, *_tables(pieces, cu_seqlens),
            T, H, pieces.a_sequence, pieces.tokens, *_strides(x), *_strides(u), _mask_stride(mask),
            GRADIENT=weights is not None, ALL=every, **_constants(x, u, mask, log_decay, cu_seqlens, tiles),
        )  # fmt: skip
    return S, z


def scan_pieces(parts, starts, totals, log_decay, pieces, k, cu_seqlens, reverse) -> None:
    """Launches `scan_kernel`, which works in place on the pieces' S (P, H, F, D) and z (P, H, F)."""
    sequences, T, H = _sequences(k, cu_seqlens), k.shape[1], k.shape[2]
    F, D = parts[0].shape[2:]
    programs = triton.cdiv(F * D, SCAN_BLOCK) + triton.cdiv(F, SCAN_BLOCK)
    with _on(k.device):
        scan_kernel[(programs, sequences * H)](
            *parts, *starts, *totals, log_decay, pieces.start, pieces.end, pieces.first,
            T, H, pieces.a_sequence, pieces.tokens, D=D, F=F, HAS_START=starts[0] is not None,
            HAS_TOTAL=totals[0] is not None, HAS_DECAY=log_decay is not None, REVERSE=reverse,
            PACKED=cu_seqlens is not None, BLOCK=SCAN_BLOCK, AHEAD=SCAN_AHEAD, num_warps=2,
        )  # fmt: skip


def even_pieces(sequences: int, T: int, tokens: int) -> Pieces:
    """Sequences of T tokens each in pieces of `tokens`, of which the last may be shorter."""
    count = triton.cdiv(T, tokens)
    return Pieces(sequences * count, count, tokens, None, None, None, None)


def _cut(k: Tensor, cu_seqlens: Tensor | None, tiles: Tiles, direction: str) -> Pieces:
    B, T, H, _ = k.shape
    chunks = triton.cdiv(T, tiles.C)
    count = piece_count(B * H, chunks, k.device, direction)
    tokens = triton.cdiv(chunks, count) * tiles.C
    if cu_seqlens is None:
        return even_pieces(B, T, tokens)
    sequences = cu_seqlens.numel() - 1
    counts = (cu_seqlens.diff() + tokens - 1).div(tokens, rounding_mode="floor").clamp(min=1)  # (N,)
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)  # (N + 1,)
    piece = torch.arange(T // tokens + sequences, device=k.device, dtype=torch.int32)
    owner = torch.searchsorted(first[1:].contiguous(), piece, right=True).clamp(max=sequences - 1)
    start = cu_seqlens[owner] + (piece - first[owner]) * tokens
    end = torch.minimum(start + tokens, cu_seqlens[owner + 1])
    owner = torch.where(piece < first[-1], owner, -1)
    owner, start, end = (x.to(torch.int32) for x in (owner, start, end))
    return Pieces(piece.numel(), 0, tokens, owner, start, end, first)


def state_tiles(d: int, rows: int) -> dict[str, int]:
    """How the F rows of a state lie in tiles of at most `rows` rows, as constants of the kernels with matrix products.

    The loop over these tiles is unrolled. With nine or more of them the kernels need more uniform registers than there
    are, and the ptxas 12.8 of Triton 3.6 and 3.7 then hands the tensor cores of Hopper addresses that are wrong.
    """
    constants = _row_tiles(d, rows)
    count = constants["PAIR_TILES"] + 1
    assert count <= MOST_TILES, (
        f"d = {d} makes {count} tiles of {rows} rows: expected at most {MOST_TILES}, so more rows"
    )
    return constants


def _constants(k, v, mask, log_decay, cu_seqlens, tiles: Tiles) -> dict[str, object]:
    d, D = k.shape[-1], v.shape[-1]
    return {
        "HAS_MASK": mask is not None,
        "HAS_DECAY": log_decay is not None,
        "PACKED": cu_seqlens is not None,
        "d": d,
        "D": D,
        "F": feature_count(d),
        "DK": max(16, triton.next_power_of_2(d)),
        "DV": tiles.DV,
        "C": tiles.C,
        **state_tiles(d, tiles.rows),
        "WIDE": tl.bfloat16 if k.dtype == torch.bfloat16 else tl.float32,
        "PRECISION": "ieee" if k.dtype == torch.bfloat16 else PRODUCTS_FP32,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _row_tiles(d: int, largest: int) -> dict[str, int]:
    pairs = max(16, triton.next_power_of_2(d * (d - 1) // 2 + 1))
    rows = min(pairs, largest)
    return {"PAIR_TILES": pairs // rows, "PAIR_ROWS": rows, "REST_ROWS": max(16, triton.next_power_of_2(2 * d))}


def _tables(pieces: Pieces, cu_seqlens: Tensor | None) -> tuple[Tensor | None, ...]:
    return pieces.sequence, pieces.start, pieces.end, cu_seqlens


def _sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _empty_state(v: Tensor, count: int, d: int) -> tuple[Tensor, Tensor]:
    H, D, F = v.shape[2], v.shape[3], feature_count(d)
    return v.new_empty(count, H, F, D, dtype=torch.float32), v.new_empty(count, H, F, dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; copied if necessary."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """The strides of batch, token and head."""
    batch, token, head, _ = x.stride()
    return batch, token, head


def _bytes(mask: Tensor | None) -> Tensor | None:
    """The mask as bytes, with the tokens of a row contiguous."""
    if mask is None:
        return None
    return (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)


def _offsets(cu_seqlens: Tensor | None, k: Tensor) -> Tensor | None:
    """First tokens of packed sequences as the kernels read them; none lies beyond the last token."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32).clamp(0, k.shape[1])


def _mask_stride(mask: Tensor | None) -> int:
    return 0 if mask is None else mask.stride(0)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
