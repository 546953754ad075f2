"""Stand-ins for packages with CUDA kernels that cannot be installed here.

Each has the signature of the package's function and refuses what the package refuses (layouts, dtypes, sizes), but it
computes on a CPU, in fp32 with PyTorch. So a test that passes with it shows that the adapter gives the package the right
tensors and reads its results rightly.
"""

import importlib.machinery
import sys
import types

import torch
import torch.nn.functional as F

from jrt.ops import packages

HALF = (torch.bfloat16, torch.float16)


class Installed:
    """Puts a function where a package has it, for the time of a test, and counts its calls."""

    def __init__(self, monkeypatch, module, function):
        self.calls = 0

        def counted(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            made = types.ModuleType(name)
            made.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
            made.__path__ = []
            monkeypatch.setitem(sys.modules, name, made)
        setattr(made, function.__name__, counted)
        monkeypatch.setattr(packages, "DEVICE", "cpu")
        packages._probe.cache_clear()


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Dao-AILab/causal-conv1d, causal_conv1d/causal_conv1d_interface.py with the checks of csrc/causal_conv1d.cpp."""
    batch, channels, steps = x.shape
    width = weight.shape[1]
    kinds = (torch.float32, *HALF)
    assert x.dtype in kinds and weight.dtype in kinds and weight.shape == (channels, width) and 2 <= width <= 4
    assert x.stride(1) == 1 and x.stride(2) > 1, "states and sequences need channels last"
    assert channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    assert x.storage_offset() * x.element_size() % 16 == 0, "not checked there: a misaligned address"
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (channels,) and bias.stride(-1) == 1)
    assert activation in (None, "silu", "swish") and not return_final_states and final_states_out is None
    before = x.new_zeros(batch, channels, width - 1)
    if initial_states is not None:
        assert seq_idx is None and initial_states.dtype == x.dtype and initial_states.stride(1) == 1
        assert initial_states.shape == (batch, channels, width - 1)
        before = initial_states
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (batch, steps)
    inputs = torch.cat([before, x], -1).float()
    out = 0 if bias is None else bias.float()[:, None]
    for tap in range(width):
        shifted = inputs[..., tap : tap + steps]
        if seq_idx is not None:
            back = width - 1 - tap
            same = F.pad(seq_idx, (back, 0), value=-1)[:, :steps] == seq_idx  # (B, T)
            shifted = torch.where(same[:, None], shifted, 0)
        out = out + weight[:, tap, None].float() * shifted
    return (out if activation is None else F.silu(out)).to(x.dtype)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py: heads after tokens; causal masks are aligned to the
    last key, and without `causal` all keys are seen."""
    assert q.dtype in HALF and q.dtype == k.dtype == v.dtype and q.shape[-1] <= 256
    assert dropout_p == 0 and softcap == 0 and alibi_slopes is None and not return_attn_probs
    queries, keys = q.shape[1], k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    ahead = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)  # (T, K), 0 for the query's own key
    left, right = window_size[0], 0 if causal else window_size[1]
    shown = (ahead >= -left if left >= 0 else ahead < keys) & (ahead <= right if right >= 0 else ahead < keys)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    weights = scores.masked_fill(~shown, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """state-spaces/mamba, mamba_ssm/ops/selective_scan_interface.py with the checks of
    csrc/selective_scan/selective_scan.cpp. The last state has no gradient there."""
    batch, channels, steps = u.shape
    states = A.shape[1]
    assert u.dtype in (torch.float32, *HALF) and delta.dtype == B.dtype == C.dtype == u.dtype
    assert delta.shape == u.shape and A.shape == (channels, states) and states <= 256
    assert B.shape == C.shape == (batch, states, steps)
    assert all(x is None or (x.dtype == torch.float32 and x.shape == (channels,)) for x in (D, delta_bias))
    assert A.dtype == torch.float32 and (z is None or (z.dtype == u.dtype and z.shape == u.shape))
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    state, ys = A.new_zeros(batch, channels, states), []
    for t in range(steps):
        write = (step[..., t] * u[..., t].float())[..., None] * B[:, None, :, t].float()
        state = torch.exp(step[..., t, None] * A) * state + write
        ys.append((state * C[:, None, :, t].float()).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return (y, state.detach()) if return_last_state else y
