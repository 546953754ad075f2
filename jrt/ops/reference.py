"""Backend "reference": prefix linear attention as the paper writes it. All other backends are tested against it.

Shapes: B batch, T tokens, M prefix tokens, H heads, d query/key size, D value size, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops import packing
from jrt.ops.call import Call, in_given_dtypes
from jrt.ops.feature_map import State, taylor_features


def unsupported(call: Call) -> None:
    """None: this backend serves every call."""


@in_given_dtypes
def encode_prefix(call: Call) -> State:
    """S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j), over all tokens at once (equation 3, encoder sums)."""
    if call.cu_seqlens is not None:
        return packing.encode_apart(encode_prefix, call)
    call = call.without_padding()
    phi = _masked_features(call.k, call.mask)  # (B, M, H, F)
    return State(S=torch.einsum("bmhf,bmhe->bhfe", phi, call.v.to(phi.dtype)), z=phi.sum(1).contiguous())


@in_given_dtypes
def linear_attention(call: Call) -> tuple[Tensor, State]:
    """y_i = phi(q_i) (S_0 + sum_{j<=i} phi(k_j) v_j^T) / phi(q_i) . (z_0 + sum_{j<=i} phi(k_j)), as T^2 scores."""
    if call.cu_seqlens is not None:
        return packing.attend_apart(linear_attention, call)
    q, k, v, initial_state, mask, log_decay, normalize, *_ = call.without_padding()
    assert q is not None
    dtype = torch.promote_types(q.dtype, torch.float32)
    steps = torch.arange(q.shape[1], device=q.device)
    age = steps[:, None] - steps[None, :]  # (T, T): i - j

    # 1. Scores between features, causal.
    phi_q, phi_k = taylor_features(q.to(dtype)), _masked_features(k, mask)  # (B, T, H, F)
    scores = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k) * (age >= 0)  # (B, H, T, T)

    # 2. The numerator alone decays with age.
    decay = torch.ones((), dtype=dtype, device=q.device)
    if log_decay is not None:
        decay = (log_decay.to(dtype)[:, None, None] * age.clamp(min=0)).exp()  # (H, T, T)
    numerator = torch.einsum("bhij,bjhe->bihe", scores * decay, v.to(dtype))  # (B, T, H, D)
    denominator = scores.sum(-1).transpose(1, 2)  # (B, T, H)

    # 3. What was read before: the prefix, or the text up to here.
    S = torch.einsum("bjhf,bjhe,hj->bhfe", phi_k, v.to(dtype), decay.expand(q.shape[2], *age.shape)[:, -1])
    z = phi_k.sum(1)  # (B, H, F)
    if initial_state is not None:
        fade = torch.ones(q.shape[2], q.shape[1], dtype=dtype, device=q.device)  # (H, T)
        if log_decay is not None:
            fade = (log_decay.to(dtype)[:, None] * (steps + 1)).exp()
        S_0, z_0 = initial_state.S.to(dtype), initial_state.z.to(dtype)
        numerator = numerator + torch.einsum("bihf,bhfe,hi->bihe", phi_q, S_0, fade)
        denominator = denominator + torch.einsum("bihf,bhf->bih", phi_q, z_0)
        S = S + fade[:, -1, None, None] * S_0
        z = z + z_0

    # 4. Divide; a padded query with nothing before it gives 0, not 0 / 0.
    o = numerator / denominator.masked_fill(denominator == 0, 1)[..., None] if normalize else numerator
    return o.to(v.dtype), State(S, z)


def prefix_linear_attention(call: Call) -> tuple[Tensor, State]:
    """The state of the prefix, then the text. Both are PyTorch's operations, so nothing is gained by one operator."""
    assert call.prefix is not None
    return linear_attention(call.after_prefix(encode_prefix(call.prefix)))


def _masked_features(k: Tensor, mask: Tensor | None) -> Tensor:
    phi = taylor_features(k.to(torch.promote_types(k.dtype, torch.float32)))
    return phi if mask is None else phi * mask[:, :, None, None]
