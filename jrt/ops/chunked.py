"""Backend "chunked": linear attention in chunks of tokens, in plain PyTorch. Time and memory are linear in T.

Inside a chunk the scores 1 + s + s^2 / 2 are computed from s = q.k / sqrt(d) (a C x C matrix); features are computed
only for the state between chunks. Matrix products run in the inputs' dtype on a GPU, and at least in fp32 on a CPU.
States are always summed in fp32 or wider.

Shapes: B batch, T tokens, H heads, d query/key size, D value size, F features, N chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops.call import Call, in_given_dtypes
from jrt.ops.feature_map import State, taylor_features
from jrt.ops.packing import attend_apart, encode_apart

CHUNK = 128
# A segment is several chunks that are computed in parallel; segments follow one after another. This bounds a segment's
# length: the bytes that the states between its chunks may take.
SEGMENT_STATE_BYTES = {"cpu": 4 << 20, "cuda": 512 << 20}


def unsupported(call: Call) -> None:
    """None: this backend serves every call."""


@in_given_dtypes
def encode_prefix(call: Call) -> State:
    """The state of a prefix (equation 3, encoder sums), summed segment by segment; no scores are needed."""
    if call.cu_seqlens is not None:
        return encode_apart(encode_prefix, call)
    _, k, v, _, mask, *_ = call.without_padding()
    length = k.shape[1]
    k, v = _to_compute_dtype(k), _to_compute_dtype(v)
    piece = _segment_tokens(k, v)
    states: list[State] = []
    for start in range(0, length, piece):
        phi = taylor_features(k[:, start : start + piece].transpose(1, 2))  # (B, H, M, F)
        if mask is not None:
            phi = phi * mask[:, None, start : start + piece, None]
        dS = (phi.transpose(-1, -2) @ v[:, start : start + piece].transpose(1, 2)).to(_state_dtype(k))  # (B, H, F, D)
        dz = phi.sum(-2, dtype=_state_dtype(k))  # (B, H, F)
        states = [State(states[0].S + dS, states[0].z + dz) if states else State(dS, dz)]
    return states[0]


@in_given_dtypes
def linear_attention(call: Call) -> tuple[Tensor, State]:
    """Computes what `reference.linear_attention` does, in T / C chunks."""
    if call.cu_seqlens is not None:
        return attend_apart(linear_attention, call)
    q, k, v, initial_state, mask, log_decay, normalize, *_ = call.without_padding()
    assert q is not None
    dtype = v.dtype
    q, k, v = _to_compute_dtype(q), _to_compute_dtype(k), _to_compute_dtype(v)
    state = initial_state
    if state is not None:
        state = State(state.S.to(_state_dtype(k)), state.z.to(_state_dtype(k)))
    length = q.shape[1]
    if length == 1:
        return _step(q, k, v, state, mask, log_decay, normalize, dtype)
    # With decay, each chunk's state depends on the one before by a factor, so the parallel sum (cumsum) cannot be used.
    segment = CHUNK if log_decay is not None else _segment_tokens(k, v)
    outputs, start = [], 0
    while start < length:
        rest = length - start
        tokens = min(segment, rest // CHUNK * CHUNK) if rest >= CHUNK else rest
        part = slice(start, start + tokens)
        part_mask = None if mask is None else mask[:, part]
        o, state = _segment(q[:, part], k[:, part], v[:, part], state, part_mask, log_decay, normalize)
        outputs.append(o.to(dtype))
        start += tokens
    assert state is not None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), state


def prefix_linear_attention(call: Call) -> tuple[Tensor, State]:
    """The state of the prefix, then the text. Both are PyTorch's operations, so nothing is gained by one operator."""
    assert call.prefix is not None
    return linear_attention(call.after_prefix(encode_prefix(call.prefix)))


def _step(q, k, v, state, mask, log_decay, normalize, dtype):
    """One token: updates the state, then the query reads it. Few calls, because in decoding their number decides the
    time."""
    wide = _state_dtype(k)
    phi_q, phi_k = taylor_features(torch.stack([q[:, 0], k[:, 0]]).to(wide))  # (B, H, F) each
    if mask is not None:
        phi_k = phi_k * mask[..., None]
    phi_column, v_row = phi_k[..., None], v[:, 0, :, None].to(wide)
    if state is None:
        S, z = phi_column * v_row, phi_k  # (B, H, F, D), (B, H, F)
    else:
        kept = state.S if log_decay is None else state.S * log_decay.to(wide).exp()[:, None, None]
        S, z = torch.addcmul(kept, phi_column, v_row), phi_k + state.z
    o = phi_q[:, :, None] @ S  # (B, H, 1, D)
    if normalize:
        denominator = (phi_q * z).sum(-1)[..., None, None]  # (B, H, 1, 1)
        o = o / (denominator if mask is None else denominator.masked_fill(denominator == 0, 1))
    return o.transpose(1, 2).to(dtype), State(S, z)


