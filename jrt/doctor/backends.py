"""Runs every backend of every op on small random inputs and compares it with the definition in float64.

"The definition" is the backend "reference", or PyTorch for layers that have no other definition. Each backend sums in
another order, so it may be up to twice as far from the float64 result as the definition is when it computes in the same
dtype.

Shapes: as in `jrt.ops`; B = 2, T = 130 (no multiple of a chunk), H = 2, d = 16, D = 64.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jrt.ops import (
    BACKENDS,
    State,
    encode_prefix,
    linear_attention,
    prefix_linear_attention,
    selective_scan,
    silu_convolution,
    softmax_attention,
)
from jrt.ops.gated import BACKENDS as CONVOLUTION_BACKENDS
from jrt.ops.selective_scan import BACKENDS as SCAN_BACKENDS
from jrt.ops.softmax_attention import BACKENDS as ATTENTION_BACKENDS

TIMES = 2.0
"""The largest error of a backend, as a multiple of the definition's error in the same dtype."""
STATE_FLOOR = 1e-6
"""Added to the bound of outputs in float32, in case the definition happens to round well. For outputs in half precision
it is a quarter of the dtype's resolution (eps)."""
STEPS, HEADS, KEY, VALUE, STATES, TAPS, WINDOW = 130, 2, 16, 64, 8, 4, 20


class BackendCheck(NamedTuple):
    """The result for one op, backend, device and dtype.

    Args:
        error: relative error (norm of the difference over norm) of the output that is nearest to its bound; None if the
            backend cannot serve the call.
        bound: the largest error that this output may have.
        reason: why the backend cannot serve the call.
    """

    op: str
    backend: str
    device: str
    dtype: str
    error: float | None
    bound: float
    reason: str

    @property
    def holds(self) -> bool | None:
        return None if self.error is None else self.error <= self.bound


class _Op(NamedTuple):
    name: str
    backends: tuple[str, ...]
    call: Callable[..., tuple[Tensor, ...]]  # of inputs by name, and `backend`
    inputs: dict[str, Tensor]  # in float64
    definition: str = "reference"  # the backend that is right


def check_backends() -> list[BackendCheck]:
    """Checks all ops with all backends, on all kinds of devices of this machine, in float32 and bfloat16."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for op in _ops():
        for device in devices:
            for dtype in (torch.float32, torch.bfloat16):
                inputs = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in op.inputs.items()}
                truth = op.call(**{name: _wide(x) for name, x in inputs.items()}, backend=op.definition)
                inputs = {name: x.to(device) for name, x in inputs.items()}
                found += [_check(op, backend, device, dtype, inputs, truth) for backend in op.backends]
    return found


def _check(op: _Op, backend: str, device: str, dtype: torch.dtype, inputs: dict, truth: tuple) -> BackendCheck:
    name = str(dtype).removeprefix("torch.")
    try:
        outputs = op.call(**inputs, backend=backend)
    except ValueError as refusal:
        return BackendCheck(op.name, backend, device, name, None, 0.0, str(refusal))
    eager = op.call(**inputs, backend=op.definition)
    errors = []
    for x, same_dtype, exact in zip(outputs, eager, truth, strict=True):
        floor = STATE_FLOOR if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 4
        errors.append((_error(x, exact), TIMES * _error(same_dtype, exact) + floor))
    error, bound = max(errors, key=lambda pair: pair[0] / pair[1])
    return BackendCheck(op.name, backend, device, name, error, bound, "")


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x.cpu().double() - exact).norm() / exact.norm())


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.double()


def _attend(S: Tensor, z: Tensor, mask: Tensor | None = None, **call: Any) -> tuple[Tensor, ...]:
    """o, S and z of `linear_attention`; o is set to zero at padding, where its value has no meaning."""
    dtype = torch.promote_types(S.dtype, torch.float32)
    o, state = linear_attention(initial_state=State(S.to(dtype), z.to(dtype)), mask=mask, **call)
    return o if mask is None else o * mask[:, :, None, None], state.S, state.z


def _convolve(u: Tensor, **call: Any) -> tuple[Tensor, ...]:
    """`silu_convolution`, as in training: some backends serve nothing else."""
    y, state = silu_convolution(u.clone().requires_grad_(), **call)
    return y.detach(), state.detach()


def _softmax_attention(window: int | None, **call: Any) -> tuple[Tensor, ...]:
    return (softmax_attention(scale=VALUE**-0.5, window=window, **call),)


def _attend_after_prefix(mask: Tensor, **call: Any) -> tuple[Tensor, ...]:
    """o, with zeros at padding, S and z of `prefix_linear_attention`."""
    o, state = prefix_linear_attention(mask=mask, **call)
    return o * mask[:, :, None, None], state.S, state.z


def _ops() -> list[_Op]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = random(2, STEPS, HEADS, KEY), random(2, STEPS, HEADS, KEY)
    v = random(2, STEPS, HEADS, VALUE)
    mask = torch.arange(STEPS)[None] >= torch.tensor([[0], [37]])  # (B, T), the second row padded on the left
    S, z = encode_prefix(random(2, 50, HEADS, KEY), random(2, 50, HEADS, VALUE), backend="reference")
    token = {"q": q[:, :1], "k": k[:, :1], "v": v[:, :1], "S": S, "z": z}
    pair = {"q": q, "k": k, "v": v, "mask": mask, "prefix_k": q[:, :50] / 2, "prefix_v": v[:, 50:100] / 2}
    scan = {
        "u": random(2, STEPS, VALUE),
        "delta": random(2, STEPS, VALUE).abs(),
        "A": -random(VALUE, STATES).abs(),
        "B": random(2, STEPS, STATES),
        "C": random(2, STEPS, STATES),
        "D": random(VALUE),
        "initial_state": random(2, VALUE, STATES),
    }
    from_zero = {name: x for name, x in scan.items() if name != "initial_state"}
    from_zero |= {"delta_bias": random(VALUE), "gate": random(2, STEPS, VALUE)}
    taps, starts = random(VALUE, TAPS), {"state": random(2, TAPS - 1, VALUE)}
    convolution = {"u": random(2, STEPS, VALUE), "weight": taps, "bias": random(VALUE)}
    attention = {name: random(2, STEPS, HEADS, VALUE) for name in "qkv"}
    full, windowed = functools.partial(_softmax_attention, None), functools.partial(_softmax_attention, WINDOW)
    return [
        _Op("encode_prefix", tuple(BACKENDS), encode_prefix, {"k": k, "v": v, "mask": mask}),
        _Op("linear_attention", tuple(BACKENDS), _attend, {"q": q, "k": k, "v": v, "mask": mask, "S": S, "z": z}),
        _Op("linear_attention, one token", tuple(BACKENDS), _attend, token),
        _Op("prefix_linear_attention", tuple(BACKENDS), _attend_after_prefix, pair | {"prefix_mask": mask[:, :50]}),
        _Op("selective_scan", tuple(SCAN_BACKENDS), selective_scan, scan),
        _Op("selective_scan, from zero", tuple(SCAN_BACKENDS), selective_scan, from_zero),
        _Op("short convolution", CONVOLUTION_BACKENDS, _convolve, convolution, "pytorch"),
        _Op("short convolution, from a state", CONVOLUTION_BACKENDS, _convolve, convolution | starts, "pytorch"),
        _Op("softmax attention", ATTENTION_BACKENDS, full, attention, "sdpa"),
        _Op("sliding window", ATTENTION_BACKENDS, windowed, attention, "sdpa"),
    ]
