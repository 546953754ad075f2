"""Checks of the arguments of linear attention, softmax attention, the short convolution and the selective scan. Each
function raises ValueError with what was expected.

Shapes: B batch, N packed sequences, T tokens, H heads, d query/key size, D value size, F features, E channels, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jrt.ops.feature_map import State, feature_count

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, x: object, device: torch.device | None = None, other: str = "k") -> None:
    """device: that of the argument called `other`, which x must share."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor")
    if x.layout != torch.strided:
        raise ValueError(f"{name} has layout {x.layout}; expected a dense tensor")
    if device is not None and x.device != device:
        raise ValueError(f"{name} is on {x.device}; expected {device}, as {other}")


def keys_and_values(k: Tensor, v: Tensor, mask: Tensor | None, of: str = "") -> None:
    """of: what stands before their names, "" or "prefix_"."""
    tensor(f"{of}k", k)
    tensor(f"{of}v", v)
    if k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"expected {of}k (B, T, H, d) and {of}v (B, T, H, D), got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{of}k has (B, T, H) = {tuple(k.shape[:3])} and {of}v {tuple(v.shape[:3])}; expected the same"
        )
    if 0 in k.shape or 0 in v.shape:
        raise ValueError(f"expected at least one token, got {of}k {tuple(k.shape)} and {of}v {tuple(v.shape)}")
    if k.dtype not in FLOATING or v.dtype not in FLOATING:
        raise ValueError(f"expected floating-point {of}k and {of}v of 16 bits or more, got {k.dtype} and {v.dtype}")
    if k.device != v.device or k.dtype != v.dtype:
        raise ValueError(f"{of}v is {v.dtype} on {v.device}; expected {k.dtype} on {k.device}, as {of}k")
    if mask is None:
        return
    tensor(f"{of}mask", mask, k.device)
    if mask.shape != k.shape[:2]:
        raise ValueError(f"{of}mask has shape {tuple(mask.shape)}; expected (B, T) = {tuple(k.shape[:2])}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{of}mask is {mask.dtype}; expected torch.bool, False where a token is padding")


def prefix(prefix_k: Tensor, prefix_v: Tensor, prefix_mask: Tensor | None, k: Tensor, v: Tensor) -> None:
    """k and v: those of the text, which are checked already."""
    keys_and_values(prefix_k, prefix_v, prefix_mask, "prefix_")
    if prefix_k.dtype != k.dtype or prefix_k.device != k.device:
        raise ValueError(f"prefix_k is {prefix_k.dtype} on {prefix_k.device}; expected {k.dtype} on {k.device}, as k")
    for name, given, text in (("prefix_k", prefix_k, k), ("prefix_v", prefix_v, v)):
        batch, _, *sizes = text.shape
        if given.shape[0] != batch or list(given.shape[2:]) != sizes:
            expected = f"({batch}, M, {', '.join(map(str, sizes))})"
            raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {expected}, as {name[-1]}")


