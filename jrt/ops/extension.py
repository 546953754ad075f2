"""The extension module `jrt_kernels` (kernels/, built by JRT_BUILD_KERNELS=1): whether it can run here, and tensors as
its functions take them, which know addresses and strides only.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from jrt.ops.registration import constant_when_compiling

INTERFACE = 6  # the version of jrt_kernels that this package calls; 5 could stop forever in the gradients of a prefix
VECTOR_BYTES = 16  # addresses must be multiples of this: the kernels load and store so many bytes at a time


@constant_when_compiling
def missing(device: int) -> str | None:
    """The reason why the kernels cannot run on this device at all; None if they can."""
    return _probe(device)


@functools.cache
def _probe(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"the kernels need a Hopper GPU (compute capability 9.0), this one has {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("jrt_kernels") is None:
        return "the extension jrt_kernels is not built: install with JRT_BUILD_KERNELS=1 and --no-build-isolation"
    try:
        kernels = module()
    except ImportError as error:
        return f"the extension jrt_kernels cannot be loaded ({error}): build it again on this machine"
    if (found := getattr(kernels, "interface", None)) != INTERFACE:
        return f"the extension jrt_kernels has interface {found}, expected {INTERFACE}: build it again"
    return None


@functools.cache
def module() -> ModuleType:
    return importlib.import_module("jrt_kernels")


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def view(x: Tensor | None) -> tuple[int, int, int, int]:
    """Address, and strides (in elements) of batch, token and head."""
    if x is None:
        return 0, 0, 0, 0
    batch, token, head, _ = x.stride()
    return x.data_ptr(), batch, token, head


def mask_view(mask: Tensor | None) -> tuple[int, int]:
    """Address, and stride of batch."""
    return (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))


def aligned(x: Tensor | None) -> Tensor | None:
    """The tensor, copied if its address is no multiple of VECTOR_BYTES, as that of a slice may be."""
    return x if x is None or x.data_ptr() % VECTOR_BYTES == 0 else x.clone()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous_rows(mask: Tensor | None) -> Tensor | None:
    """The mask with a row's tokens contiguous and offsets below 2^31, as the kernels expect; copied if necessary."""
    if mask is None or ((mask.stride(1) == 1 or mask.shape[1] == 1) and mask.shape[0] * mask.stride(0) < 2**31):
        return mask
    return mask.contiguous()
