"""The rule by which every op chooses its backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def choose(backend: str | None, order: Sequence[str], unsupported: Callable[[str], str | None]) -> str:
    """The backend that was asked for, or the first that can serve the call.

    Args:
        backend: its name; None for the first.
        order: the names of all backends, the fastest first.
        unsupported: gives for a name the reason why that backend cannot serve the call; None if it can.

    Raises:
        ValueError: there is no such backend, or it cannot serve the call.
    """
    if backend is None:
        return next(name for name in order if unsupported(name) is None)
    if backend not in order:
        raise ValueError(f"backend {backend!r}: expected one of {tuple(order)}, or None for the fastest")
    if reason := unsupported(backend):
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend
