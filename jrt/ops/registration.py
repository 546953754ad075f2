"""How an operator of this package becomes one that PyTorch's compiler knows.

`torch.library.custom_op` would read shorter, but its first call imports torch._dynamo: seconds that a process which
compiles nothing need not wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def register(name: str, signature: str, kernel: Callable, fake: Callable) -> None:
    """Define jrt::name for all devices; `fake` gives shapes and dtypes without computing."""
    torch.library.define(f"jrt::{name}", signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(f"jrt::{name}", "default", kernel)
    torch.library.register_fake(f"jrt::{name}", fake)
