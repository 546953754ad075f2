"""Measures time and memory of the layers around linear attention, each in several implementations.

The shapes are those of training JRT-360M.

    python benchmarks/layers.py [--layer NAME] [--output FILE]

Outputs and gradients are first compared with fp64 on one text of the batch; a wrong implementation is not timed. The
time is that of a captured CUDA graph, as in op_training.py. The implementation "here" is what jrt/ calls; in training
the model is compiled. An implementation that is not installed or cannot run gets a row with the reason.

Shapes: B batch, T tokens, E width, H heads, D head size, F hidden units of the MLP, K taps, W earlier keys of a window.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import record
import torch
import torch.nn.functional as F
from op_training import captured, median_ms
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention.varlen import varlen_attn

from jrt.config import presets
from jrt.mixers.attention import rotary_angles
from jrt.model import RMSNorm
from jrt.ops import rotary_pytorch, short_convolution, silu_convolution, softmax_attention, split_rotated
from jrt.ops.attention_pytorch import compiled_window_attention

CONFIG = presets()["jrt-360m"]
B, T, E, H, M = 16, 2048, CONFIG.width, CONFIG.heads, CONFIG.enc_length
D, W, K, EPS = E // H, CONFIG.window_of(CONFIG.pattern.index("S")), CONFIG.conv_kernel, CONFIG.norm_eps
BF16 = torch.bfloat16
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Layer:
    inputs: Callable[[int], list[Tensor]]  # of a batch size
    exact: Call  # the definition, for inputs in fp64
    implementations: dict[str, Call | str]  # by name; a string: why it cannot be measured


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def projection(units: int) -> Tensor:
    """(E, units)"""
    return normal(E, units) / units**0.5


def compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def installed(package: str, call: Call) -> Call | str:
    return call if importlib.util.find_spec(package) else f"{package} is not installed"


# ---- gated short convolution and the projection after it


def gated(convolve: Callable[..., Tensor]) -> Call:
    """The projection of silu(convolution of the first half) times the second half of x (B, T, 2 E)."""

    def call(x: Tensor, taps: Tensor, weight: Tensor, *state: Tensor) -> tuple[Tensor]:
        u, gate = x.chunk(2, -1)
        return (F.linear(F.silu(convolve(u, taps, *state)) * gate, weight),)

    return call


def convolution_shifted(u: Tensor, taps: Tensor, state: Tensor | None = None) -> Tensor:
    return short_convolution(u, taps, None, state)[0]


def convolution_cudnn(u: Tensor, taps: Tensor, state: Tensor | None = None) -> Tensor:
    before = u.new_zeros(u.shape[0], K - 1, u.shape[2]) if state is None else state
    u = torch.cat([before, u], 1).mT
    return F.conv1d(u, taps[:, None].to(u.dtype), groups=u.shape[1]).mT


def convolution_triton(x: Tensor, taps: Tensor, weight: Tensor, *state: Tensor) -> tuple[Tensor]:
    return (torch.ops.jrt.gated_convolution_linear(x, taps, None, weight, None, *state),)


def convolution_fla(x: Tensor, taps: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor]:
    from fla.modules.causal_conv1d import causal_conv1d

    u, gate = x.chunk(2, -1)
    before = None if state is None else F.pad(state.mT, (1, 0))  # fla keeps K columns
    return (F.linear(causal_conv1d(u.contiguous(), taps, initial_state=before, activation="silu")[0] * gate, weight),)


def convolution_dao(x: Tensor, taps: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor]:
    u, gate = x.chunk(2, -1)
    return (F.linear(silu_convolution(u, taps, None, state, backend="causal-conv1d")[0] * gate, weight),)


def convolution(with_state: bool) -> Layer:
    channels = CONFIG.conv_channels

    def inputs(batch: int) -> list[Tensor]:
        found = [normal(batch, T, 2 * channels), normal(channels, K, dtype=torch.float32), projection(channels)]
        return [*found, normal(batch, K - 1, channels)] if with_state else found

    shifted = gated(convolution_shifted)
    implementations = {
        "PyTorch": shifted,
        "PyTorch, compiled": compiled(shifted),
        "PyTorch's conv1d (cuDNN), compiled": compiled(gated(convolution_cudnn)),
        "here, Triton": convolution_triton,
        "flash-linear-attention": installed("fla", convolution_fla),
        "causal-conv1d": installed("causal_conv1d", convolution_dao),
    }
    return Layer(inputs, shifted, implementations)


# ---- residual and RMSNorm


RMS_NORM = RMSNorm(E, EPS)


def norm_here(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, functional_call(RMS_NORM, {"weight": weight}, (x,)).to(y.dtype)


def norm_torch(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, F.rms_norm(x, (E,), weight, EPS).to(y.dtype)


def norm_liger(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    y, x = LigerFusedAddRMSNormFunction.apply(y.to(x.dtype), x, weight, EPS, 0.0, "gemma", False)
    return x, y.to(BF16)


def norm() -> Layer:
    def inputs(batch: int) -> list[Tensor]:
        return [normal(batch, T, E, dtype=torch.float32), normal(batch, T, E), normal(E, dtype=torch.float32)]

    implementations = {
        "here": norm_here,
        "here, compiled": compiled(norm_here),
        "F.rms_norm": norm_torch,
        "F.rms_norm, compiled": compiled(norm_torch),
        "Liger": installed("liger_kernel", norm_liger),
    }
    return Layer(inputs, norm_torch, implementations)


# ---- SwiGLU and the projection after it


def swiglu_pytorch(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    value, gate = x.chunk(2, -1)
    return (F.linear(value * F.silu(gate), weight),)


def swiglu_triton(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (torch.ops.jrt.swiglu_linear(x, weight, None),)


def swiglu_liger(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    value, gate = x.chunk(2, -1)
    return (F.linear(LigerSiLUMulFunction.apply(gate, value), weight),)


def swiglu() -> Layer:
    implementations = {
        "PyTorch": swiglu_pytorch,
        "PyTorch, compiled": compiled(swiglu_pytorch),
        "here, Triton": swiglu_triton,
        "Liger": installed("liger_kernel", swiglu_liger),
    }
    units = CONFIG.mlp_width
    return Layer(lambda batch: [normal(batch, T, 2 * units), projection(units)], swiglu_pytorch, implementations)


# ---- rotary positions


def rotary() -> Layer:
    cos, sin = rotary_angles(torch.arange(T, device="cuda")[None], CONFIG.rotary_dim)  # (1, T, 1, D / 2)

    def split(function: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda qkv: function(qkv, cos.expand(len(qkv), -1, -1, -1), sin.expand(len(qkv), -1, -1, -1), H)

    def liger(qkv: Tensor) -> tuple[Tensor, ...]:
        from liger_kernel.ops.rope import LigerRopeFunction

        angles = (torch.cat([a[:, :, 0], a[:, :, 0]], -1).to(qkv.dtype) for a in (cos, sin))
        q, k, v = (part.transpose(1, 2) for part in qkv.clone().unflatten(-1, (3 * H, D)).chunk(3, 2))
        q, k = LigerRopeFunction.apply(q, k, *angles)  # it rotates in place
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    plain = split(rotary_pytorch.split_rotated)
    implementations = {
        "here": split(split_rotated),
        "PyTorch": plain,
        "PyTorch, compiled": compiled(plain),
        "Liger": installed("liger_kernel", liger),
    }
    return Layer(lambda batch: [normal(batch, T, 3 * H * D)], plain, implementations)


# ---- sliding window


def window_here(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (softmax_attention(q, k, v, scale=D**-0.5, window=W, backend="sdpa"),)


def window_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """Attention with one T x T mask. It also serves as the definition."""
    age = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # (T, T)
    mask = (age >= 0) & (age <= W)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2),)


def window_flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (compiled_window_attention(q, k, v, W, D**-0.5),)


def window_varlen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    ends = torch.arange(0, (q.shape[0] + 1) * T, T, device=q.device, dtype=torch.int32)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (varlen_attn(q, k, v, ends, ends, T, T, window_size=(W, 0)).unflatten(0, (-1, T)),)


def window_dao(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (softmax_attention(q, k, v, scale=D**-0.5, window=W, backend="flash-attn"),)


def window() -> Layer:
    has_window = "window_size" in inspect.signature(varlen_attn).parameters
    flash: Call | str = window_varlen if has_window else "this PyTorch's varlen_attn knows no window"
    implementations = {
        "here, blocks with a mask": window_here,
        "here, blocks with a mask, compiled": compiled(window_here),
        "here in compiled training, FlexAttention": compiled(window_flex),
        "SDPA, dense mask": window_dense,
        "PyTorch's FlashAttention-2 (varlen_attn)": flash,
        "flash-attn": installed("flash_attn", window_dao),
    }
    return Layer(lambda batch: [normal(batch, T, H, D) for _ in range(3)], window_dense, implementations)


# ---- projections of linear attention, of the text and of the prefix

SIZES = (CONFIG.linear_heads * CONFIG.feature_dim,) * 2 + (E,)  # of q, k, v


def projections_apart(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    q, k, v, prefix_k, prefix_v = (weight.to(x.dtype) for weight in weights)
    prefix = x[:, :M]
    return F.linear(x, q), F.linear(x, k), F.linear(x, v), F.linear(prefix, prefix_k), F.linear(prefix, prefix_v)


def projections_joined(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    text, prefix = (torch.cat(part).to(x.dtype) for part in (weights[:3], weights[3:]))
    return *F.linear(x, text).split(SIZES, -1), *F.linear(x[:, :M], prefix).split(SIZES[1:], -1)


def projections() -> Layer:
    def inputs(batch: int) -> list[Tensor]:
        weights = (normal(size, E, dtype=torch.float32) / E**0.5 for size in (*SIZES, *SIZES[1:]))
        return [normal(batch, T, E), *weights]

    implementations = {
        "one product each": projections_apart,
        "one product each, compiled": compiled(projections_apart),
        "one for the text, one for the prefix": projections_joined,
        "one for the text, one for the prefix, compiled": compiled(projections_joined),
    }
    return Layer(inputs, projections_apart, implementations)


LAYERS: dict[str, Callable[[], Layer]] = {
    "sliding window": window,
    "gated short convolution": functools.partial(convolution, False),
    "SwiGLU": swiglu,
    "residual + RMSNorm": norm,
    "projections of P": projections,
    "rotary": rotary,
    "gated short convolution, from a state": functools.partial(convolution, True),
}


# ---- right, and how fast?


def with_gradients(call: Call, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def first_row(tensors: list[Tensor]) -> list[Tensor]:
    """Keeps the first row of tensors that have one row for each text. The other tensors are weights."""
    return [x[:1] if x.shape[0] == B else x for x in tensors]


def errors(call: Call, layer: Layer, inputs: list[Tensor]) -> list[float]:
    """Returns the relative errors of outputs and gradients on the first text of the batch, against the definition in
    fp64.

    The other texts get an output gradient of zero, so that the weights' gradients come from the first text alone.
    """
    wide = [x.double() for x in first_row(inputs)]
    with torch.no_grad():
        grads = [torch.randn_like(x) for x in layer.exact(*wide)]
    truth = with_gradients(layer.exact, wide, grads)
    given = []
    for output, grad in zip(call(*(x.detach().requires_grad_() for x in inputs)), grads, strict=True):
        given.append(torch.zeros_like(output))
        given[-1][:1] = grad
    pairs = zip(first_row(with_gradients(call, inputs, given)), truth, strict=True)
    return [((value.double() - right).norm() / right.norm()).item() for value, right in pairs]


def measure(name: str, layer: Layer, implementation: str, allowed: list[float]) -> list[dict]:
    """Returns a row for the forward pass and one for forward + backward.

    `allowed`: largest errors that count as right."""
    call = layer.implementations[implementation]
    passes = ("forward", "forward+backward")
    rows: list[dict] = [
        {"layer": name, "implementation": implementation, "pass": each, "shape": {"B": B, "T": T}, "ms": None}
        for each in passes
    ]
    if isinstance(call, str):
        return [row | {"reason": call} for row in rows]
    torch.manual_seed(0)
    inputs = layer.inputs(B)
    try:
        found = errors(call, layer, inputs)
        if not all(error <= most for error, most in zip(found, allowed, strict=True)):
            return [row | {"reason": f"wrong result: errors {found}, at most {allowed} count as right"} for row in rows]
        leaves = [x.detach().requires_grad_() for x in inputs]
        grads = [torch.randn_like(x) for x in call(*leaves)]
        runs = (lambda: call(*leaves), lambda: with_gradients(call, inputs, grads))
        for row, run in zip(rows, runs, strict=True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept = run()
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            del kept
            graph = captured(run)
            row["ms"] = median_ms(graph.replay, 20)
            row["largest_error"] = max(found)
    except (RuntimeError, ImportError, TypeError, torch.cuda.OutOfMemoryError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        return [row if row["ms"] else row | {"reason": reason} for row in rows]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layer", choices=LAYERS, action="append", help="only this one; may be given again")
    parser.add_argument("--output", type=Path, help="where the JSON goes; the default is benchmarks/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("layers.py measures a GPU: no CUDA device found")
    rows: list[dict] = []
    for name in arguments.layer or LAYERS:
        layer = LAYERS[name]()
        torch.manual_seed(0)
        first = next(iter(layer.implementations.values()))
        allowed = [2 * error + 1e-6 for error in errors(first, layer, layer.inputs(B))]
        for implementation in layer.implementations:
            torch.cuda.empty_cache()
            found = measure(name, layer, implementation, allowed)
            rows += found
            record.write("layers", rows, arguments.output)
            figures = ", ".join(f"{row['ms']:.3f} ms" if row["ms"] else row["reason"] for row in found)
            print(f"{name:40} {implementation:50} {figures}", flush=True)


if __name__ == "__main__":
    main()
