"""Checks of the arguments of the functions of `jrt.ops`. Each raises ValueError with what was expected.

Shapes: B batch, N packed sequences, T tokens, H heads, d query/key size, D value size, F features, E channels, K taps,
R = half the rotary dimensions, rounded up.
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


def floating(name: str, x: object, device: torch.device | None = None, other: str = "k") -> None:
    """device, other: as in `tensor`."""
    tensor(name, x, device, other)
    assert isinstance(x, Tensor)
    if x.dtype not in FLOATING:
        raise ValueError(f"{name} is {x.dtype}; expected a floating-point dtype of 16 bits or more")


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
    floating("log_decay", log_decay, k.device)
    if log_decay.shape != (k.shape[2],):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; expected (H,) = ({k.shape[2]},)")


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
        floating(f"initial_state.{name}", part, k.device)
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
    floating("u", u)
    floating("weight", weight, u.device, "u")
    for name, x in (("bias", bias), ("state", state)):
        if x is not None:
            floating(name, x, u.device, "u")
    if mask is not None:
        tensor("mask", mask, u.device, "u")
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
    floating("q", q)
    for name, x in (("k", k), ("v", v)):
        floating(name, x, q.device, "q")
    if q.ndim != 4 or k.shape != v.shape or k.shape[:1] + k.shape[2:] != q.shape[:1] + q.shape[2:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"expected q (B, T, H, D), k and v (B, K, H, D), got {shapes}")
    if 0 in q.shape:
        raise ValueError(f"expected at least one query, got q {tuple(q.shape)}")
    if window is not None and (type(window) is not int or window < 0):
        raise ValueError(f"window is {window!r}; expected the number of earlier tokens, at least 0")
    queries, keys = q.shape[1], k.shape[1]
    most = keys if window is None else window + queries
    if not queries <= keys <= most:
        raise ValueError(
            f"{keys} keys for {queries} queries: expected {queries} to {most}, the last of the queries' own"
        )
    if window is None and valid is None and queries not in (1, keys):
        raise ValueError(f"{keys} keys for {queries} queries: expected valid (B, K), which says which of them are seen")
    if valid is None:
        return
    tensor("valid", valid, q.device, "q")
    if valid.shape != k.shape[:2] or valid.dtype != torch.bool:
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
    floating("selective_scan: u", u)
    floating("selective_scan: A", A, u.device, "u")
    if u.ndim != 3 or A.ndim != 2:
        found = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"selective_scan: expected u (B, T, E) and A (E, N), got {found}")
    batch, steps, channels = u.shape
    states = A.shape[1]
    if 0 in u.shape or 0 in A.shape:
        found = f"u {tuple(u.shape)} and A {tuple(A.shape)}"
        raise ValueError(f"selective_scan: expected at least one step, got {found}")
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
        if x is None and name not in ("delta", "B", "C"):
            continue
        floating(f"selective_scan: {name}", x, u.device, "u")
        assert x is not None
        if tuple(x.shape) != shape:
            raise ValueError(f"selective_scan: expected {name} of shape {shape}, got {tuple(x.shape)}")


def halves(x: Tensor) -> None:
    """x: values and gate, side by side in the last dimension."""
    floating("x", x)
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected an even last dimension: values, then gate")


def rotation(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Checks the arguments of `jrt.ops.split_rotated`."""
    floating("qkv", qkv)
    for name, x in (("cos", cos), ("sin", sin)):
        floating(name, x, qkv.device, "qkv")
    if qkv.ndim != 3 or type(heads) is not int or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (B, T, 3 H D) for H = {heads!r} heads")
    size = qkv.shape[2] // (3 * heads)
    if cos.shape != sin.shape or cos.shape[:-1] != (*qkv.shape[:2], 1) or 2 * cos.shape[-1] > size:
        raise ValueError(
            f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}; expected (B, T, 1, R) = "
            f"{(*qkv.shape[:2], 1)} and R at most D / 2 = {size / 2}"
        )
