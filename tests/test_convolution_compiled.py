"""The short convolution's Triton kernels are compiled for real GPUs. That needs Triton's compiler and no GPU."""

from typing import Any

import pytest
import torch
from test_decoding_kernels import compiled, needs_triton

CHANNELS, STEPS, TAPS = 256, 300, 4


def launches(monkeypatch, names: set[str], dtype: torch.dtype, is_gated: bool) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels of a convolution forward and backward with their arguments, recorded instead of run.

    names: of state, mask and cu_seqlens, those that are given."""
    from triton.runtime.jit import JITFunction

    from jrt.ops import gated_triton

    seen: list[tuple] = []

    def record(kernel: Any, grid: Any):
        return lambda *given, **named: seen.append((kernel, dict(zip(kernel.arg_names, given, strict=False)) | named))

    monkeypatch.setattr(JITFunction, "__getitem__", record)
    batch = 1 if "cu_seqlens" in names else 2
    x = torch.zeros(batch, STEPS, CHANNELS * (2 if is_gated else 1), dtype=dtype)
    given = {
        "state": torch.zeros(2, TAPS - 1, CHANNELS, dtype=dtype),
        "mask": torch.ones(batch, STEPS, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 100, STEPS]),
    }
    arguments = (torch.zeros(CHANNELS, TAPS), torch.zeros(CHANNELS))
    arguments += tuple(value if name in names else None for name, value in given.items())
    y = gated_triton.convolution(x, *arguments, is_gated)
    gated_triton.convolution_backward(x, *arguments, torch.zeros_like(y), is_gated)
    assert len(seen) == 2
    return seen


@needs_triton
@pytest.mark.parametrize(
    ("names", "is_gated", "architecture"),
    [
        (set(), True, 90),
        ({"mask"}, False, 80),
        ({"state", "mask"}, False, 90),
        ({"state", "cu_seqlens"}, False, 90),
        ({"state", "cu_seqlens"}, True, 80),
    ],
)
def test_every_form_compiles(monkeypatch, names, is_gated, architecture):
    for kernel, arguments in launches(monkeypatch, names, torch.bfloat16, is_gated):
        assert compiled(kernel, arguments, architecture).metadata.shared <= 48 * 1024
