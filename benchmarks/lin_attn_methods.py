"""The methods that `lin_attn_profile.py` compares: ours, PyTorch's, and those of other libraries if they are installed.

Shapes: B batch, N tokens, H heads, d query/key size, D value size.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from jrt import ops
from jrt.ops import chunked, cuda
from jrt.ops.call import Call

HEADS, DIM, VALUE_DIM = 16, 16, 64
COMPILED = ((1, 32768), (16, 2048), (16, 8192), (16, 16384), (16, 32768))  # (B, N) of the method with torch.compile


@dataclass
class Inputs:
    q: Tensor  # (B, N, H, d)
    k: Tensor  # (B, N, H, d)
    v: Tensor  # (B, N, H, D)
    k_prefix: Tensor | None = None  # (B, N / 2, H, d)
    v_prefix: Tensor | None = None  # (B, N / 2, H, D)

    @property
    def bytes(self) -> int:
        tensors = (self.q, self.k, self.v, self.k_prefix, self.v_prefix)
        return sum(x.nbytes for x in tensors if x is not None)


class Unavailable(Exception):
    """The method cannot run here; the message is the row's reason."""


@dataclass(frozen=True)
class Method:
    name: str
    kind: str  # "linear" or "softmax"
    call: Callable[[Inputs], Tensor]
    available: Callable[[Inputs], str | None] = lambda inputs: None  # reason why not, or None
    kernel: str = ""
    prefix: bool = False
    length_factor: int = 1
    normalized: bool = True
    ours: bool = False

    @property
    def function(self) -> tuple:
        """What it computes: methods that agree on this get the same inputs and have the same right answer."""
        return self.kind, self.prefix, self.length_factor, self.normalized


def jrt_rnn(backend: str) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        return ops.prefix_linear_attention(x.q, x.k, x.v, x.k_prefix, x.v_prefix, backend=backend)[0]

    return call


def based(backend: str) -> Callable[[Inputs], Tensor]:
    return lambda x: ops.linear_attention(x.q, x.k, x.v, backend=backend)[0]


def compiled_based() -> Callable[[Inputs], Tensor]:
    segment = torch.compile(chunked._segment, dynamic=False)

    def call(x: Inputs) -> Tensor:
        with mock.patch.object(chunked, "_segment", segment):
            return ops.linear_attention(x.q, x.k, x.v, backend="chunked")[0]

    return call


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


def flash_attention_3(x: Inputs) -> Tensor:
    from flash_attn_interface import flash_attn_func

    o = flash_attn_func(x.q, x.k, x.v, causal=True)
    return o[0] if isinstance(o, tuple) else o


def flash_attention_4(x: Inputs) -> Tensor:
    from flash_attn.cute import flash_attn_func

    o = flash_attn_func(x.q, x.k, x.v, causal=True)
    return o[0] if isinstance(o, tuple) else o


def fla_based(name: str) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        import fla.ops.based

        return getattr(fla.ops.based, name)(x.q, x.k, x.v, scale=DIM**-0.5, use_norm=True)

    return call


def fast_transformers_product(x: Inputs) -> Tensor:
    from fast_transformers.causal_product import causal_dot_product

    phi_q, phi_k = (ops.taylor_features(y.float()).transpose(1, 2).contiguous() for y in (x.q, x.k))
    numerator = causal_dot_product(phi_q, phi_k, x.v.float().transpose(1, 2).contiguous())
    denominator = (phi_q * phi_k.cumsum(2)).sum(-1, keepdim=True)
    return (numerator / denominator).to(x.v.dtype).transpose(1, 2)


def thunderkittens_based(path: Path) -> Callable[[Inputs], Tensor]:
    """`thunderkittens.based(q, k, v) -> (o, state)` on (B, H, N, .) from a build folder; output not normalised."""

    def call(x: Inputs) -> Tensor:
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        import thunderkittens

        o = thunderkittens.based(*(y.transpose(1, 2).contiguous() for y in (x.q, x.k, x.v)))
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return call


def needs_module(name: str) -> Callable[[Inputs], str | None]:
    top = name.partition(".")[0]

    def reason(_: Inputs) -> str | None:
        found = importlib.util.find_spec(top) is not None and importlib.util.find_spec(name) is not None
        return None if found else f"{name} is not installed"

    return reason


def compiled_here(x: Inputs) -> str | None:
    if x.q.shape[:2] in COMPILED:
        return None
    return "timed at fewer shapes: each costs 15 s of compiling"


def fla_parallel(x: Inputs) -> str | None:
    if x.q.shape[1] > 32768:
        return "takes quadratic time: left out above 32,768 tokens"
    return needs_module("fla")(x)


def our_kernel(x: Inputs) -> str | None:
    return cuda.unsupported(Call(x.q, x.k, x.v))


def methods(thunderkittens: Path | None) -> list[Method]:
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    ours = "jrt_kernels prefill"
    fa3, fa4, products = "flash_attn_interface", "flash_attn.cute", "fast_transformers"
    return [
        Method("JRT-RNN", "linear", jrt_rnn("cuda"), our_kernel, ours, prefix=True, ours=True),
        Method("Based", "linear", based("cuda"), our_kernel, ours, ours=True),
        Method("JRT-Prompt", "linear", based("cuda"), our_kernel, ours, length_factor=2, ours=True),
        Method("JRT-RNN (PyTorch)", "linear", jrt_rnn("chunked"), kernel="chunked, eager", prefix=True),
        Method("Based (PyTorch)", "linear", based("chunked"), kernel="chunked, eager"),
        Method("Based (PyTorch, compiled)", "linear", compiled_based(), compiled_here, "chunked, torch.compile"),
        Method("FlashAttention-2", "softmax", sdpa(flash), kernel="SDPA flash"),
        Method("cuDNN", "softmax", sdpa(cudnn), kernel="SDPA cuDNN"),
        Method("FlashAttention-3", "softmax", flash_attention_3, needs_module(fa3), fa3),
        Method("FlashAttention-4", "softmax", flash_attention_4, needs_module(fa4), fa4),
        Method("fla parallel_based", "linear", fla_based("parallel_based"), fla_parallel, "fla.ops.based"),
        Method("fla fused_chunk_based", "linear", fla_based("fused_chunk_based"), needs_module("fla"), "fla.ops.based"),
        Method("fast-transformers", "linear", fast_transformers_product, needs_module(products), "causal_dot_product"),
        Method(
            "ThunderKittens Based",
            "linear",
            thunderkittens_based(thunderkittens or Path()),
            lambda _: None if thunderkittens else "no build given (--thunderkittens PATH)",
            "thunderkittens.based",
            normalized=False,
        ),
    ]
