"""Registers an operator with PyTorch, so that torch.compile treats it as a single node; what such operators cannot do.

`torch.library.custom_op` would be shorter, but its first call imports torch._dynamo. That takes seconds, also in a
process that compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def register(name: str, signature: str, kernel: Callable, fake: Callable) -> None:
    """Defines the operator jrt::name for all devices.

    Args:
        signature: arguments and results in PyTorch's schema language.
        kernel: computes the results.
        fake: has the same arguments, and returns empty tensors with the results' shapes and dtypes.
    """
    torch.library.define(f"jrt::{name}", signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"jrt::{name}", "default", kernel)
    torch.library.register_fake(f"jrt::{name}", fake)


def constant_when_compiling(function: Callable) -> Callable:
    """Decorates a function that torch.compile cannot trace: its result when compiling becomes a constant of the graph.

    Does what `torch.compiler.assume_constant_result` does, without importing the compiler."""
    vars(function)["_dynamo_marked_constant"] = True
    return function


def without_rule(tensors: Iterable[Tensor]) -> str | None:
    """What is wanted of these inputs, that a registered operator has no rule for; None if there is no problem.

    PyTorch says nothing when a forward-mode derivative lacks its rule: it takes zero.
    """
    if torch.compiler.is_compiling():  # it cannot trace the next lines, and compiles no forward-mode derivatives
        return None
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return "a forward-mode derivative is wanted and the kernels have none"
    if torch._C._are_functorch_transforms_active():
        return "it is inside a transform of torch.func and the kernels have no rule for one"
    return None


def refuse_second_derivative(name: str, instead: str = "the op with backend='chunked' or 'reference'") -> None:
    """Makes it an error to differentiate jrt::name, an operator that computes gradients. PyTorch would take zero.

    instead: what to call for a second derivative."""

    def refuse(ctx, *gradients: Tensor) -> None:
        raise ValueError(f"a second derivative is wanted and the kernels have none: call {instead}")

    torch.library.register_autograd(f"jrt::{name}", refuse)
