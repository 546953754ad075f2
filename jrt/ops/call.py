"""One call of linear attention, and one of the selective scan, as their backends receive it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from jrt.ops.feature_map import State


class Call(NamedTuple):
    """Checked arguments of `jrt.ops.linear_attention`; with q = None, those of `jrt.ops.encode_prefix`."""

    q: Tensor | None  # (B, T, H, d)
    k: Tensor  # (B, T, H, d)
    v: Tensor  # (B, T, H, D)
    initial_state: State | None = None
    mask: Tensor | None = None  # (B, T) bool
    log_decay: Tensor | None = None  # (H,)
    normalize: bool = True
    cu_seqlens: Tensor | None = None  # (N + 1,)
    prefix: Call | None = None  # keys and values (B, M, H, .) of a prefix; initial_state is None then

    def tensors(self) -> list[Tensor]:
        """All floating-point tensors that are not None."""
        given = (self.q, self.k, self.v, *(self.initial_state or ()), self.log_decay)
        of_prefix = [] if self.prefix is None else self.prefix.tensors()
        return [x for x in given if x is not None] + of_prefix

    def after_prefix(self, state: State) -> Call:
        """The call of `linear_attention` that remains when the prefix has been read."""
        return self._replace(prefix=None, initial_state=state)

    def without_padding(self) -> Call:
        """The call with keys and values of padding set to zero. They may hold NaN, and 0 times NaN would be NaN."""
        if self.mask is None:
            return self
        padding = ~self.mask[:, :, None, None]
        return self._replace(k=self.k.masked_fill(padding, 0), v=self.v.masked_fill(padding, 0))


class ScanCall(NamedTuple):
    """Checked arguments of `jrt.ops.selective_scan`."""

    u: Tensor  # (B, T, E)
    delta: Tensor  # (B, T, E)
    A: Tensor  # (E, N)
    B: Tensor  # (B, T, N)
    C: Tensor  # (B, T, N)
    D: Tensor | None  # (E,)
    delta_bias: Tensor | None  # (E,)
    initial_state: Tensor | None  # (B, E, N)
    gate: Tensor | None  # (B, T, E)

    def tensors(self) -> list[Tensor]:
        """All that are not None."""
        return [x for x in self if x is not None]


Result = TypeVar("Result")


def in_given_dtypes(function: Callable[[Call], Result]) -> Callable[[Call], Result]:
    """Decorates a function of a call, so that autocast does not reach into it: its products run in the dtypes that it
    chooses, and its states stay in fp32."""

    @functools.wraps(function)
    def run(call: Call) -> Result:
        device = call.k.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(call)
        with torch.autocast(device, enabled=False):
            return function(call)

    return run
