"""The backward pass of backend "cuda": Hopper kernels for the gradients of linear attention in bf16, as operators.

For a text, `backward_queries` computes dq, and the weights w = 1 / den and c = -(do . o) / den of each token;
`backward_keys` takes them and computes dk, dv and the gradient of the initial state. For a prefix, `backward_keys` does
everything. Of a prefix and a text, the text comes first: it gives the gradient of the state between them. Where a text
is cut into pieces, `backward_sums` computes what each piece adds to the state or to its gradient. The kernels are in
kernels/backward*.cuh. In fp16, and for a text of one token, the whole backward pass is that of `jrt.ops.triton`.

Shapes: B batch, T tokens, H heads, d = 16 query/key size, D value size, P pieces of all sequences together, F = 153
features.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jrt.ops import cuda, extension
from jrt.ops.extension import VECTOR_BYTES, address, contiguous_rows, mask_view, multiprocessors, view
from jrt.ops.registration import refuse_second_derivative, register

CHUNK = 64  # tokens
COLUMNS = 64  # of v, that a block handles
# For `piece_count`.
START = 3  # chunks that could be computed in the time that a block takes to start: an estimate
SUMMING = 0.45  # time of summing the pieces over that of the kernels after it: 109 over 241 us on an H100 (B1 T32,768)


def piece_count(blocks: int, chunks: int, multiprocessors: int, summing: float) -> int:
    """The number of pieces into which each sequence is cut: the fastest by a simple model of the kernels.

    A multiprocessor runs one block at a time.

    Args:
        blocks: blocks of all sequences if none is cut.
        chunks: chunks of a sequence.
        summing: time of summing the pieces over that of the kernels after it.
    """

    def cost(pieces: int) -> float:
        waves = -(-blocks * pieces // multiprocessors)
        return waves * (-(-chunks // pieces) + START) * (1.0 if pieces == 1 else 1.0 + summing)

    return min(range(1, max(1, min(chunks // 2, 2 * multiprocessors // blocks)) + 1), key=cost)


@functools.cache
def _piece_tokens(blocks: int, chunks: int, multiprocessors: int, summing: float) -> int:
    return -(-chunks // piece_count(blocks, chunks, multiprocessors, summing)) * CHUNK


class _Work(NamedTuple):
    """Arguments that all kernels of one backward pass take, and how its sequences are cut."""

    arguments: tuple[Any, ...]  # views of q, k, v, do; the mask; addresses of w and c; sizes; pieces; the stream
    pieces: int  # of each sequence
    tokens: int  # of a piece


def _work(q, k, v, do, mask, weights, summing: float) -> _Work:
    (batch, T, heads, _), value_dim, device = k.shape, v.shape[-1], k.device.index
    blocks, chunks = batch * heads * _column_tiles(v), -(-T // CHUNK)
    tokens = _piece_tokens(blocks, chunks, multiprocessors(device), summing)
    pieces = -(-T // tokens)
    views = [view(x) for x in (q, k, v, do)]
    sizes = (batch, T, heads, value_dim), (pieces, tokens)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _Work((views, mask_view(mask), _addresses(*weights), *sizes, stream), pieces, tokens)


# ---- the operators


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    mask: Tensor | None,
    o: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # One token: only Triton's backward computes do . o without the rounding of o.
    if q.dtype != torch.bfloat16 or q.shape[1] == 1:
        from jrt.ops.triton import launch

        if dS is None or dz is None:
            dS, dz = (x.zero_() for x in cuda.empty_state(v))
        return launch.backward(q, k, v, S, z, mask, None, None, o, do, dS, dz, normalize)
    q, do, o = _tiles(q), _tiles(do), _tiles(o.contiguous())
    k, v = (_tiles(cuda.without_padding(x, mask)) for x in (k, v))
    mask = contiguous_rows(mask)
    w, c = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    dq, dk, dv = _partial(q, v), _partial(k, v), v.new_empty(v.shape)
    initial_S, initial_z = cuda.empty_state(v)
    kernels = extension.module()
    with torch.cuda.device(q.device):
        work = _work(q, k, v, do, mask, (w, c), SUMMING)
        state = _each_piece(work, k, v, S, z, of_queries=False)
        kernels.backward_queries(*work.arguments, _addresses(*state), o.data_ptr(), dq.data_ptr(), normalize)
        gradient = _each_piece(work, k, v, dS, dz, of_queries=True)
        out = dk.data_ptr(), dv.data_ptr(), _addresses(initial_S, initial_z)
        kernels.backward_keys(*work.arguments, _addresses(*gradient), *out)
    return _whole(dq, q), _whole(dk, k), dv, initial_S, initial_z


def _backward_fake(q, k, v, S, z, mask, o, do, dS, dz, normalize):
    return *(x.new_empty(x.shape) for x in (q, k, v)), *cuda.empty_state(v)


def _prefix_backward(k: Tensor, v: Tensor, mask: Tensor | None, dS: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    if k.dtype != torch.bfloat16:
        from jrt.ops.triton import launch

        return launch.prefix_backward(k, v, mask, None, dS, dz)
    k, v = (_tiles(cuda.without_padding(x, mask)) for x in (k, v))
    mask = contiguous_rows(mask)
    dk, dv = _partial(k, v), v.new_empty(v.shape)
    dS, dz = dS.float().contiguous(), dz.float().contiguous()
    with torch.cuda.device(k.device):
        work = _work(None, k, v, None, mask, (None, None), 0.0)
        out = dk.data_ptr(), dv.data_ptr(), (0, 0)
        extension.module().backward_keys(*work.arguments, _addresses(dS, dz), *out)
    return _whole(dk, k), dv


def _prefix_backward_fake(k, v, mask, dS, dz):
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _pair_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor | None,
    prefix_mask: Tensor | None,
    o: Tensor,
    S: Tensor,
    z: Tensor,
    do: Tensor,
    dS: Tensor | None,
    dz: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """S and z: the state between prefix and text."""
    dq, dk, dv, *between = _backward(q, k, v, S, z, mask, o, do, dS, dz, normalize)
    return dq, dk, dv, *_prefix_backward(prefix_k, prefix_v, prefix_mask, *between)


def _pair_backward_fake(q, k, v, prefix_k, prefix_v, mask, prefix_mask, o, S, z, do, dS, dz, normalize):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, prefix_k, prefix_v))


def _save_prefill(ctx, inputs, output) -> None:
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.set_materialize_grads(False)  # a final state that no loss depends on has no gradient to read


def _prefill_gradients(ctx, do: Tensor | None, dS: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, S, z, mask, o = ctx.saved_tensors
    backward = torch.ops.jrt.linear_attention_prefill_backward
    given = _all_or_none(v, do, dS, dz)
    dq, dk, dv, initial_S, initial_z = backward(q, k, v, S, z, mask, o, *given, ctx.normalize)
    return dq, dk, dv, *((None, None) if S is None else (initial_S, initial_z)), None, None


def _all_or_none(
    v: Tensor, do: Tensor | None, dS: Tensor | None, dz: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of o, S and z with zeros for None, except where both of S and z are None."""
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else do
    if (dS is None) != (dz is None):
        zero_S, zero_z = (x.zero_() for x in cuda.empty_state(v))
        dS, dz = zero_S if dS is None else dS, zero_z if dz is None else dz
    return do, dS, dz


