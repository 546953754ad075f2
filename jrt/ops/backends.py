"""The backends of linear attention in the order in which they are tried.

A backend is a module with

    unsupported(call) -> str | None           the reason why it cannot serve the call; None if it can
    linear_attention(call) -> (o, State)
    encode_prefix(call) -> State
    prefix_linear_attention(call) -> (o, State)

They are differentiable wherever `unsupported` lets a call pass whose inputs require a gradient.
"""

from __future__ import annotations

from types import ModuleType

from jrt.ops import chunked, cuda, cuda_backward, reference, triton  # noqa: F401 - cuda_backward registers an operator
from jrt.ops.call import Call

TABLE = {"cuda": cuda, "triton": triton, "chunked": chunked, "reference": reference}


def choose(call: Call, backend: str | None) -> ModuleType:
    """The backend that was asked for, or the first that can serve the call.

    Raises:
        ValueError: there is no such backend, or it cannot serve the call.
    """
    if backend is None:
        return next(module for module in TABLE.values() if module.unsupported(call) is None)
    if not isinstance(backend, str) or backend not in TABLE:
        raise ValueError(f"backend {backend!r}: expected one of {tuple(TABLE)}, or None for the fastest")
    if reason := TABLE[backend].unsupported(call):
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return TABLE[backend]
