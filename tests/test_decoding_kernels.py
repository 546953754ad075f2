"""The Triton kernels of a decoding step compile for several GPUs, without one, at the sizes of released models."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from jrt import presets
from jrt.model import LanguageModel

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes that a program may have
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true",
    reason="triton is not installed",
)


def launches(preset: str, rows: int, dtype: torch.dtype, architecture: int, monkeypatch) -> list[tuple]:
    """(kernel, arguments by name) of each launch of one step, which does not run."""
    from triton.runtime.jit import JITFunction

    from jrt.decoding.fused import FusedStep
    from jrt.ops.steps import launch

    seen: list[tuple] = []

    def record(kernel: Any, grid: Any):
        return lambda *given, **named: seen.append((kernel, dict(zip(kernel.arg_names, given, strict=False)) | named))

    monkeypatch.setattr(JITFunction, "__getitem__", record)
    monkeypatch.setattr(launch, "overlaps", lambda device: architecture >= 90)
    with torch.device("meta"), torch.no_grad():
        step = FusedStep(LanguageModel(presets()[preset]).to(dtype), rows, 2048)
        step.advance(torch.zeros(rows, dtype=torch.long))
    return seen


def compiled(kernel: Any, arguments: dict[str, Any], architecture: int):
    """The kernel for these arguments; all tensors are taken to be aligned, as those of a step are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, known, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], known[(i,)] = "constexpr", value
            continue
        signature[name] = POINTERS[value.dtype] if torch.is_tensor(value) else {int: "i32", float: "fp32"}[type(value)]
        if torch.is_tensor(value) or (type(value) is int and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "launch_pdl") if name in arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def check(preset: str, rows: int, dtype: torch.dtype, architecture: int, monkeypatch) -> None:
    """Each different launch of a step compiles within the shared memory of the GPU."""
    done = set()
    for kernel, arguments in launches(preset, rows, dtype, architecture, monkeypatch):
        key = kernel, *(value for name, value in arguments.items() if not torch.is_tensor(value))
        if key in done:
            continue
        done.add(key)
        assert compiled(kernel, arguments, architecture).metadata.shared <= SHARED[architecture], arguments
    assert done


@needs_triton
@pytest.mark.parametrize(
    ("preset", "rows", "dtype", "architecture"),
    [
        ("jrt-360m", 1, torch.bfloat16, 86),
        *(
            pytest.param(preset, rows, dtype, architecture, marks=pytest.mark.slow)
            for preset in ("jrt-360m", "mamba-360m")
            for rows in (1, 16, 128)
            for dtype in (torch.bfloat16, torch.float32)
            for architecture in (80, 86, 89)
        ),
        *(
            pytest.param(preset, rows, dtype, architecture, marks=pytest.mark.slow)
            for preset, rows, dtype, architecture in (
                ("jrt-1.3b", 128, torch.bfloat16, 86),
                ("based-360m", 1, torch.float16, 80),
                ("attention-360m", 16, torch.bfloat16, 89),
                ("jrt-360m", 128, torch.bfloat16, 90),
            )
        ),
    ],
)
def test_compiled_for_other_gpus(preset, rows, dtype, architecture, monkeypatch):
    check(preset, rows, dtype, architecture, monkeypatch)
