"""Packed sequences for backends that read one text in each row: the sequences are split, and computed one after
another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jrt.ops.call import Call
from jrt.ops.feature_map import State, feature_count


def attend_apart(attend: Callable[[Call], tuple[Tensor, State]], call: Call) -> tuple[Tensor, State]:
    """Applies `attend` to each sequence; returns packed outputs (1, T, H, D), and states (N, H, F, D) and (N, H, F)."""
    results = [
        attend(part) if part.k.shape[1] else (part.v, part.initial_state or _nothing(part)) for part in _apart(call)
    ]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, dim=1), _together(list(states))


def encode_apart(encode: Callable[[Call], State], call: Call) -> State:
    """Applies `encode` to each prefix; returns states (N, H, F, D) and (N, H, F)."""
    return _together([encode(part) if part.k.shape[1] else _nothing(part) for part in _apart(call)])


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
