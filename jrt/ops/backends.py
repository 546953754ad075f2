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

from jrt.ops import choice, chunked, cuda, cuda_backward, reference, triton  # noqa: F401 - registers operators
from jrt.ops.call import Call

TABLE = {"cuda": cuda, "triton": triton, "chunked": chunked, "reference": reference}


def choose(call: Call, backend: str | None) -> ModuleType:
    """The backend that was asked for, or the first that can serve the call; raises ValueError as
    `jrt.ops.choice.choose`."""
    return TABLE[choice.choose(backend, tuple(TABLE), lambda name: TABLE[name].unsupported(call))]
