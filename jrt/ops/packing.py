"""Packed sequences for backends that read one text in each row: the sequences are split, and computed one after
another.

Inside `torch.compile` the lengths are not known, so there each sequence becomes a row of as many tokens as all have
together. This takes N times the time and memory, and keeps the graph whole.

Shapes: N sequences, T tokens of all sequences together, H heads, d query/key size, D value size, F features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jrt.ops.call import Call
from jrt.ops.feature_map import State, feature_count


def owners(cu_seqlens: Tensor, length: int) -> Tensor:
    """(T,) the number of the packed sequence that each of T = length tokens belongs to.

    cu_seqlens: (N + 1,) as in `jrt.ops.linear_attention`."""
    token = torch.arange(length, device=cu_seqlens.device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return owner.clamp(max=cu_seqlens.shape[0] - 2)


def attend_apart(attend: Callable[[Call], tuple[Tensor, State]], call: Call) -> tuple[Tensor, State]:
    """Applies `attend` to each sequence; returns packed outputs (1, T, H, D), and states (N, H, F, D) and (N, H, F)."""
    if torch.compiler.is_compiling():
        return _attend_in_rows(attend, call)
    results = [
        attend(part) if part.k.shape[1] else (part.v, part.initial_state or _nothing(part)) for part in _apart(call)
    ]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=1), _together(list(states))


def encode_apart(encode: Callable[[Call], State], call: Call) -> State:
    """Applies `encode` to each prefix; returns states (N, H, F, D) and (N, H, F)."""
    if torch.compiler.is_compiling():
        return encode(_in_rows(call, at_end=False))
    return _together([encode(part) if part.k.shape[1] else _nothing(part) for part in _apart(call)])


def _attend_in_rows(attend: Callable[[Call], tuple[Tensor, State]], call: Call) -> tuple[Tensor, State]:
    cu_seqlens = call.cu_seqlens
    assert cu_seqlens is not None
    o, state = attend(_in_rows(call, at_end=False))  # o: (N, T, H, D)
    if call.log_decay is not None:  # the padding after a sequence has faded its state
        state = attend(_in_rows(call, at_end=True)._replace(initial_state=None))[1]
        if call.initial_state is not None:
            S_0, z_0 = (x.to(state.S.dtype) for x in call.initial_state)
            fade = (call.log_decay.to(S_0.dtype) * cu_seqlens.diff()[:, None]).exp()  # (N, H)
            state = State(state.S + fade[..., None, None] * S_0, state.z + z_0)
    owner = owners(cu_seqlens, o.shape[1])  # (T,)
    return o[owner, torch.arange(o.shape[1], device=o.device) - cu_seqlens[owner]][None], state


def _in_rows(call: Call, at_end: bool) -> Call:
    """The call with one sequence a row (N, T), whose tokens are the row's first, or with `at_end` its last ones."""
    cu_seqlens, T = call.cu_seqlens, call.k.shape[1]
    assert cu_seqlens is not None
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    token = torch.arange(T, device=cu_seqlens.device) + (end - T if at_end else start)  # (N, T)
    own = (token >= start) & (token < end)
    token = token.clamp(0, T - 1)
    q, k, v = (x if x is None else x[0, token] for x in (call.q, call.k, call.v))
    assert k is not None and v is not None
    mask = own if call.mask is None else own & call.mask[0, token]
    return call._replace(q=q, k=k, v=v, mask=mask, cu_seqlens=None)


def _apart(call: Call) -> Iterator[Call]:
    assert call.cu_seqlens is not None
    ends = call.cu_seqlens.tolist()
    for n, (start, end) in enumerate(itertools.pairwise(ends)):
        q, mask = (x if x is None else x[:, start:end] for x in (call.q, call.mask))
        state = call.initial_state
        if state is not None:
            state = State(state.S[n : n + 1], state.z[n : n + 1])
        k, v = call.k[:, start:end], call.v[:, start:end]
        yield call._replace(q=q, k=k, v=v, mask=mask, initial_state=state, cu_seqlens=None)


def _together(states: list[State]) -> State:
    dtype = torch.promote_types(states[0].S.dtype, torch.float32)
    S, z = (torch.cat([part.to(dtype) for part in parts]) for parts in zip(*states, strict=True))
    return State(S, z)


def _nothing(part: Call) -> State:
    heads, d = part.k.shape[2:]
    dtype = torch.promote_types(part.k.dtype, torch.float32)
    S = part.v.new_zeros(1, heads, feature_count(d), part.v.shape[-1], dtype=dtype)
    return State(S, S.new_zeros(S.shape[:3]))