def queries(q: Tensor, k: Tensor) -> None:
    tensor("q", q)
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}; expected that of k, {tuple(k.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q is {q.dtype} on {q.device}; expected {k.dtype} on {k.device}, as k")


def normalization(normalize: bool) -> None:
    if not isinstance(normalize, bool):
        raise ValueError(f"normalize is {normalize!r}; expected True or False")


def decay(log_decay: Tensor, k: Tensor) -> None:
    tensor("log_decay", log_decay, k.device)
    if log_decay.shape != (k.shape[2],):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected (H,) = ({k.shape[2]},)")
    if log_decay.dtype not in FLOATING:
        raise ValueError(f"log_decay is {log_decay.dtype}; expected a floating-point dtype")


def packing(cu_seqlens: Tensor, k: Tensor, name: str = "k", of: str = "") -> None:
    """k: tokens (B, T, ...); name: what messages call it; of: what stands before the names, "" or "prefix_"."""
    tensor(f"{of}cu_seqlens", cu_seqlens, k.device, f"{of}{name}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{of}cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
            "expected int32 or int64 (N + 1,) for N sequences"
        )
    if k.shape[0] != 1:
        raise ValueError(
            f"{of}cu_seqlens is given and {of}{name} has B = {k.shape[0]} rows; expected all sequences in one"
        )
    if k.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != k.shape[1] or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{of}cu_seqlens is {cu_seqlens.tolist()}; expected to rise from 0 to T = {k.shape[1]}")


def packing_of_both(cu_seqlens: Tensor | None, prefix_cu_seqlens: Tensor | None, k: Tensor, prefix_k: Tensor) -> None:
    if cu_seqlens is None and prefix_cu_seqlens is None:
        return
    if cu_seqlens is None or prefix_cu_seqlens is None:
        missing = "cu_seqlens" if cu_seqlens is None else "prefix_cu_seqlens"
        raise ValueError(f"{missing} is None and the other is given; expected both, or neither")
    packing(cu_seqlens, k)
    packing(prefix_cu_seqlens, prefix_k, of="prefix_")
    if cu_seqlens.shape != prefix_cu_seqlens.shape:
        raise ValueError(
            f"prefix_cu_seqlens has shape {tuple(prefix_cu_seqlens.shape)}; "
            f"expected that of cu_seqlens, {tuple(cu_seqlens.shape)}: one prefix for each text"
        )


def state(given: State, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> None:
    if not isinstance(given, State):
        raise ValueError(f"initial_state is a {type(given).__name__}; expected a jrt.ops.State(S, z), or None")
    for name, part in zip(("S", "z"), given, strict=True):
        tensor(f"initial_state.{name}", part, k.device)
        if part.dtype not in FLOATING:
            raise ValueError(f"initial_state.{name} is {part.dtype}; expected a floating-point dtype")
    batch, _, heads, d = k.shape
    batch = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (batch, heads, feature_count(d), v.shape[-1])
    if tuple(given.S.shape) != expected or tuple(given.z.shape) != expected[:3]:
        raise ValueError(
            f"initial_state has S {tuple(given.S.shape)} and z {tuple(given.z.shape)}; "
            f"expected (B, H, F, D) = {expected} and (B, H, F): is it from another model?"
        )


def convolution(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Checks the arguments of `jrt.ops.silu_convolution`; u (B, T, E)."""
    if u.ndim != 3 or weight.ndim != 2 or weight.shape[0] != u.shape[-1]:
        raise ValueError(f"expected u (B, T, E) and weight (E, K), got {tuple(u.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (E,) = {tuple(weight.shape[:1])}")
    if mask is not None and (mask.shape != u.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool (B, T) = {tuple(u.shape[:2])}, False where "
            "a token is padding"
        )
    rows = u.shape[0]
    if cu_seqlens is not None:
        packing(cu_seqlens, u, "u")
        rows = cu_seqlens.shape[0] - 1
    expected = (rows, weight.shape[1] - 1, u.shape[2])
    if state is not None and state.shape != expected:
        raise ValueError(f"state has shape {tuple(state.shape)}; expected (B, K - 1, E) = {expected}")


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, valid: Tensor | None) -> None:
    """Checks the arguments of `jrt.ops.softmax_attention`."""
    if q.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"expected q (B, T, H, D), k and v (B, K, H, D), got {shapes}")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; expected the number of earlier tokens, at least 0")
    queries, keys = q.shape[1], k.shape[1]
    most = keys if window is None else window + queries
    if not queries <= keys <= most:
        raise ValueError(
            f"{keys} keys for {queries} queries: expected {queries} to {most}, the last of the queries' own"
        )
    if window is None and valid is None and queries not in (1, keys):
        raise ValueError(f"{keys} keys for {queries} queries: expected valid (B, K), which says which of them are seen")
    if valid is not None and (valid.shape != k.shape[:2] or valid.dtype != torch.bool):
        found = f"{valid.dtype} {tuple(valid.shape)}"
        raise ValueError(f"valid is {found}; expected torch.bool (B, K) = {tuple(k.shape[:2])}")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Checks the arguments of `jrt.ops.selective_scan`; here B and C are its coefficients (B, T, N)."""
    if u.ndim != 3 or A.ndim != 2:
        found = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan: expected u (B, T, E) and A (E, N), got {found}")
    batch, steps, channels = u.shape
    states = A.shape[1]
    if steps == 0:
        raise ValueError("selective_scan: expected at least one step, got T = 0")
    wanted = {
        "u": (u, (batch, steps, channels)),
        "delta": (delta, (batch, steps, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, steps, states)),
        "C": (C, (batch, steps, states)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "gate": (gate, (batch, steps, channels)),
    }
    for name, (x, shape) in wanted.items():
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: expected {name} of shape {shape}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"selective_scan: expected {name} in a floating-point dtype, got {x.dtype}")
        if x.device != u.device:
            raise ValueError(f"selective_scan: expected {name} on u's device {u.device}, got {x.device}")