def _segment(q, k, v, state, mask, log_decay, normalize):
    """Outputs of one segment (whole chunks, or one short chunk) and the state after it, from the state before it."""
    length, d = q.shape[1], q.shape[3]
    chunk = min(CHUNK, length)
    wide = _state_dtype(k)
    q, k, v = (x.unflatten(1, (-1, chunk)).transpose(2, 3) for x in (q, k, v))  # (B, N, H, C, d or D)
    keep = None if mask is None else mask.unflatten(1, (-1, chunk))[:, :, None]  # (B, N, 1, C)

    # 1. Scores within the chunk.
    s = (q @ k.transpose(-1, -2)).to(wide) * d**-0.5  # (B, N, H, C, C)
    scores = (1 + s + 0.5 * s * s).tril()
    if keep is not None:
        scores = scores * keep[..., None, :]
    denominator = scores.sum(-1)  # (B, N, H, C)
    phi_k = taylor_features(k)  # (B, N, H, C, F)
    if keep is not None:
        phi_k = phi_k * keep[..., None]
    grown = phi_k
    if log_decay is not None:
        steps = torch.arange(chunk, device=q.device, dtype=wide)
        age = (steps[:, None] - steps[None, :]).clamp(min=0)
        rate = log_decay.to(wide)[:, None, None]  # (H, 1, 1)
        scores = scores * (rate * age).exp()  # numerator only: the denominator was summed above
        grown = phi_k * (rate * (chunk - 1 - steps)[:, None]).exp().to(phi_k.dtype)
    numerator = (scores.to(v.dtype) @ v).to(wide)  # (B, N, H, C, D)

    # 2. What each chunk adds to the state, and the state before each chunk.
    dS = (grown.transpose(-1, -2) @ v).to(wide)  # (B, N, H, F, D)
    dz = phi_k.sum(-2, dtype=wide)  # (B, N, H, F)
    if log_decay is not None:  # N = 1 then
        fade = (rate * (steps + 1)[:, None]).exp()  # (H, C, 1)
        before = None if state is None else State(state.S[:, None], state.z[:, None])
        S = dS[:, 0] if state is None else dS[:, 0] + fade[:, -1:] * state.S
        z = dz[:, 0] if state is None else dz[:, 0] + state.z
    else:
        fade = 1
        S, z = dS.cumsum(1), dz.cumsum(1)
        if state is not None:
            S, z = S + state.S[:, None], z + state.z[:, None]
        before = _shifted(S, z, state)
        S, z = S[:, -1].clone(), z[:, -1].clone()  # views would keep the states of all chunks alive

    # 3. What the queries read from it.
    if before is not None:
        phi_q = taylor_features(q)  # (B, N, H, C, F)
        numerator = numerator + fade * (phi_q @ before.S.to(q.dtype)).to(wide)
        denominator = denominator + (phi_q @ before.z.to(q.dtype)[..., None]).to(wide)[..., 0]
    if mask is not None:  # a padded query with nothing before it gives 0, not 0 / 0
        denominator = denominator.masked_fill(denominator == 0, 1)
    o = numerator / denominator[..., None] if normalize else numerator
    return o.transpose(2, 3).flatten(1, 2), State(S, z)


def _shifted(S: Tensor, z: Tensor, state: State | None) -> State | None:
    """The states before each chunk, from the states after each chunk; None if there is one chunk and no state before
    it."""
    if state is None and S.shape[1] == 1:
        return None
    first = State(torch.zeros_like(S[:, 0]), torch.zeros_like(z[:, 0])) if state is None else state
    return State(torch.cat([first.S[:, None], S[:, :-1]], dim=1), torch.cat([first.z[:, None], z[:, :-1]], dim=1))


def _to_compute_dtype(x: Tensor) -> Tensor:
    """On a CPU at least fp32: there, half precision is slow and is rounded between steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.device.type == "cpu" else x


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _segment_tokens(k: Tensor, v: Tensor) -> int:
    """Tokens of one segment, a multiple of CHUNK."""
    batch, _, heads, d = k.shape
    per_chunk = 4 * batch * heads * (1 + d + d * (d + 1) // 2) * max(v.shape[-1], CHUNK)
    budget = SEGMENT_STATE_BYTES.get(k.device.type, SEGMENT_STATE_BYTES["cuda"])
    return CHUNK * max(1, budget // per_chunk)