def _save_pair(ctx, inputs, output) -> None:
    *tensors, ctx.normalize = inputs
    o, _, _, *between = output
    ctx.mark_non_differentiable(*between)
    ctx.save_for_backward(*tensors, o, *between)
    ctx.set_materialize_grads(False)


def _pair_gradients(
    ctx, do: Tensor | None, dS: Tensor | None, dz: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    given = _all_or_none(ctx.saved_tensors[2], do, dS, dz)
    backward = torch.ops.jrt.prefix_linear_attention_prefill_backward
    return *backward(*ctx.saved_tensors, *given, ctx.normalize), None, None, None


def _save_prefix(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _prefix_gradients(ctx, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.jrt.encode_prefix_prefill_backward(*ctx.saved_tensors, dS, dz), None


register(
    "linear_attention_prefill_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor? initial_S, Tensor? initial_z, Tensor? mask, Tensor o, Tensor do, "
    "Tensor? dS, Tensor? dz, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
register(
    "encode_prefix_prefill_backward",
    "(Tensor k, Tensor v, Tensor? mask, Tensor dS, Tensor dz) -> (Tensor, Tensor)",
    _prefix_backward,
    _prefix_backward_fake,
)
register(
    "prefix_linear_attention_prefill_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? mask, Tensor? prefix_mask, Tensor o, "
    "Tensor S, Tensor z, Tensor do, Tensor? dS, Tensor? dz, bool normalize) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pair_backward,
    _pair_backward_fake,
)
torch.library.register_autograd("jrt::linear_attention_prefill", _prefill_gradients, setup_context=_save_prefill)
torch.library.register_autograd("jrt::encode_prefix", _prefix_gradients, setup_context=_save_prefix)
torch.library.register_autograd("jrt::prefix_linear_attention_prefill", _pair_gradients, setup_context=_save_pair)
for _name in ("linear_attention_prefill", "encode_prefix_prefill", "prefix_linear_attention_prefill"):
    refuse_second_derivative(f"{_name}_backward")


def _each_piece(
    work: _Work, k: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None, of_queries: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The state before each piece, (P, H, F, D) and (P, H, F), from that before the text, S and z; None: zero.

    of_queries: S and z are the gradient of the state after the text, and the result that of the state after each
    piece."""
    S, z = (None if x is None else x.float().contiguous() for x in (S, z))
    if work.pieces == 1:
        return S, z
    from jrt.ops.triton import launch, sizes

    (batch, T, heads, _), value_dim = k.shape, v.shape[-1]
    pieces = sizes.even_pieces(batch, T, work.tokens)
    piece_S = v.new_empty(pieces.number, heads, cuda.FEATURES, value_dim, dtype=torch.float32)
    piece_z = v.new_empty(pieces.number, heads, cuda.FEATURES, dtype=torch.float32)
    extension.module().backward_sums(*work.arguments, _addresses(piece_S, piece_z), of_queries)
    launch.scan_pieces((piece_S, piece_z), (S, z), (None, None), None, pieces, k, None, reverse=of_queries)
    return piece_S, piece_z


def _column_tiles(v: Tensor) -> int:
    return -(-v.shape[-1] // COLUMNS)


def _partial(x: Tensor, v: Tensor) -> Tensor:
    """Memory for dq or dk: a part (B, T, H, d) for each tile of columns of v, in fp32 if there are several."""
    tiles = _column_tiles(v)
    return x.new_empty(tiles, *x.shape, dtype=x.dtype if tiles == 1 else torch.float32)


def _whole(parts: Tensor, x: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)


def _tiles(x: Tensor) -> Tensor:
    """x in a layout that the kernels can copy in tiles; copied if necessary."""
    x = x if cuda.unsuitable_layout("x", x) is None else x.contiguous()
    return x if x.data_ptr() % VECTOR_BYTES == 0 else x.clone()


def _addresses(first: Tensor | None, second: Tensor | None) -> tuple[int, int]:
    return address(first), address(second)
