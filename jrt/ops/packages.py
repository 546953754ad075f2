"""Optional packages for GPU kernels: Triton, and causal-conv1d, flash-attn and mamba-ssm, which some backends call.

The last three are published as source code only, which needs CUDA's compiler to install, so nothing depends on them. A
backend asks `unavailable` before it serves a call, and gets the package's function from `function`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jrt.ops.registration import constant_when_compiling, without_rule
from jrt.system.breaks import BREAKS, one_line

DEVICE = "cuda"  # the kind of device that the packages compute on
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_unavailable(x: Tensor) -> str | None:
    """The reason why no Triton kernel can run on the device of x; None if one can. Never imports triton.

    On a CPU the kernels run in Triton's interpreter, which TRITON_INTERPRET=1 switches on."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if not (x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")):
        return f"tensors are on {x.device}; expected a CUDA device"
    return None


def unavailable(package: str, module: str, name: str, tensors: Sequence[Tensor | None]) -> str | None:
    """The reason why a package's function cannot be called with these tensors; None if nothing speaks against it.

    Args:
        package: its name on the package index.
        module, name: where its function is.
        tensors: those given to the function; None for one that is left out.
    """
    given = [x for x in tensors if x is not None]
    if any(x.device.type != DEVICE for x in given):
        return f"tensors are on {given[0].device}; expected a CUDA device"
    if reason := _missing(package, module, name):
        return reason
    return without_rule(given)


def unordered_sums(package: str, tensors: Sequence[Tensor | None]) -> str | None:
    """The reason why a package whose gradients differ from run to run cannot serve the call; None if nobody asks for
    reproducible ones. Its kernels add in an order that changes."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if wanted and torch.are_deterministic_algorithms_enabled():
        return f"the gradients of {package} differ from run to run, and torch.use_deterministic_algorithms is on"
    return None


def function(module: str, name: str) -> Callable:
    """A function of a package for which `unavailable` returns None."""
    return getattr(importlib.import_module(module), name)


def once_differentiable(y: Tensor, instead: str) -> Tensor:
    """y; a second derivative through it raises ValueError, because the package would leave out a part of it.

    instead: what to call for a second derivative."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled():  # the backward pass is recorded to be differentiated
            raise ValueError(f"a second derivative is wanted and the package has none: call {instead}")

    if y.requires_grad:
        y.register_hook(refuse)
    return y


@constant_when_compiling
def _missing(package: str, module: str, name: str) -> str | None:
    return _probe(package, module, name)


@functools.cache
def _probe(package: str, module: str, name: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        found = importlib.import_module(module)
    except BREAKS as error:
        return f"{package} is installed and cannot be imported ({one_line(error)}): build it again on this machine"
    if not hasattr(found, name):
        return f"{package} is installed and has no {module}.{name}: install another version"
    return None
