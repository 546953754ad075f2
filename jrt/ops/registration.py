"""Registers an operator with PyTorch, so that torch.compile treats it as a single node.

`torch.library.custom_op` would be shorter, but its first call imports torch._dynamo. That takes seconds, also in a
process that compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


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
